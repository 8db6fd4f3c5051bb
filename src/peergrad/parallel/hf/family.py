"""What a family of models is: where its function of the weights differs from the others'."""

from dataclasses import dataclass


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
