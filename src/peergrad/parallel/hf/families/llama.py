"""Llama 2, 3 and later text models, and what was made in their form."""

from peergrad.parallel.hf.family import Family

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    kv_heads=None,
    head_dim_null=True,
    heads_divide_hidden=True,
    attention_bias=True,
)
