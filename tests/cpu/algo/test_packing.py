"""Packing: every scored token once, predicted from the position before it, whatever the
division."""

import itertools
from enum import Enum

import numpy as np
import pytest
import torch

from peergrad.algo.packing import (
    MicroBatch,
    Sample,
    balance,
    fill,
    make_samples,
    micro_batches,
    pack,
    with_logprobs,
)
from peergrad.config import Aggregation
from peergrad.data import Group, Prompt, Rollout


def new_sample(prompt: list[int], answer: list[int], weight: float = 0.5) -> Sample:
    logprobs = -np.array(answer, np.float32) / 10
    tokens = np.array([*prompt, *answer], np.int32)
    return Sample(tokens, len(prompt), logprobs, advantage=float(sum(answer)), weight=weight)


def random_samples(count: int, seed: int, longest: int = 12) -> list[Sample]:
    """Answers of 0 to ``longest`` tokens; no two scored tokens of all samples are the same."""
    rng = np.random.default_rng(seed)
    names = itertools.count(1000)
    return [
        new_sample(
            list(range(1, 1 + rng.integers(1, longest))),
            list(itertools.islice(names, int(rng.integers(0, longest + 1)))),
            weight=float(rng.uniform()),
        )
        for _ in range(count)
    ]


def scored(batches: list[MicroBatch]) -> list[int]:
    return sorted(t for batch in batches for t in batch.targets.tolist())


def test_one_sample_as_documented() -> None:
    batch = pack([new_sample([5, 3], [7, 1])])
    assert batch.tokens.tolist() == [5, 3, 7, 1]
    assert batch.rows.tolist() == [1, 2]  # 3 predicts 7, 7 predicts 1
    assert batch.targets.tolist() == [7, 1]
    assert batch.cu_seqlens.tolist() == [0, 4]
    assert batch.max_seqlen == 4


def test_two_samples_and_padding() -> None:
    batch = pack([new_sample([5, 3], [7, 1], weight=0.25), new_sample([8], [2, 2, 9])], multiple=6)
    assert batch.tokens.tolist() == [5, 3, 7, 1, 8, 2, 2, 9, 0, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 4, 8, 12]
    assert batch.max_seqlen == 4
    assert batch.rows.tolist() == [1, 2, 4, 5, 6]
    assert batch.targets.tolist() == [7, 1, 2, 2, 9]
    assert batch.advantage.tolist() == [8, 8, 13, 13, 13]
    assert batch.weight.tolist() == [0.25, 0.25, 0.5, 0.5, 0.5]
    expected = torch.tensor([-0.7, -0.1, -0.2, -0.2, -0.9])
    torch.testing.assert_close(batch.logp_engine, expected, rtol=0, atol=0)
    assert batch.logp_old is None and batch.logp_ref is None
    for name, dtype in (("tokens", torch.int64), ("cu_seqlens", torch.int32)):
        assert getattr(batch, name).dtype == dtype
    for name in ("advantage", "weight", "logp_engine"):
        assert getattr(batch, name).dtype == torch.float32


def test_padding_counts_as_the_longest_sequence_if_it_is() -> None:
    assert pack([new_sample([5], [7])], multiple=9).max_seqlen == 7


@pytest.mark.parametrize("multiple", [1, 4])
def test_no_samples_give_a_row_of_padding(multiple: int) -> None:
    batch = pack([], multiple=multiple)
    assert batch.tokens.tolist() == [0] * multiple
    assert batch.cu_seqlens.tolist() == [0, multiple]
    assert batch.rows.shape == batch.targets.shape == batch.weight.shape == (0,)


def test_an_answer_without_tokens_is_not_scored() -> None:
    batch = pack([new_sample([5, 3], []), new_sample([6], [2])])
    assert batch.tokens.tolist() == [5, 3, 6, 2]
    assert batch.rows.tolist() == [2]
    assert batch.targets.tolist() == [2]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("multiple", [1, 2, 7, 16])
def test_every_scored_token_is_predicted_from_the_position_before(seed: int, multiple: int) -> None:
    samples = random_samples(9, seed)
    batch = pack(samples, multiple=multiple)
    assert batch.tokens.numel() % multiple == 0
    assert batch.tokens.numel() - sum(s.tokens.size for s in samples) < multiple
    assert torch.equal(batch.tokens[batch.rows + 1], batch.targets)
    # Row and target lie in the same sequence: the target is no sequence's first token.
    assert not set((batch.rows + 1).tolist()) & set(batch.cu_seqlens.tolist())
    answers = np.concatenate([s.tokens[s.prompt_length :] for s in samples])
    assert batch.targets.tolist() == answers.tolist()
    starts = batch.cu_seqlens.long()
    counted = [torch.arange(int(n)) for n in starts.diff()]
    assert torch.equal(batch.positions, torch.cat(counted))
    assert starts[-1] == batch.tokens.numel() and batch.max_seqlen == starts.diff().max()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("parts", [1, 2, 3, 8, 50])
def test_balance(seed: int, parts: int) -> None:
    samples = random_samples(30, seed)
    shares = balance(samples, parts)
    assert len(shares) == parts
    assert sorted(id(s) for share in shares for s in share) == sorted(map(id, samples))
    loads = [sum(s.tokens.size for s in share) for share in shares]
    # Longest first to the least loaded: no two loads differ by more than the longest sample.
    assert max(loads) - min(loads) <= max(s.tokens.size for s in samples)
    again = balance(samples, parts)
    assert [[id(s) for s in share] for share in again] == [[id(s) for s in x] for x in shares]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [1, 10, 24, 100, 10**6])
def test_fill(seed: int, budget: int) -> None:
    samples = random_samples(30, seed)
    bins = fill(samples, budget)
    assert sorted(id(s) for part in bins for s in part) == sorted(map(id, samples))
    loads = [sum(s.tokens.size for s in part) for part in bins]
    assert all(load <= budget or len(part) == 1 for load, part in zip(loads, bins, strict=True))
    # First fit: no two bins would fit into one.
    assert all(a + b > budget for a, b in itertools.combinations(loads, 2))


def test_fill_by_hand() -> None:
    sizes = [3, 9, 4, 6, 12, 1]  # budget 10 -> 12 | 9, 1 | 6, 4 | 3
    samples = [new_sample([1], [2] * (n - 1)) for n in sizes]
    bins = [[s.tokens.size for s in part] for part in fill(samples, 10)]
    assert bins == [[12], [9, 1], [6, 4], [3]]


@pytest.mark.parametrize(("count", "ranks", "budget"), [(13, 4, 16), (3, 4, 100), (40, 3, 30)])
def test_ranks_have_equal_counts_and_each_sample_once(count: int, ranks: int, budget: int) -> None:
    samples = random_samples(count, seed=count)
    divided = [
        micro_batches(samples, rank=rank, ranks=ranks, budget=budget, multiple=2)
        for rank in range(ranks)
    ]
    assert len({len(batches) for batches in divided}) == 1
    everything = [batch for batches in divided for batch in batches]
    assert scored(everything) == scored([pack(samples)])
    assert all(batch.tokens.numel() % 2 == 0 for batch in everything)
    longest = max(s.tokens.size for s in samples)
    assert all(batch.tokens.numel() <= max(budget, longest) + 1 for batch in everything)


def test_no_samples_at_all_are_one_micro_batch() -> None:
    assert [b.tokens.numel() for b in micro_batches([], rank=1, ranks=2, budget=8)] == [1]


def test_with_logprobs() -> None:
    batches = [pack([new_sample([1], [2, 3])]), pack([new_sample([1], [4])])]
    values = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])]
    filled = with_logprobs(batches, "logp_ref", values)
    assert [b.logp_ref.tolist() for b in filled if b.logp_ref is not None] == [[-1, -2], [-3]]
    assert all(b.logp_old is None for b in filled)
    assert all(b.logp_ref is None for b in batches)  # the old ones are as they were
    with pytest.raises(ValueError):
        with_logprobs(batches, "logp_ref", values[:1])


# --- from groups ---------------------------------------------------------------------------------


def new_group(name: str, rewards: list[float], lengths: list[int], first: int = 1000) -> Group:
    names = itertools.count(first)
    rollouts = []
    for reward, length in zip(rewards, lengths, strict=True):
        tokens = np.array(list(itertools.islice(names, length)), np.int32)
        logprobs = (-1 / tokens).astype(np.float32)
        rollouts.append(Rollout(tokens, logprobs, ((0, 0, length),), "stop", "", reward))
    return Group(name, Prompt(name, np.array([4, 2], np.int32), "", ""), tuple(rollouts))


def samples_of(groups: list[Group], mode: Enum) -> list[Sample]:
    return make_samples(groups, scale_by_std=True, std_eps=0.0, aggregation=mode, max_tokens=5)


def test_make_samples_by_hand() -> None:
    groups = [new_group("a", [1, 0, 0, 0], [2, 1, 0, 1]), new_group("b", [1, 1], [3, 1])]
    samples = samples_of(groups, Aggregation.token_mean)
    # Group a: mean .25, std .5. Group b teaches nothing. N = 2 + 1 + 0 + 1 + 3 + 1 = 8.
    assert [s.advantage for s in samples] == [1.5, -0.5, -0.5, -0.5, 0, 0]
    assert [s.weight for s in samples] == [1 / 8, 1 / 8, 0, 1 / 8, 1 / 8, 1 / 8]
    assert samples[0].tokens.tolist() == [4, 2, 1000, 1001]
    assert all(s.prompt_length == 2 for s in samples)
    # B = 6: the empty rollout and the flat group count.
    weights = [s.weight for s in samples_of(groups, Aggregation.seq_mean_token_mean)]
    assert weights == [1 / 12, 1 / 6, 0, 1 / 6, 1 / 18, 1 / 6]


@pytest.mark.parametrize("mode", Aggregation)
def test_any_division_of_the_work_gives_the_same_sum(mode: Enum) -> None:
    """sum of weight * x over all scored tokens, for any ranks and budget: the loss in short."""
    rng = np.random.default_rng(0)
    groups = [
        new_group(str(i), list(rng.uniform(size=4)), list(rng.integers(0, 20, 4)), 1000 * i + 1000)
        for i in range(6)
    ]
    samples = samples_of(groups, mode)

    def total(batches: list[MicroBatch]) -> float:
        return sum(
            float((b.weight.double() * b.advantage.double() * b.targets.double().sin()).sum())
            for b in batches
        )

    expected = sum(
        s.weight * s.advantage * float(np.sin(s.tokens[2:].astype(float)).sum()) for s in samples
    )
    assert abs(expected) > 0.01
    for ranks, budget, multiple in itertools.product((1, 2, 3, 7), (8, 30, 1000), (1, 4)):
        batches = [
            batch
            for rank in range(ranks)
            for batch in micro_batches(
                samples, rank=rank, ranks=ranks, budget=budget, multiple=multiple
            )
        ]
        assert total(batches) == pytest.approx(expected, rel=1e-5)
