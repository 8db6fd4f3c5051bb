"""Mixtral: experts under names of its own. SGLang takes the quotient for head_dim, passes over how
a rope is scaled, and cuts its theta down to a whole number."""

from peergrad.parallel.hf.family import Family, Mixture

FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    kv_heads=8,
    head_dim_null=True,
    head_dim_free=False,
    norm_eps=1e-5,
    theta=1_000_000.0,
    ties=False,
    scales_rope=False,
    mixture=Mixture(
        number=("num_local_experts", "num_experts"),
        experts=8,
        chosen=2,
        width="intermediate_size",
        router="block_sparse_moe.gate",
        expert="block_sparse_moe.experts.{}",
        projections=("w1", "w3", "w2"),
    ),
)
