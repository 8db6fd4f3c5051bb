"""Mistral, dense: a sliding window is in force unless config.json takes it away, as it does for all
models since 7B v0.2."""

from peergrad.parallel.hf.family import Family

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    kv_heads=8,
    head_dim_null=True,
    window=4096,
)
