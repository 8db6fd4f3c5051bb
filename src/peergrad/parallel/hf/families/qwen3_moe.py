"""Qwen3's mixtures of experts: its attention, and experts in every layer."""

from peergrad.parallel.hf.family import Family, Mixture

FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    kv_heads=4,
    qk_norm=True,
    attention_bias=True,
    window_flag=True,
    ties=False,
    mixture=Mixture(
        number=("num_experts", "num_local_experts"),
        experts=128,
        chosen=8,
        width="moe_intermediate_size",
        ffn=768,
        normed="norm_topk_prob",
        every=("mlp_only_layers", "decoder_sparse_step"),
    ),
)
