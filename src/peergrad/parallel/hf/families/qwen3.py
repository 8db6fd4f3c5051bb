"""Qwen3, dense: query and key heads are normed, and are 128 wide whatever the hidden size is."""

from peergrad.parallel.hf.family import Family

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    kv_heads=32,
    head_dim=128,
    qk_norm=True,
    attention_bias=True,
    window_flag=True,
)
