"""Qwen2 and Qwen2.5: q, k and v have biases, of which config.json says nothing."""

from peergrad.parallel.hf.family import Family

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    kv_heads=32,
    qkv_bias=True,
    window_flag=True,
)
