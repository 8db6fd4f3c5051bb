"""Qwen2 and Qwen2.5: q, k and v have biases, of which config.json says nothing. A head_dim is none
of its keys: SGLang on a CPU takes the quotient, and so much of the weights as fits that."""

from peergrad.parallel.hf.family import Family

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    kv_heads=32,
    head_dim_free=False,
    qkv_bias=True,
    window_flag=True,
)
