"""Attention of the ``torch`` spec over packed sequences: positions and softmax in plain PyTorch.

Megatron's own core attention refuses packed rows without Transformer Engine, and its rotary
embedding of packed rows loops over the sequences in every layer. Both are done here, for all
sequences of about one length at once, on a CPU or a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.autograd.function import once_differentiable

PADDING = 64
"""Tokens of padding that are cheaper than one more call of the attention kernel, and no more are
ever added for one length."""


@dataclass(frozen=True)
class Batch:
    """Consecutive sequences that are attended to as one batch ``[sequences, width]``.

    Example:
        lengths 3, 2: ``Batch(sequences=2, width=3, tokens=5, slots=tensor([0, 1, 2, 3, 4]))``.
    """

    sequences: int
    width: int
    tokens: int
    slots: Tensor | None  # [tokens] int64, of each token in the batch; None: all are as wide


@dataclass
class PackedRow(PackedSeqParams):
    """Megatron's description of a packed row, with what this spec needs beside."""

    lengths: Sequence[int] = ()  # of the sequences, on the host
    positions: Tensor | None = None  # [T] int64
    angles: tuple[Tensor, Tensor] | None = None  # cos, sin [T, 1, d / 2], of each token's position

    @cached_property
    def batches(self) -> list[Batch]:
        """All sequences in order, as few batches as ``PADDING`` allows; once for all layers."""
        assert self.positions is not None
        device = self.positions.device
        return [_batch(lengths, device) for lengths in alike(self.lengths)]


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Divide consecutive lengths into runs whose first is the longest and none much shorter.

    Example:
        3, 2, 2, 90, 3: runs (3, 2, 2) and (90,) and (3,), for 87 are more than PADDING.
    """
    runs: list[list[int]] = []
    for length, same in groupby(lengths):
        run = list(same)
        if runs and 0 <= (runs[-1][0] - length) * len(run) <= PADDING:
            runs[-1] += run
        else:
            runs.append(run)
    return runs


def _batch(lengths: list[int], device: torch.device) -> Batch:
    tokens, width = sum(lengths), lengths[0]
    if tokens == len(lengths) * width:
        return Batch(len(lengths), width, tokens, None)
    real = torch.arange(width) < torch.tensor(lengths)[:, None]
    return Batch(len(lengths), width, tokens, real.flatten().nonzero()[:, 0].to(device))


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
        if config.context_parallel_size != 1:
            raise ValueError(
                f"context_parallel_size = {config.context_parallel_size}: the torch spec attends "
                "within one rank; set it to 1"
            )
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
        """Packed ``[T, heads, d]`` -> ``[T, heads * d]``, or batched ``[s, b, heads, d]`` ->
        ``[s, b, heads * d]``; causal within each sequence."""
        assert attention_mask is None and attention_bias is None, "only causal attention is built"
        if packed_seq_params is None:
            batched = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
            return self._attend(*batched).permute(2, 0, 1, 3).flatten(2)
        if packed_seq_params.angles is not None:
            cos, sin = (x.to(query.dtype) for x in packed_seq_params.angles)
            query, key = (Rotation.apply(x, cos, sin) for x in (query, key))  # type: ignore[no-untyped-call]
        batches = packed_seq_params.batches
        splits = [torch.split(x, [b.tokens for b in batches]) for x in (query, key, value)]
        found = [self._batched(batch, *part) for batch, *part in zip(batches, *splits, strict=True)]
        return (found[0] if len(found) == 1 else torch.cat(found)).flatten(1)

    def _batched(self, batch: Batch, *packed: Tensor) -> Tensor:
        """Sequences as one batch, padded on the right: under a causal mask no real token sees the
        padding, so the result is exact."""
        slots = batch.slots

        def spread(x: Tensor) -> Tensor:
            if slots is not None:
                empty = x.new_zeros(batch.sequences * batch.width, *x.shape[1:])
                x = empty.index_copy(0, slots, x)
            return x.view(batch.sequences, batch.width, *x.shape[1:]).transpose(1, 2)

        out = self._attend(*(spread(x) for x in packed)).transpose(1, 2).flatten(0, 1)
        return out if slots is None else out.index_select(0, slots)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )
