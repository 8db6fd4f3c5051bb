"""Equal prompts of a step: which they are, and that a decoder that leaves them out computes and
caches what it computes with them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from peergrad.rollout.cpu_copies import find_copies

HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def found(requests, prefix=None):
    """Of requests given as lists of new tokens."""
    tokens = np.array([token for request in requests for token in request])
    fresh = np.array([len(request) for request in requests])
    return find_copies(tokens, np.array(prefix or [0] * len(requests)), fresh)


def test_the_first_of_equal_prompts_is_computed():
    copies = found([(5, 9), (7,), (5, 9), (5,), (7,)])
    assert copies.requests.tolist() == [0, 1, 3]
    assert copies.rows.tolist() == [0, 1, 2, 5]
    assert copies.source.tolist() == [0, 1, 2, 0, 1, 3, 2]


def test_prompts_that_all_differ_are_left_alone():
    assert found([(5, 9), (9, 5), (5,), (5, 9, 9)]) is None


def test_what_follows_something_cached_is_no_copy():
    """Equal new tokens after other ones, or in other places, are others."""
    assert found([(5,), (5,), (5,)], prefix=[3, 0, 4]) is None
    copies = found([(5,), (5,), (5,)], prefix=[0, 7, 0])
    assert copies.requests.tolist() == [0, 1]
    assert copies.source.tolist() == [0, 1, 0]


def test_every_token_is_found_where_its_like_is_computed():
    random = np.random.default_rng(3)
    for _ in range(50):
        prompts = [random.integers(0, 3, random.integers(1, 5)).tolist() for _ in range(6)]
        requests = [prompts[random.integers(6)] for _ in range(9)]
        prefix = random.integers(0, 2, 9).tolist()
        tokens = np.concatenate(requests)
        copies = found(requests, prefix)
        different = {i if prefix[i] else tuple(request) for i, request in enumerate(requests)}
        if copies is None:
            assert len(different) == 9
            continue
        assert len(copies.requests) == len(different)
        place = np.concatenate([np.arange(len(request)) for request in requests])
        cached = np.repeat(prefix, [len(request) for request in requests])
        for of_token in (tokens, place, cached):
            assert np.array_equal(of_token[copies.rows][copies.source], of_token)


class Decoder(torch.nn.Module):
    """Attention alone, to what tokens and positions say; keeps count of the rows that it sees."""

    def __init__(self, backend):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = torch.nn.Embedding(50, (HEADS + 2 * KEY_HEADS) * WIDTH)
        self.backend = backend
        self.rows = []

    def forward(self, tokens, positions, batch, embeddings):
        self.rows.append(len(tokens))
        x = self.embedding(tokens) * (1 + positions[:, None] / 10)
        sizes = [HEADS * WIDTH, KEY_HEADS * WIDTH, KEY_HEADS * WIDTH]
        q, k, v = (part.view(len(tokens), -1, WIDTH) for part in x.split(sizes, -1))
        attention = self.backend.forward_extend
        if batch.forward_mode.is_decode():
            attention = self.backend.forward_decode
        return attention(q, k, v, LAYER, batch)


LAYER = SimpleNamespace(
    layer_id=0,
    tp_q_head_num=HEADS,
    qk_head_dim=WIDTH,
    v_head_dim=WIDTH,
    scaling=WIDTH**-0.5,
    logit_cap=0.0,
    sliding_window_size=None,
    is_cross_attention=False,
    k_scale=None,
    v_scale=None,
)


@pytest.fixture
def steps():
    """Runs a prompt step of ``requests`` and one more token of each, with or without sharing; gives
    what the decoder gives, what is in the cache afterwards, and the rows that the decoder saw."""
    pytest.importorskip("sglang")
    from sglang.srt.layers.radix_attention import AttentionType
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    from peergrad.rollout import cpu_backend

    LAYER.attn_type = AttentionType.DECODER

    def step(backend, decoder, requests, prefix, rows):
        fresh = torch.tensor([len(request) for request in requests])
        prefix = torch.tensor(prefix)
        positions = torch.cat([torch.arange(p, p + f) for p, f in zip(prefix, fresh, strict=True)])
        owner = rows.repeat_interleave(fresh)
        batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE if prefix.any() else ForwardMode.EXTEND,
            encoder_lens=None,
            seq_lens=prefix + fresh,
            extend_prefix_lens=prefix,
            extend_seq_lens=fresh,
            req_pool_indices=rows,
            out_cache_loc=backend.req_to_token_pool.req_to_token[owner, positions].long(),
        )
        backend.init_forward_metadata(batch)
        tokens = torch.tensor([token for request in requests for token in request])
        with forward_context(ForwardContext(backend)), torch.no_grad():
            return decoder(tokens, positions, batch, None)

    def run(requests, shared):
        table = ReqToTokenPool(10, 16, "cpu", enable_memory_saver=False)
        places = torch.randperm(160, generator=torch.Generator().manual_seed(5)).int()
        table.req_to_token[:10] = places.view(10, 16)
        pool = MHATokenToKVPool(
            160, 1, torch.float32, KEY_HEADS, WIDTH, 1, "cpu", enable_memory_saver=False
        )
        runner = SimpleNamespace(device="cpu", req_to_token_pool=table, token_to_kv_pool=pool)
        backend = cpu_backend.CpuAttentionBackend(runner)
        decoder = Decoder(backend)
        if shared:
            cpu_backend.share_rows(decoder)
        rows = torch.randperm(10, generator=torch.Generator().manual_seed(2))[: len(requests)]
        prompts = step(backend, decoder, requests, [0] * len(requests), rows)
        lengths = [len(request) for request in requests]
        answers = step(backend, decoder, [[3 + i] for i in range(len(requests))], lengths, rows)
        return prompts, answers, pool.get_key_buffer(0), pool.get_value_buffer(0), decoder.rows

    return run


def test_a_decoder_without_the_copies_computes_and_caches_the_same(steps):
    requests = [(5, 9, 4), (7,), (5, 9, 4), (5, 9), (7,), (5, 9, 4)]
    *alone, rows = steps(requests, shared=False)
    *together, fewer = steps(requests, shared=True)
    assert (rows, fewer) == ([13, 6], [6, 6])
    for one, other in zip(alone, together, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
        assert one.abs().sum() > 1
