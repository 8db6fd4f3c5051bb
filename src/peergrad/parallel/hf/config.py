"""The HF configuration of a model, read as the few numbers a Megatron model is built from."""

import math
from dataclasses import dataclass

from transformers import AutoConfig, PretrainedConfig

FAMILIES = ("qwen3", "llama")
VOCAB_MULTIPLE = 16
"""The embedding is padded to a multiple of this, whatever the layout, so that a checkpoint's shapes
do not depend on the tensor-parallel size (any divisor of 16)."""


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer, family differences resolved.

    Example:
        Qwen3-0.6B: ``layers=28, hidden=1024, heads=16, kv_heads=8, head_dim=128, ffn=3072,
        vocab=151936, max_length=40960, qk_norm=True, tied=True``
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_length: int
    norm_eps: float
    rope_theta: float
    rope_factor: float | None  # Llama 3.1's frequency scaling
    qk_norm: bool
    tied: bool

    @property
    def padded_vocab(self) -> int:
        return math.ceil(self.vocab / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _rope(config: PretrainedConfig) -> tuple[float, float | None]:
    """(theta, Llama 3.1 scaling factor or None)."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    theta = float(rope["rope_theta"])
    if kind == "default":
        return theta, None
    if kind == "llama3":
        fixed = {
            "low_freq_factor": 1,
            "high_freq_factor": 4,
            "original_max_position_embeddings": 8192,
        }
        if all(rope.get(key) == value for key, value in fixed.items()):
            return theta, float(rope["factor"])
    raise ValueError(
        f"model.path: rope_parameters = {dict(rope)}: only the default rope and Llama 3.1's "
        "scaling (low 1, high 4, original length 8192) are supported; choose another model"
    )


def read_shape(path: str) -> tuple[PretrainedConfig, Shape]:
    """The HF configuration in folder ``path`` and its shape.

    Raises ValueError for a family or a feature that the mapping does not cover.
    """
    config = AutoConfig.from_pretrained(path)
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model.path = {path!r}: model_type {config.model_type!r} is not one of "
            f"{', '.join(FAMILIES)}; choose another model"
        )
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if getattr(config, key, False):
            raise ValueError(
                f"model.path = {path!r}: {key}=true in config.json is not supported; "
                "choose another model"
            )
    if config.hidden_act != "silu":
        raise ValueError(
            f"model.path = {path!r}: hidden_act {config.hidden_act!r} is not supported, only silu; "
            "choose another model"
        )
    theta, factor = _rope(config)
    return config, Shape(
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        max_length=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        rope_theta=theta,
        rope_factor=factor,
        qk_norm=config.model_type == "qwen3",
        tied=config.tie_word_embeddings,
    )
