"""Attention of the ``torch`` spec over packed sequences: positions and softmax in plain PyTorch.

Megatron's own core attention refuses packed rows without Transformer Engine, and its rotary
embedding of packed rows loops over the sequences in every layer. Both are done here, for all
sequences of about one length at once, on a CPU or a GPU; answers may share their prompt.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right

from peergrad.parallel.batches import Batch, Families, Layout, lay_out
from peergrad.parallel.routing import Routed

BLOCK = 256
"""Queries that attend under one mask, on a CPU: it is this high, and as wide as all keys."""


@dataclass
class PackedRow(PackedSeqParams):
    """Megatron's description of a packed row, with what this spec needs beside. T are this context
    rank's tokens."""

    families: Families = ()  # lengths of prompts with the answers that share them, on the host
    positions: Tensor | None = None  # [T] int64
    angles: tuple[Tensor, Tensor] | None = None  # cos, sin [T, 1, d / 2], of each token's position
    routed: Routed | None = None  # what the routers of a mixture of experts are told

    @cached_property
    def layout(self) -> Layout:
        """Once for all layers."""
        assert self.positions is not None
        if (group := self.cp_group) is None:
            return lay_out(self.families, self.positions.device)
        return lay_out(self.families, self.positions.device, rank=group.rank(), ranks=group.size())

    @cached_property
    def triangle(self) -> Tensor:
        """``[BLOCK, widest batch]`` float32 on the host, 0 up to the diagonal that ends in the
        lower right corner, -inf above: its last rows and columns mask any block of queries."""
        widest = max(batch.width for batch in self.layout.batches)
        return torch.full((BLOCK, widest), -torch.inf).triu(1 + widest - BLOCK)


def take_angles(
    _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A pre-hook of the decoder: of the angles of all positions, ``[longest, 1, 1, d]``, each token
    gets its own, and Megatron has none left to rotate by."""
    packed: PackedRow | None = kwargs.get("packed_seq_params")
    if packed is None:
        return args, kwargs
    angles = kwargs["rotary_pos_emb"][:, 0]
    half = angles[packed.positions, :, : angles.shape[-1] // 2]  # the other half is the same
    packed.angles = half.cos(), half.sin()
    return args, {**kwargs, "rotary_pos_emb": None}


class Rotation(torch.autograd.Function):
    """Rotate the pairs ``(x_i, x_{i + d/2})`` of ``x`` ``[T, heads, d]`` by angles whose cosine and
    sine are ``[T, 1, d / 2]``. The gradient is rotated back: a third of the passes over memory
    that autograd makes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (a, b), (left, right) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(a, cos, out=left).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=right).addcmul_(a, sin)
    return out


class PackedAttention(MegatronModule):
    """Causal scaled-dot-product attention over packed (``thd``) or batched (``sbhd``) input.

    Heads are already this tensor rank's share; grouped queries are handled by PyTorch's kernel.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
    ) -> Tensor:
        """Packed ``[T, heads, d]`` -> ``[T, heads * d]``, keys and values gathered from the other
        context ranks, or batched ``[s, b, heads, d]`` ->
        ``[s, b, heads * d]``; causal within each sequence."""
        assert attention_mask is None and attention_bias is None, "only causal attention is built"
        if packed_seq_params is None:
            batched = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
            return self._attend(*batched).permute(2, 0, 1, 3).flatten(2)
        if packed_seq_params.angles is not None:
            cos, sin = (x.to(query.dtype) for x in packed_seq_params.angles)
            query, key = (Rotation.apply(x, cos, sin) for x in (query, key))  # type: ignore[no-untyped-call]
        layout = packed_seq_params.layout
        if packed_seq_params.cp_group is not None:
            both = torch.cat([key, value], -1)
            both = tensor_parallel.gather_from_sequence_parallel_region(
                both, group=packed_seq_params.cp_group
            )
            key, value = both.chunk(2, -1)
        query = _taken(query, layout.queries)
        key, value = _taken(key, layout.keys), _taken(value, layout.keys)
        asked = torch.split(query, [b.sequences * (b.width - b.first) for b in layout.batches])
        seen = [b.sequences * b.width for b in layout.batches]
        parts = zip(asked, torch.split(key, seen), torch.split(value, seen), strict=True)
        found = [
            self._batch(packed_seq_params, batch, *part)
            for batch, part in zip(layout.batches, parts, strict=True)
        ]
        return _taken(found[0] if len(found) == 1 else torch.cat(found), layout.slots).flatten(1)

    def _batch(self, row: PackedRow, batch: Batch, *packed: Tensor) -> Tensor:
        """``[queries, heads, d]`` of a batch. Padding is seen by no token of the row, so the
        result is exact."""
        shape = batch.sequences, -1
        query, key, value = (x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in packed)
        if batch.mask is not None:
            out = self._attend(query, key, value, batch.mask.to(query.dtype))
        elif batch.first == 0:
            out = self._attend(query, key, value)
        elif query.is_cuda:  # knows the lower right corner, and needs no mask
            out = self._attend(query, key, value, causal_lower_right(query.shape[2], batch.width))
        else:
            out = self._in_blocks(row.triangle.to(query.dtype), query, key, value)
        return out.transpose(1, 2).flatten(0, 1)

    def _in_blocks(self, triangle: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The last query sees all keys, each before it one less; no more are looked at than a
        block may see."""
        found, end = [], key.shape[2] - query.shape[2]
        for block in torch.split(query, BLOCK, 2):
            rows = block.shape[2]
            end += rows
            mask = triangle[-rows:, -end:]
            found.append(self._attend(block, key[:, :, :end], value[:, :, :end], mask))
        return found[0] if len(found) == 1 else torch.cat(found, 2)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """``[b, heads, s, d]``, causal without a mask."""
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=True,
        )


def _taken(x: Tensor, index: Tensor | None) -> Tensor:
    # Rows that lie apart take four times as long on a CPU.
    return x if index is None else x.contiguous().index_select(0, index)
