"""SGLang's attention backend for a CPU: ``cpu_attention`` where SGLang would loop over requests.

Only SGLang imports this module.
"""

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from peergrad.rollout.cpu_attention import Block, Scratch, attend, lay_out

PLAIN_MODES = (ForwardMode.EXTEND, ForwardMode.MIXED, ForwardMode.DECODE)


class CpuAttentionBackend(TorchNativeAttnBackend):
    """Causal self-attention of decoders over whole contexts. Sliding windows, encoders, cross
    attention and speculative steps go SGLang's own way, request by request."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self._blocks: list[Block] | None = None
        self._scratch = (Scratch(), Scratch())
        self._table = self.req_to_token_pool.req_to_token
        self._token_bytes = 0  # of one layer; known at the first step

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        self._blocks = None
        if _is_plain(forward_batch) and not self.use_sliding_window_kv_pool:
            self._blocks = self._lay_out(forward_batch)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        native = super().forward_extend
        return self._forward(native, q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        native = super().forward_decode
        return self._forward(native, q, k, v, layer, forward_batch, save_kv_cache)

    def _lay_out(self, batch: Any) -> list[Block]:
        ends = batch.seq_lens.numpy()
        decoding = batch.forward_mode.is_decode()
        fresh = ends * 0 + 1 if decoding else batch.extend_seq_lens.numpy().astype(ends.dtype)
        if not self._token_bytes:
            keys = self.token_to_kv_pool.get_key_buffer(self.token_to_kv_pool.start_layer)
            self._token_bytes = keys[0].numel() * keys.element_size()
        return lay_out(
            self._table,
            batch.req_pool_indices,
            ends - fresh,
            fresh,
            token_bytes=self._token_bytes,
        )

    def _forward(
        self,
        native: Callable[..., torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        batch: Any,
        save: bool,
    ) -> torch.Tensor:
        """By blocks; by SGLang's ``native`` what these leave out."""
        if self._blocks is None or not _is_causal(layer):
            return native(q, k, v, layer, batch, save)
        pool, heads = self.token_to_kv_pool, layer.tp_q_head_num
        if save and k is not None and v is not None:
            pool.set_kv_buffer(layer, KVWriteLoc(batch.out_cache_loc, None), k, v)
        q = q.reshape(-1, heads, layer.qk_head_dim)
        out = q.new_empty(len(q), heads, layer.v_head_dim)
        attend(
            q,
            pool.get_key_buffer(layer.layer_id),
            pool.get_value_buffer(layer.layer_id),
            self._blocks,
            self._scratch,
            scale=layer.scaling,
            out=out,
        )
        return out.view(len(q), -1)


def _is_plain(batch: Any) -> bool:
    return batch.forward_mode in PLAIN_MODES and batch.encoder_lens is None


def _is_causal(layer: Any) -> bool:
    """Whether the layer sees all of the context before a token and nothing else. RuntimeError for
    what SGLang's own backend would leave out without a word."""
    if layer.logit_cap:
        raise RuntimeError(
            f"logit_cap = {layer.logit_cap:g}: attention on a CPU does not cap its logits; serve "
            "this model on a GPU"
        )
    window = layer.sliding_window_size
    whole = window is None or window < 0
    return whole and not layer.is_cross_attention and layer.attn_type == AttentionType.DECODER
