"""Causal attention over a paged KV cache on a CPU, vectorised over requests.

A step's requests differ in length. They are sorted into blocks of like length, each one gather of
its keys and values and one ``scaled_dot_product_attention``; memory is bounded by the block,
whatever the lengths are. The blocks depend on lengths alone: they are laid out once a step, and
used by every layer.

Letters: B requests of a block, T new tokens of each (1 when decoding), L tokens of context with
them, N places of the cache, H query heads, K key heads, D width of a head.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

# A block whose keys fit the second-level cache is attended to while they are there: 22 ms instead
# of 38 for 1,024 requests of 128 tokens (4 heads of 16, float32, one core).
BLOCK_BYTES = 1 << 21
# Score of a block, T times L of all its requests: bounds the mask of long prompts.
BLOCK_SCORES = 1 << 20
MIN_QUERIES = 64  # of a long context per block: else its gather outweighs its arithmetic
KEPT_SCORES = 1 << 18  # masks up to this size are kept from layer to layer


@dataclass
class Block:
    """Requests of like length.

    Example:
        Two requests decode, with 3 and 2 tokens of context, in rows 0 and 1 of the step:
        ``Block(rows=[[0], [1]], slots=[[7, 8, 9], [4, 5, 5]], last=[[2], [1]])``.
    """

    rows: torch.Tensor  # int64 [B, T]: of the queries; shorter requests repeat their last
    slots: torch.Tensor  # int [B, L]: in the cache; shorter requests repeat their last
    last: torch.Tensor  # int64 [B, T]: the last key that a query sees
    masked: bool  # whether any query sees less than all L keys
    _mask: torch.Tensor | None = field(default=None, repr=False)

    def mask(self, dtype: torch.dtype) -> torch.Tensor | None:
        """What to add to scores, [B, 1, T, L]: 0 or minus infinity; None: nothing."""
        if not self.masked:
            return None
        if self._mask is not None and self._mask.dtype == dtype:
            return self._mask
        (batch, length), queries = self.slots.shape, self.rows.shape[1]
        later = torch.arange(length) > self.last[:, :, None]
        mask = torch.zeros(batch, queries, length, dtype=dtype)
        mask = mask.masked_fill_(later, -torch.inf)[:, None]
        if mask.numel() <= KEPT_SCORES:
            self._mask = mask
        return mask


def lay_out(
    table: torch.Tensor,
    requests: torch.Tensor,
    prefix: np.ndarray,
    fresh: np.ndarray,
    *,
    token_bytes: int,
) -> list[Block]:
    """Blocks of a step's requests, whose queries stand one request after another.

    ``table``: int [requests, context], where in the cache a request's tokens are; ``requests``:
    their rows in it; ``prefix``, ``fresh``: tokens cached before and new ones of each;
    ``token_bytes``: of one token's keys in one layer.
    """
    first = np.cumsum(fresh) - fresh
    owner, first, prefix, fresh = _split_long(first, prefix, fresh)
    ends = prefix + fresh
    width = np.frexp(fresh)[1]  # requests of a block have alike many queries, within a factor 2
    order = np.lexsort((-ends, width))
    blocks = []
    start = 0
    while start < len(order):
        rest = order[start:]
        length, queries = int(ends[rest[0]]), int(fresh[rest[0]])
        alike = (width[rest] == width[rest[0]]) & (ends[rest] >= 0.75 * length - 16)
        room = min(BLOCK_BYTES // (length * token_bytes), BLOCK_SCORES // (length * 2 * queries))
        count = min(int(alike.argmin()) or len(rest), max(1, room))
        taken = rest[:count]
        blocks.append(
            _block(table, requests[owner[taken]], first[taken], prefix[taken], fresh[taken])
        )
        start += count
    return blocks


def _split_long(
    first: np.ndarray, prefix: np.ndarray, fresh: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Long prompts in pieces, each with all before it as its prefix; ``owner`` tells whose."""
    most = np.maximum(MIN_QUERIES, BLOCK_SCORES // np.maximum(1, prefix + fresh))
    pieces = -(-fresh // most)
    owner = np.repeat(np.arange(len(fresh)), pieces)
    begin = (np.arange(len(owner)) - (np.cumsum(pieces) - pieces)[owner]) * most[owner]
    left = np.minimum(most[owner], fresh[owner] - begin)
    return owner, first[owner] + begin, prefix[owner] + begin, left


def _block(
    table: torch.Tensor,
    requests: torch.Tensor,
    first: np.ndarray,
    prefix: np.ndarray,
    fresh: np.ndarray,
) -> Block:
    ends = prefix + fresh
    length = int(ends.max())
    # A place that is not there repeats the request's own last one: what another request left in the
    # cache, were it not a number, must not get near.
    query = np.minimum(np.arange(fresh.max()), fresh[:, None] - 1)
    key = np.minimum(np.arange(length), ends[:, None] - 1)
    return Block(
        rows=torch.from_numpy(first[:, None] + query),
        slots=table[requests[:, None], torch.from_numpy(key)],
        last=torch.from_numpy(prefix[:, None] + query),
        masked=bool(query.size > len(ends) or (ends < length).any()),
    )


class Scratch:
    """Memory for the keys or values of a block, used again: a new one would cost page faults."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def gather(self, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """``cache[slots]``, [B, L, K, D] of [N, K, D]; valid until the next call."""
        flat = cache.reshape(len(cache), -1)
        size = slots.numel() * flat.shape[1] * cache.element_size()
        if size > 2 * BLOCK_BYTES or cache.element_size() < 2:  # one long request; 8-bit caches
            found = flat.index_select(0, slots.reshape(-1))
        else:
            if self._memory.numel() < size:
                self._memory = torch.empty(size, dtype=torch.uint8)
            out = self._memory[:size].view(cache.dtype).view(slots.numel(), flat.shape[1])
            found = torch.index_select(flat, 0, slots.reshape(-1), out=out)
        return found.view(*slots.shape, *cache.shape[1:])


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    blocks: list[Block],
    scratch: tuple[Scratch, Scratch],
    *,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Into ``out`` [tokens, H, D'] what ``queries`` [tokens, H, D] see in the cache.

    ``keys`` [N, K, D] and ``values`` [N, K, D'] hold the new tokens already; H is a multiple of K.
    """
    flat, result = queries.reshape(len(queries), -1), out.view(len(out), -1)
    for block in blocks:
        rows = block.rows.reshape(-1)
        asked = flat.index_select(0, rows).view(*block.rows.shape, *queries.shape[1:])
        k = scratch[0].gather(keys, block.slots).to(queries.dtype)
        v = scratch[1].gather(values, block.slots).to(queries.dtype)
        found = _attention(asked, k, v, block.mask(queries.dtype), scale)
        result.index_copy_(0, rows, found.reshape(len(rows), -1))


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """[B, T, H, D'] of q [B, T, H, D], k [B, L, K, D], v [B, L, K, D'], mask [B, 1, T, L]."""
    batch, queries, heads, _ = q.shape
    groups = heads // k.shape[2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if queries == 1:  # the query heads of a key head are as good as queries that see the same keys
        q = q.view(batch, k.shape[1], groups, -1)
        mask = None if mask is None else mask.expand(-1, -1, groups, -1)
        found = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return found.reshape(batch, 1, heads, -1)
    q = q.transpose(1, 2)
    found = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=groups > 1
    )
    return found.transpose(1, 2)
