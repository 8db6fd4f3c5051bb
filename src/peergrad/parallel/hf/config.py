"""The configuration of a Hugging Face model, read as the few numbers a Megatron model is built
from.

``config.json`` is read here and nowhere else, without transformers, so that the check before a run
and the run itself see one model. Defaults are those of transformers' configuration classes.
"""

import math
from dataclasses import dataclass

from peergrad.parallel.hf.families import FAMILIES
from peergrad.parallel.hf.family import Family
from peergrad.parallel.hf.rope import Rope, read_rope
from peergrad.parallel.hf.source import Source

VOCAB_MULTIPLE = 128
"""The embedding is padded to a multiple of this, whatever the layout, so that a checkpoint's shapes
do not depend on the tensor-parallel size (any divisor of 128). Kernels reduce the vocabulary in
eight blocks, each of which then begins on 16 bytes (kernels/shard.py). Checkpoints of another
padding are loaded, too; rows that they lack are 0."""

EXPERTS = (
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"),
    *("n_shared_experts", "shared_expert_intermediate_size", "num_shared_experts"),
)
ENGINE = ("bias", "dual_chunk_attention_config", "original_num_attention_heads")
"""Unknown to transformers' classes of all families, but not to those of SGLang."""


@dataclass(frozen=True)
class Experts:
    """MLPs of which every token meets some, chosen and weighted by a router.

    Example:
        Qwen3-30B-A3B: ``Experts(number=128, chosen=8, normed=True)``
    """

    number: int  # in each layer
    chosen: int  # for each token
    normed: bool  # whether the weights of a token's experts sum to 1, or are those of the softmax


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer, family differences resolved.

    Example:
        Qwen3-0.6B: ``layers=28, hidden=1024, heads=16, kv_heads=8, head_dim=128, ffn=3072,
        vocab=151936, max_length=40960, rope=Rope(1e6), qk_norm=True, tied=True``
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int  # of an MLP, or of each expert
    vocab: int
    max_length: int
    norm_eps: float
    rope: Rope
    tied: bool
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    experts: Experts | None = None  # in every layer; None: one MLP

    @property
    def padded_vocab(self) -> int:
        return math.ceil(self.vocab / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def read_shape(path: str, key: str = "model.path") -> Shape:
    """The shape of the model in folder ``path``, which ``key`` of the configuration names.

    Raises ValueError if there is none, if its values make no sense, or for a family or a feature
    that the mapping to Megatron does not cover.
    """
    source = Source(path, key)
    family = FAMILIES[source.one_of("model_type", tuple(FAMILIES))]
    layers = source.size("num_hidden_layers")
    _refuse_features(source, family, layers)
    hidden, heads = source.size("hidden_size"), source.size("num_attention_heads")
    kv_heads = source.size("num_key_value_heads", family.kv_heads or heads, null=heads)
    if heads % kv_heads:
        source.refuse("num_key_value_heads", f"must divide num_attention_heads ({heads})")
    biases = family.attention_bias and source.flag("attention_bias")
    return Shape(
        family=family.model_type,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(source, family, hidden, heads),
        ffn=_ffn(source, family),
        vocab=source.size("vocab_size"),
        max_length=source.size("max_position_embeddings"),
        norm_eps=source.number("rms_norm_eps", family.norm_eps),
        rope=_rope(source, family),
        tied=_tied(source, family),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias or biases,
        o_bias=biases,
        experts=_experts(source, family),
    )


def _rope(source: Source, family: Family) -> Rope:
    rope = read_rope(source, family.theta)
    if not family.scales_rope and (rope.kind != "default" or rope.theta % 1):
        name = "rope_scaling" if source.values.get("rope_scaling") else "rope_parameters"
        rule = "is not supported: SGLang knows the default one alone here, of a whole rope_theta"
        source.refuse(name if name in source.values else "rope_theta", rule)
    return rope


def _tied(source: Source, family: Family) -> bool:
    tied = source.flag("tie_word_embeddings")
    if tied and not family.ties:
        source.refuse("tie_word_embeddings", "is not supported: SGLang would have no head")
    return tied


def _ffn(source: Source, family: Family) -> int:
    if family.mixture is None:
        return source.size("intermediate_size")
    return source.size(family.mixture.width, family.mixture.ffn)


def _experts(source: Source, family: Family) -> Experts | None:
    if (mixture := family.mixture) is None:
        return None
    said = [name for name in mixture.number if source.values.get(name) is not None]
    number = source.size(said[0] if said else mixture.number[0], mixture.experts)
    for name in said[1:]:
        if source.values[name] != number:
            source.refuse(name, f"must be {said[0]} ({number})", "correct one of the two")
    chosen, normed = source.size("num_experts_per_tok", mixture.chosen), True
    if chosen > number:
        source.refuse("num_experts_per_tok", f"must be at most {said[0]} ({number})", "correct it")
    if mixture.normed is not None:
        normed = source.flag(mixture.normed)
    if normed and chosen == 1:
        rule = "is not supported: an only expert of weight 1 gives its router no gradient"
        source.refuse("num_experts_per_tok", rule)
    return Experts(number, chosen, normed)


def _head_dim(source: Source, family: Family, hidden: int, heads: int) -> int:
    if family.heads_divide_hidden and hidden % heads:
        source.refuse("num_attention_heads", f"must divide hidden_size ({hidden})")
    quotient = max(1, hidden // heads)
    null = quotient if family.head_dim_null else None
    head_dim = source.size("head_dim", family.head_dim or quotient, null=null)
    if head_dim != quotient and not family.head_dim_free:
        source.refuse("head_dim", f"is not supported, only hidden_size / heads ({quotient})")
    if head_dim % 2:
        source.refuse("head_dim", "must be even: rotary embeddings turn pairs")
    return head_dim


def _refuse_features(source: Source, family: Family, layers: int) -> None:
    """Whatever would make this another function of its weights than the one that is trained."""
    values = source.values
    named = values.get("architectures")
    if named is not None and named != [family.architecture]:
        source.refuse("architectures", f'is not supported, only ["{family.architecture}"]')
    # Where q, k and v have biases anyway no reader asks for attention_bias.
    biased = ("attention_bias",) if family.attention_bias or family.qkv_bias else ()
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if name not in biased and values.get(name, False) is not False:
            source.refuse(name, "is not supported, only false")
    if values.get("hidden_act", "silu") != "silu":
        source.refuse("hidden_act", "is not supported, only silu")
    if values.get("layer_types") not in (None, ["full_attention"] * layers):
        source.refuse("layer_types", "is not supported, only full_attention in every layer")
    _refuse_window(source, family)
    for name in ("quantization_config", "compression_config"):
        if values.get(name) is not None:
            source.refuse(name, "is not supported", "use the unquantised model")
    # Readers of today take the model from an inner configuration, if there is one.
    mixture = family.mixture
    known = (*mixture.number, mixture.width) if mixture else ()
    for name in (*EXPERTS, *ENGINE, "text_config"):
        if name not in known and values.get(name) not in (None, 0):
            source.refuse(name, "is not supported")
    for name in mixture.every if mixture else ():
        if values.get(name) not in (None, [], 1):
            source.refuse(name, "is not supported, only experts in every layer")
    if values.get("router_jitter_noise", 0.0) != 0.0:
        source.refuse("router_jitter_noise", "is not supported, only 0.0")
    if values.get("rope_is_neox_style", True) is not True:
        source.refuse("rope_is_neox_style", "is not supported, only true")


def _refuse_window(source: Source, family: Family) -> None:
    """A sliding window, unless no sequence is longer than it."""
    window = source.values.get("sliding_window", family.window)
    longest = source.size("max_position_embeddings")
    wide = type(window) is int and window >= longest
    if window is not None and not wide and not family.window_flag:
        by = "" if "sliding_window" in source.values else "(by default) "
        rule = f"{by}is not supported, only null or max_position_embeddings ({longest}) and up"
        remedy = "lower max_position_embeddings there to its width, or choose another model"
        source.refuse("sliding_window", rule, remedy, default=window)
