"""Layers of the ``torch`` spec: packed-sequence attention and a norm that knows sequence parallel.

Megatron's own core attention refuses packed rows without Transformer Engine, and its torch norm
refuses sequence parallelism; these two fill the gap with plain PyTorch, on a CPU or a GPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

PADDING_WASTE = 4
"""Sequences are padded to one batch while that costs at most this many times the packed tokens."""


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
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Packed ``[T, heads, d]`` -> ``[T, heads * d]``, or batched ``[s, b, heads, d]`` ->
        ``[s, b, heads * d]``; causal within each sequence."""
        assert attention_mask is None and attention_bias is None, "only causal attention is built"
        if packed_seq_params is None:
            batched = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
            return self._attend(*batched).permute(2, 0, 1, 3).flatten(2)
        lengths, width = packed_seq_params.cu_seqlens_q.diff(), packed_seq_params.max_seqlen_q
        if lengths.numel() * width <= PADDING_WASTE * query.shape[0]:
            out = self._padded(query, key, value, packed_seq_params.cu_seqlens_q, width)
        else:
            splits = [torch.split(x, lengths.tolist()) for x in (query, key, value)]
            rows = zip(*splits, strict=True)
            out = torch.cat(
                [self._attend(*(x.transpose(0, 1) for x in r)).transpose(0, 1) for r in rows]
            )
        return out.flatten(1)

    def _padded(self, query: Tensor, key: Tensor, value: Tensor, cu: Tensor, width: int) -> Tensor:
        """All sequences as one batch, padded on the right: under a causal mask no real token sees
        the padding, so the result is exact."""
        place = torch.arange(query.shape[0], device=query.device)
        sequence = torch.bucketize(place, cu[1:].long(), right=True)
        slot = sequence * width + place - cu[sequence]
        count = cu.numel() - 1

        def spread(x: Tensor) -> Tensor:
            padded = x.new_zeros(count * width, *x.shape[1:]).index_copy(0, slot, x)
            return padded.view(count, width, *x.shape[1:]).transpose(1, 2)

        out = self._attend(spread(query), spread(key), spread(value))
        return out.transpose(1, 2).flatten(0, 1).index_select(0, slot)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMSNorm with Megatron's constructor and its mark for sequence parallelism."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # finalize_model_grads sums the gradients of marked weights over the tensor ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
