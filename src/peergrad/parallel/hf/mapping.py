"""Names and layouts: one Megatron parameter is one or more HF tensors.

The layer specs name their norms differently (``input_layernorm`` stands alone in the torch spec and
inside ``linear_qkv`` in the te spec); names are brought to the te form first, so one table serves
both. All families have these names; a model has those rows that its biases and norms call for.
Experts go by the numbers that they have over all ranks; their family says what they are called.
"""

import re
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor

from peergrad.parallel.hf.config import Shape
from peergrad.parallel.hf.families import FAMILIES


class Layout(Enum):
    """How the HF tensors of one Megatron parameter are joined."""

    PLAIN = auto()  # one to one
    VOCAB = auto()  # one to one, with padding rows behind the real vocabulary
    QKV = auto()  # per key-value group: its query heads, its key head, its value head
    GATE_UP = auto()  # gate rows, then up rows, within each tensor rank


@dataclass(frozen=True)
class Mapped:
    """The HF side of one Megatron parameter.

    Example:
        ``Mapped(("model.layers.3.mlp.gate_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        Layout.GATE_UP)``
    """

    names: tuple[str, ...]
    layout: Layout


_TOP = {
    "embedding.word_embeddings.weight": Mapped(("model.embed_tokens.weight",), Layout.VOCAB),
    "decoder.final_layernorm.weight": Mapped(("model.norm.weight",), Layout.PLAIN),
    "output_layer.weight": Mapped(("lm_head.weight",), Layout.VOCAB),
}
_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": (("input_layernorm.weight",), Layout.PLAIN),
    "self_attention.linear_qkv.weight": (
        tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
        Layout.QKV,
    ),
    "self_attention.linear_qkv.bias": (
        tuple(f"self_attn.{x}_proj.bias" for x in "qkv"),
        Layout.QKV,
    ),
    "self_attention.q_layernorm.weight": (("self_attn.q_norm.weight",), Layout.PLAIN),
    "self_attention.k_layernorm.weight": (("self_attn.k_norm.weight",), Layout.PLAIN),
    "self_attention.linear_proj.weight": (("self_attn.o_proj.weight",), Layout.PLAIN),
    "self_attention.linear_proj.bias": (("self_attn.o_proj.bias",), Layout.PLAIN),
    "mlp.linear_fc1.layer_norm_weight": (("post_attention_layernorm.weight",), Layout.PLAIN),
    "mlp.linear_fc1.weight": (("mlp.gate_proj.weight", "mlp.up_proj.weight"), Layout.GATE_UP),
    "mlp.linear_fc2.weight": (("mlp.down_proj.weight",), Layout.PLAIN),
}
_TORCH_SPEC = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


EXPERT = re.compile(r"mlp\.experts\.(\d+)\.linear_(fc[12])\.weight")


def hf_names(name: str, shape: Shape) -> Mapped:
    """The HF tensors of Megatron parameter ``name``, whose numbers of layer and expert are global.

    Raises KeyError for a parameter the table does not know.
    """
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        return _TOP[name]
    inner = _TORCH_SPEC.get(match[2], match[2])
    names, layout = _LAYER.get(inner) or _of_mixture(inner, shape)
    return Mapped(tuple(f"model.layers.{match[1]}.{n}" for n in names), layout)


def _of_mixture(name: str, shape: Shape) -> tuple[tuple[str, ...], Layout]:
    """In a layer."""
    mixture, match = FAMILIES[shape.family].mixture, EXPERT.fullmatch(name)
    if mixture is not None and name == "mlp.router.weight":
        return (f"{mixture.router}.weight",), Layout.PLAIN
    if mixture is None or match is None:
        raise KeyError(name)
    first = match[2] == "fc1"
    some = mixture.projections[:2] if first else mixture.projections[2:]
    names = tuple(f"{mixture.expert.format(match[1])}.{one}.weight" for one in some)
    return names, Layout.GATE_UP if first else Layout.PLAIN


def to_megatron(
    tensors: list[Tensor], layout: Layout, shape: Shape, *, dim: int | None, rank: int, ranks: int
) -> Tensor:
    """Full HF tensors -> this tensor rank's Megatron shard; ``dim`` is the sharded dimension."""
    if layout is Layout.GATE_UP:
        return torch.cat([t.chunk(ranks)[rank] for t in tensors])
    whole = tensors[0]
    if layout is Layout.VOCAB:
        padding = shape.padded_vocab - whole.shape[0]
        whole = torch.cat([whole, whole.new_zeros(padding, whole.shape[1])])
    if layout is Layout.QKV:
        grouped = [t.view(shape.kv_heads, -1, *t.shape[1:]) for t in tensors]
        whole = torch.cat(grouped, dim=1).flatten(0, 1)
    return whole if dim is None else whole.chunk(ranks, dim)[rank].contiguous()


def to_hf(shards: list[Tensor], layout: Layout, shape: Shape, *, dim: int | None) -> list[Tensor]:
    """All tensor ranks' shards of one parameter -> its full HF tensors, contiguous."""
    if layout is Layout.GATE_UP:
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[i] for half in halves]) for i in (0, 1)]
    whole = shards[0] if dim is None or len(shards) == 1 else torch.cat(shards, dim)
    if layout is Layout.VOCAB:
        return [whole[: shape.vocab].contiguous()]
    if layout is Layout.QKV:
        d = shape.head_dim
        sizes = [shape.heads // shape.kv_heads * d, d, d]
        parts = torch.split(whole.view(shape.kv_heads, -1, *whole.shape[1:]), sizes, dim=1)
        return [part.flatten(0, 1).contiguous() for part in parts]
    return [whole]
