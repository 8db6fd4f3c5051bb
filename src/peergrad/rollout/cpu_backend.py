"""SGLang's attention backend for a CPU: ``cpu_attention`` where SGLang would loop over requests,
and ``cpu_copies`` where it would compute a prompt as often as it is there.

Only SGLang imports this module.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_exec, get_lora

from peergrad.rollout.cpu_attention import Block, Scratch, attend, lay_out
from peergrad.rollout.cpu_copies import Copies, find_copies
from peergrad.rollout.cpu_models.trained import EntryClass

log = logging.getLogger(__name__)

PLAIN_MODES = (ForwardMode.EXTEND, ForwardMode.MIXED, ForwardMode.DECODE)


class CpuAttentionBackend(TorchNativeAttnBackend):
    """Causal self-attention of decoders over whole contexts. Sliding windows, encoders, cross
    attention and speculative steps go SGLang's own way, request by request."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self.copies: Copies | None = None  # of the step, as long as its layers are computed
        self._batch: Any = None  # the step, if it is plain
        self._blocks: list[Block] | None = None
        self._scratch = (Scratch(), Scratch())
        self._table = self.req_to_token_pool.req_to_token
        self._token_bytes = 0  # of one layer; known at the first step

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        plain = _is_plain(forward_batch) and not self.use_sliding_window_kv_pool
        self._batch = forward_batch if plain else None
        self._blocks = self.copies = None

    def share(self, batch: Any, tokens: torch.Tensor) -> Copies | None:
        """Which of the step's rows its layers are to be given, if not all: from here on they are
        taken to be those."""
        self.copies = None
        if batch is self._batch and not batch.forward_mode.is_decode():
            prefix, fresh = batch.extend_prefix_lens, batch.extend_seq_lens
            self.copies = find_copies(tokens.numpy(), prefix.numpy(), fresh.numpy())
        return self.copies

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

    def _lay_out(self) -> list[Block]:
        batch = self._batch
        ends = batch.seq_lens.numpy()
        decoding = batch.forward_mode.is_decode()
        fresh = ends * 0 + 1 if decoding else batch.extend_seq_lens.numpy().astype(ends.dtype)
        if not self._token_bytes:
            keys = self.token_to_kv_pool.get_key_buffer(self.token_to_kv_pool.start_layer)
            self._token_bytes = keys[0].numel() * keys.element_size()
        computed = slice(None) if self.copies is None else self.copies.requests
        return lay_out(
            self._table,
            batch.req_pool_indices[computed],
            (ends - fresh)[computed],
            fresh[computed],
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
        if self._batch is None or not _is_causal(layer):
            assert self.copies is None, "native attention needs the rows of all requests"
            return native(q, k, v, layer, batch, save)
        if self._blocks is None:
            self._blocks = self._lay_out()
        if save and k is not None and v is not None:
            self._save(k, v, layer, batch.out_cache_loc)
        pool, heads = self.token_to_kv_pool, layer.tp_q_head_num
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

    def _save(self, k: torch.Tensor, v: torch.Tensor, layer: Any, slots: torch.Tensor) -> None:
        """Into the ``slots`` of all requests, [T]."""
        if self.copies is not None:
            k, v = (part.index_select(0, self.copies.source) for part in (k, v))
        self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(slots, None), k, v)


def share_prompts(model: Any) -> None:
    """From here on the layers of ``model`` compute the equal prompts of a step once, if it is one
    that peergrad trains: of another, layers may look at more than a token, its position and what is
    before it, and something may count on rows for all tokens."""
    told = get_exec().features.enable_return_routed_experts  # of every row
    plain = model.pp_group.world_size == 1 and not get_lora().enable_lora and not told
    if type(model) in EntryClass and plain:
        share_rows(model.model)
        log.info("equal prompts of a step are computed once")


def share_rows(decoder: torch.nn.Module) -> None:
    """Let the rows of copies pass by the layers of ``decoder``."""
    decoder.register_forward_pre_hook(_leave_out_copies)
    decoder.register_forward_hook(_fill_in_copies)


def _leave_out_copies(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The decoder's inputs, without the rows of copies."""
    tokens, positions, batch, *others = inputs
    backend = get_attn_backend()
    if not isinstance(backend, CpuAttentionBackend) or others != [None] * len(others):
        return None  # embeddings in place of tokens, for one
    if (copies := backend.share(batch, tokens)) is None:
        return None
    return tokens[copies.rows], positions[copies.rows], batch, *others


def _fill_in_copies(
    _: torch.nn.Module, __: tuple[Any, ...], hidden: torch.Tensor
) -> torch.Tensor | None:
    """Hidden states of all rows, [T, hidden]; None: as they are."""
    copies = getattr(get_attn_backend(), "copies", None)
    return None if copies is None else hidden.index_select(0, copies.source)


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
