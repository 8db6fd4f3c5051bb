"""The CPU server's attention, against a plain float64 softmax over each request by itself."""

import numpy as np
import pytest
import torch

from peergrad.rollout import cpu_attention
from peergrad.rollout.cpu_attention import Scratch, attend, lay_out

CONTEXT = 700
NO_NUMBER = float("nan")


class Cache:
    """A paged cache with the tokens of some requests in random places, and not a number wherever
    none of them is."""

    def __init__(self, ends, *, heads, width, value_width=None, dtype=torch.float32):
        generator = torch.Generator().manual_seed(7)
        places = torch.randperm(sum(ends) + 50, generator=generator)
        self.keys = torch.full((len(places), heads, width), NO_NUMBER, dtype=dtype)
        self.values = torch.full((len(places), heads, value_width or width), NO_NUMBER, dtype=dtype)
        # Requests stand in any row of the table; what is behind a request's end is another's.
        self.requests = torch.randperm(len(ends) + 3, generator=generator)[: len(ends)]
        self.table = torch.full((len(ends) + 3, CONTEXT), len(places) - 1, dtype=torch.int32)
        self.slots = places[: sum(ends)].split(list(ends))
        for request, slots in zip(self.requests, self.slots, strict=True):
            self.table[request, : len(slots)] = slots.int()
            for cache in (self.keys, self.values):
                cache[slots] = torch.randn(
                    len(slots), *cache.shape[1:], generator=generator, dtype=torch.float64
                ).to(dtype)


def oracle(cache, queries, prefix, fresh, scale):
    """[tokens, H, D'], in float64."""
    group = queries.shape[1] // cache.keys.shape[1]
    rows = []
    for slots, before, part in zip(cache.slots, prefix, queries.double().split(fresh), strict=True):
        k = cache.keys[slots].double().repeat_interleave(group, dim=1)
        v = cache.values[slots].double().repeat_interleave(group, dim=1)
        for position, query in enumerate(part, start=before):
            scores = torch.einsum("hd,lhd->hl", query, k[: position + 1]) * scale
            rows.append(torch.einsum("hl,lhd->hd", scores.softmax(-1), v[: position + 1]))
    return torch.stack(rows)


def gap(prefix, fresh, *, heads=6, key_heads=3, width=8, value_width=None, dtype=torch.float32):
    """Largest difference to the oracle."""
    ends = [before + new for before, new in zip(prefix, fresh, strict=True)]
    cache = Cache(ends, heads=key_heads, width=width, value_width=value_width, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(sum(fresh), heads, width, generator=generator).to(dtype)
    blocks = lay_out(
        cache.table,
        cache.requests,
        np.array(prefix),
        np.array(fresh),
        token_bytes=key_heads * width * cache.keys.element_size(),
    )
    out = torch.full((sum(fresh), heads, value_width or width), NO_NUMBER, dtype=dtype)
    scratch = (Scratch(), Scratch())
    for _ in range(2):  # the second layer has kept masks and memory
        attend(queries, cache.keys, cache.values, blocks, scratch, scale=0.3, out=out)
    return (out.double() - oracle(cache, queries, prefix, fresh, 0.3)).abs().max().item()


LENGTHS = [1, 1, 2, 3, 5, 8, 8, 8, 40, 41, 90, 600, 2, 7]
BATCHES = {
    "decode": ([n - 1 for n in LENGTHS], [1] * len(LENGTHS)),
    "decode, alike": ([4] * 9, [1] * 9),
    "prompts": ([0] * len(LENGTHS), LENGTHS),
    "prompts, alike": ([0] * 5, [6] * 5),
    "prefix hits": ([0, 5, 64, 64, 64, 500, 1], [9, 1, 3, 4, 70, 2, 1]),
    "mixed with decoding": ([0, 30, 31, 0, 200, 7], [40, 1, 1, 3, 1, 1]),
    "one": ([0], [1]),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "heads",
    [
        {},
        {"key_heads": 6},
        {"key_heads": 1, "width": 5},
        {"heads": 4, "key_heads": 2, "value_width": 12},  # keys wider than values, as in MLA
    ],
    ids=["grouped", "one key each", "one key for all", "values of another width"],
)
def test_every_request_sees_its_own_context(batch, heads):
    assert gap(*BATCHES[batch], **heads) < 2e-6


@pytest.mark.parametrize("batch", BATCHES)
def test_memory_is_bounded_and_nothing_changes(batch, monkeypatch):
    """Blocks of a few tokens, pieces of long prompts."""
    monkeypatch.setattr(cpu_attention, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(cpu_attention, "BLOCK_SCORES", 64)
    monkeypatch.setattr(cpu_attention, "MIN_QUERIES", 5)
    monkeypatch.setattr(cpu_attention, "KEPT_SCORES", 20)
    assert gap(*BATCHES[batch]) < 2e-6


@pytest.mark.parametrize("batch", BATCHES)
def test_half_precision(batch):
    assert gap(*BATCHES[batch], dtype=torch.bfloat16) < 4e-2


def blocks_of(prefix, fresh, token_bytes=256):
    ends = np.array(prefix) + fresh
    table = torch.zeros(len(ends), int(ends.max()), dtype=torch.int32)
    return lay_out(
        table, torch.arange(len(ends)), np.array(prefix), np.array(fresh), token_bytes=token_bytes
    )


def test_a_group_of_short_prompts_is_one_block_without_a_mask():
    (block,) = blocks_of([5] * 1024, [1] * 1024)
    assert block.mask(torch.float32) is None
    assert block.slots.shape == (1024, 6)


def test_one_long_request_does_not_widen_the_short_ones():
    blocks = blocks_of([9] * 100 + [30_000], [1] * 101)
    assert sorted(tuple(block.slots.shape) for block in blocks) == [(1, 30_001), (100, 10)]


def test_no_block_holds_the_scores_of_a_whole_long_prompt():
    blocks = blocks_of([0], [30_000])
    assert sum(block.rows.numel() for block in blocks) == 30_000
    assert max(block.rows.shape[1] * block.slots.shape[1] for block in blocks) <= 2 * (1 << 20)


def test_padding_is_at_most_a_third_of_long_contexts():
    ends = np.random.default_rng(0).integers(64, 2000, size=500)
    blocks = blocks_of(ends - 1, np.ones_like(ends))
    assert sum(block.slots.numel() for block in blocks) < 1.34 * ends.sum()
    assert max(block.slots.numel() for block in blocks) * 256 <= cpu_attention.BLOCK_BYTES
