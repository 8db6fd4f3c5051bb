"""What a family of models is: where its function of the weights differs from the others'."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What a family of mixtures of experts calls its numbers in config.json, what they are by
    default, and the names of its tensors in a layer.

    Example:
        ``Mixture(number=("num_experts", "num_local_experts"), experts=128, chosen=8,
        width="moe_intermediate_size", ffn=768, normed="norm_topk_prob")``
    """

    number: tuple[str, ...]  # keys that say how many experts a layer has
    experts: int
    chosen: int  # num_experts_per_tok
    width: str  # the key of an expert's width
    ffn: int | None = None  # None: it must be said
    normed: str | None = None  # the flag by which a token's weights sum to 1; None: they do
    every: tuple[str, ...] = ()  # keys of layers without experts, of which there may be none
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{}"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A decoder of pre-norm layers, rotary attention over grouped heads and a gated SiLU MLP, with
    the tensor names of Llama. Defaults are those of transformers' configuration class.

    Example:
        ``Family(model_type="qwen3", architecture="Qwen3ForCausalLM", kv_heads=32, head_dim=128,
        qk_norm=True, attention_bias=True, window_flag=True)``
    """

    model_type: str  # in config.json
    architecture: str  # in config.json; by it SGLang knows the model
    kv_heads: int | None  # num_key_value_heads by default; None: as many as heads
    head_dim: int | None = None  # by default; None: hidden_size / num_attention_heads
    head_dim_null: bool = False  # whether a null stands for that quotient
    head_dim_free: bool = True  # whether it may be another
    heads_divide_hidden: bool = False  # whether transformers insists on it, even with a head_dim
    qk_norm: bool = False  # a norm of each query and key head
    qkv_bias: bool = False  # biases of q, k and v, whatever config.json says
    attention_bias: bool = False  # whether config.json may ask for biases of q, k, v and o
    window: int | None = None  # sliding_window by default; it is never supported in force
    window_flag: bool = False  # whether it needs use_sliding_window to be in force
    mixture: Mixture | None = None  # of experts in the place of every MLP
    norm_eps: float = 1e-6  # rms_norm_eps by default
    theta: float = 10_000.0  # rope_theta by default
    ties: bool = True  # whether SGLang takes the embedding for a head that is not there
    scales_rope: bool = True  # whether SGLang knows more than the default rope of a whole theta
