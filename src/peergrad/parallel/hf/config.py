"""The configuration of a Hugging Face model, read as the few numbers a Megatron model is built
from.

``config.json`` is read here and nowhere else, without transformers, so that the check before a run
and the run itself see one model. Defaults are those of transformers' configuration classes.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from peergrad.config import require
from peergrad.parallel.hf.strict_json import parse

VOCAB_MULTIPLE = 128
"""The embedding is padded to a multiple of this, whatever the layout, so that a checkpoint's shapes
do not depend on the tensor-parallel size (any divisor of 128). Kernels reduce the vocabulary in
eight blocks, each of which then begins on 16 bytes (kernels/shard.py). Checkpoints of another
padding are loaded, too; rows that they lack are 0."""

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
FAMILIES = tuple(ARCHITECTURES)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
LLAMA3_ROPE = {
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}
"""The values that Megatron's form of Llama 3.1's frequency scaling has built in."""


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


def read_shape(path: str, key: str = "model.path") -> Shape:
    """The shape of the model in folder ``path``, which ``key`` of the configuration names.

    Raises ValueError if there is none, if its values make no sense, or for a family or a feature
    that the mapping to Megatron does not cover.
    """
    source = _Source(path, key, read_model_config(path, key))
    family = source.one_of("model_type", FAMILIES)
    layers = source.size("num_hidden_layers")
    _refuse_features(source, family, layers)
    hidden, heads = source.size("hidden_size"), source.size("num_attention_heads")
    kv_heads = source.size("num_key_value_heads", 32 if family == "qwen3" else heads, null=heads)
    if heads % kv_heads:
        source.refuse("num_key_value_heads", f"must divide num_attention_heads ({heads})")
    theta, factor = _rope(source)
    return Shape(
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(source, family, hidden, heads),
        ffn=source.size("intermediate_size"),
        vocab=source.size("vocab_size"),
        max_length=source.size("max_position_embeddings"),
        norm_eps=source.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_factor=factor,
        qk_norm=family == "qwen3",
        tied=source.flag("tie_word_embeddings"),
    )


def read_model_config(path: str, key: str) -> dict[str, Any]:
    """config.json of the HF folder ``path``, which ``key`` names; ValueError if there is none."""
    try:
        found = parse((Path(path) / "config.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        rule = "must be a folder with an HF checkpoint (config.json is missing)"
        remedy = "correct the path, or make a tiny model with tools/make_tiny_model.py"
        raise ValueError(f"{key} = {path!r}: {rule}; {remedy}") from error
    except OSError as error:
        rule = f"its config.json cannot be read ({error.strerror})"
        raise ValueError(
            f"{key} = {path!r}: {rule}; correct the path or its permissions"
        ) from error
    except ValueError as error:
        rule = f"config.json is not JSON ({error})"
        raise ValueError(f"{key} = {path!r}: {rule}; download it again") from error
    require(isinstance(found, dict), key, path, "config.json holds no object", "download it again")
    model: dict[str, Any] = found
    return model


class _Source:
    """The values of one config.json, each checked as it is taken."""

    def __init__(self, path: str, key: str, values: dict[str, Any]) -> None:
        self.path, self.key, self.values = path, key, values

    def refuse(self, name: str, rule: str, remedy: str = "choose another model") -> NoReturn:
        value = json.dumps(self.values.get(name))
        shown = value if len(value) <= 80 else value[:77] + "..."
        raise ValueError(
            f"{self.key} = {self.path!r}: {name} = {shown} in config.json {rule}; {remedy}"
        )

    def size(self, name: str, default: int | None = None, *, null: int | None = None) -> int:
        """A positive whole number; ``null``: what a null stands for."""
        value = self.values.get(name, default)
        if value is None and name in self.values and null is not None:
            return null
        if name not in self.values and default is None:
            rule, remedy = f"config.json has no {name}", "choose another model"
            raise ValueError(f"{self.key} = {self.path!r}: {rule}; {remedy}")
        if type(value) is not int or value < 1:
            self.refuse(name, "must be a positive whole number", "correct it")
        return value

    def number(self, name: str, default: float) -> float:
        # transformers insists on a decimal point, and so does the engine that loads through it.
        value = self.values.get(name, default)
        if not (isinstance(value, float) and 0 < value < math.inf):
            self.refuse(name, "must be a positive number, such as 1e-6", "correct it")
        return value

    def flag(self, name: str) -> bool:
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            self.refuse(name, "must be true or false", "correct it")
        return value

    def one_of(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.values.get(name)
        if value not in choices:
            self.refuse(name, f"must be {' or '.join(choices)}")
        return str(value)


def _head_dim(source: _Source, family: str, hidden: int, heads: int) -> int:
    if family == "llama" and hidden % heads:  # transformers refuses it even with a head_dim
        source.refuse("num_attention_heads", f"must divide hidden_size ({hidden})")
    if family == "qwen3":
        head_dim = source.size("head_dim", 128)
    else:
        head_dim = source.size("head_dim", hidden // heads, null=hidden // heads)
    if head_dim % 2:
        source.refuse("head_dim", "must be even: rotary embeddings turn pairs")
    return head_dim


def _refuse_features(source: _Source, family: str, layers: int) -> None:
    """Whatever would make this another function of its weights than the one that is trained."""
    values = source.values
    named = values.get("architectures")
    if named is not None and named != [ARCHITECTURES[family]]:
        source.refuse("architectures", f'is not supported, only ["{ARCHITECTURES[family]}"]')
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if values.get(name, False) is not False:
            source.refuse(name, "is not supported, only false")
    if values.get("hidden_act", "silu") != "silu":
        source.refuse("hidden_act", "is not supported, only silu")
    if values.get("layer_types") not in (None, ["full_attention"] * layers):
        source.refuse("layer_types", "is not supported, only full_attention in every layer")
    # Qwen3's sliding_window counts for nothing without use_sliding_window.
    windows = () if family == "qwen3" else ("sliding_window",)
    for name in ("quantization_config", "compression_config"):
        if values.get(name) is not None:
            source.refuse(name, "is not supported", "use the unquantised model")
    # Readers of today take the model from an inner configuration, if there is one.
    for name in (*EXPERTS, *windows, "text_config"):
        if values.get(name) not in (None, 0):
            source.refuse(name, "is not supported")
    if values.get("partial_rotary_factor") not in (None, 1):
        source.refuse("partial_rotary_factor", "is not supported, only 1")


def _rope(source: _Source) -> tuple[float, float | None]:
    """(theta, Llama 3.1 scaling factor or None), in the new spelling (``rope_parameters``) or the
    old one (``rope_theta`` and ``rope_scaling``, which wins)."""
    values = source.values
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = values.get(name)
    if rope is None:
        rope = {}
    if not isinstance(rope, dict):
        source.refuse(name, "must be an object", "correct it")
    theta = rope.get("rope_theta", values.get("rope_theta", 10_000.0))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < math.inf:
        source.refuse("rope_theta" if "rope_theta" in values else name, "must be a positive number")
    if rope.get("partial_rotary_factor", 1) not in (None, 1):
        source.refuse(name, "is not supported: partial_rotary_factor must be 1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" and not set(rope) & {"full_attention", "sliding_attention"}:
        return float(theta), None
    length = {"original_max_position_embeddings": values.get("max_position_embeddings")}
    factor = rope.get("factor")
    fixed = all({**length, **rope}.get(key) == value for key, value in LLAMA3_ROPE.items())
    number = isinstance(factor, int | float) and 1 <= factor < math.inf
    if kind == "llama3" and fixed and number:
        return float(theta), float(rope["factor"])
    source.refuse(
        name,
        "is not supported: only the default rope and Llama 3.1's scaling (low 1, high 4, "
        "original length 8192)",
    )
