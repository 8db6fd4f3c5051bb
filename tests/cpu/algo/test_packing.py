"""Packing: every scored token once, predicted from the position before it, whatever the
division."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum

import numpy as np
import pytest
import torch

from peergrad.algo.packing import MicroBatch, balance, divide, fill, pack
from peergrad.algo.samples import Sample, weigh
from peergrad.config import Aggregation, AlgoConfig


def new_sample(
    prompt: list[int], answer: list[int], weight: float | list[float] = 0.5, group: int = 0
) -> Sample:
    logprobs = -np.array(answer, np.float32) / 10
    return Sample(
        tokens=np.array([*prompt, *answer], np.int32),
        prompt_length=len(prompt),
        logp_engine=logprobs,
        advantage=np.array(answer, np.float32) * 10,
        weight=np.full(len(answer), weight, np.float32),
        version=np.zeros(len(answer), np.int32),
        group=group,
    )


def random_samples(count: int, seed: int, longest: int = 12) -> list[Sample]:
    """Answers of 0 to ``longest`` tokens; no two answer tokens of all samples are the same, and
    one token in five has no weight."""
    rng = np.random.default_rng(seed)
    names = itertools.count(1000)
    samples = []
    for i in range(count):
        prompt = list(range(1, 1 + rng.integers(1, longest)))
        answer = list(itertools.islice(names, int(rng.integers(0, longest + 1))))
        weight = rng.uniform(0.1, 1, len(answer)) * (rng.random(len(answer)) < 0.8)
        samples.append(new_sample(prompt, answer, weight.tolist(), group=i // 3))
    return samples


def scored_tokens(samples: Sequence[Sample]) -> list[int]:
    answers = [s.tokens[s.prompt_length :] for s in samples]
    return [int(t) for a, s in zip(answers, samples, strict=True) for t in a[s.weight != 0]]


def context(sample: Sample) -> list[int]:
    """Everything before the last scored token."""
    scored = [i for i, w in enumerate(sample.weight) if w != 0]
    return sample.tokens[: sample.prompt_length + scored[-1]].tolist() if scored else []


def test_one_sample_as_documented() -> None:
    batch = pack([new_sample([5, 3], [7, 1])])
    assert batch.tokens.tolist() == [5, 3, 7]  # 1 predicts nothing
    assert batch.rows.tolist() == [1, 2]  # 3 predicts 7, 7 predicts 1
    assert batch.targets.tolist() == [7, 1]
    assert batch.cu_seqlens.tolist() == [0, 3]
    assert batch.lengths == (3,) and batch.max_seqlen == 3


def test_two_samples_and_padding() -> None:
    """Of the second only the tokens of weight other than 0 are scored."""
    first = new_sample([5, 3], [7, 1], 0.25)
    second = new_sample([8], [2, 4, 9], [0.5, 0.0, -1.0])
    batch = pack([first, second], multiple=12)
    assert batch.tokens.tolist() == [5, 3, 7, 8, 2, 4, 0, 0, 0, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert batch.cu_seqlens.tolist() == [0, 3, 6, 12]
    assert batch.lengths == (3, 3, 6) and batch.max_seqlen == 6
    assert batch.rows.tolist() == [1, 2, 3, 5]
    assert batch.targets.tolist() == [7, 1, 2, 9]
    assert batch.sequence.tolist() == [0, 0, 1, 1]
    assert batch.sequences == 2  # the padding is none
    assert batch.advantage.tolist() == [70, 10, 20, 90]
    assert batch.weight.tolist() == [0.25, 0.25, 0.5, -1.0]
    expected = torch.tensor([-0.7, -0.1, -0.2, -0.9])
    torch.testing.assert_close(batch.logp_engine, expected, rtol=0, atol=0)
    for name in ("tokens", "positions", "rows", "targets", "sequence"):
        assert getattr(batch, name).dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    for name in ("advantage", "weight", "logp_engine"):
        assert getattr(batch, name).dtype == torch.float32


@pytest.mark.parametrize("field", ["logp_old", "logp_ref", "proximal"])
def test_what_is_known_of_every_sample_is_packed_where_scored(field: str) -> None:
    samples = [new_sample([5], [7, 1], [0.0, 1.0]), new_sample([8], [2])]
    values = [np.array([-1, -2], np.float32), np.array([-3], np.float32)]
    filled = [replace(s, **{field: v}) for s, v in zip(samples, values, strict=True)]
    assert getattr(pack(filled), field).tolist() == [-2, -3]
    others = {"logp_old", "logp_ref", "proximal"} - {field}
    assert all(getattr(pack(filled), other) is None for other in others)
    assert getattr(pack([filled[0], samples[1]]), field) is None  # not of every one


def test_a_token_without_weight_may_be_unknown() -> None:
    """Policies score the tokens that have a weight; the others are NaN, and must not matter."""
    sample = new_sample([5], [7, 1, 2], [0.5, 0.0, 0.5])
    unknown = np.array([-1, np.nan, -3], np.float32)
    batch = pack([replace(sample, logp_old=unknown, logp_engine=unknown, advantage=unknown)])
    for name in ("logp_old", "logp_engine", "advantage"):
        assert getattr(batch, name).tolist() == [-1, -3]


@pytest.mark.parametrize("multiple", [1, 4])
def test_no_samples_are_a_row_of_padding(multiple: int) -> None:
    batch = pack([], multiple=multiple)
    assert batch.tokens.tolist() == [0] * multiple
    assert batch.cu_seqlens.tolist() == [0, multiple]
    assert batch.sequences == batch.targets.numel() == batch.weight.numel() == 0
    assert batch.logp_ref is not None and batch.logp_ref.numel() == 0


def test_an_answer_without_tokens_is_a_sequence_without_scores() -> None:
    batch = pack([new_sample([5, 3], []), new_sample([8], [2])])
    assert batch.tokens.tolist() == [8]
    assert batch.rows.tolist() == [0] and batch.sequence.tolist() == [1]
    assert batch.sequences == 2


def test_what_nothing_scored_is_predicted_from_takes_no_room() -> None:
    """All behind the last scored token, and that token itself: no computation, no budget."""
    cut = new_sample([5, 3], [7, 1, 6, 4], [0.5, 0.5, 0.0, 0.0])
    batch = pack([cut, new_sample([8], [2], 0.0)])
    assert batch.tokens.tolist() == [5, 3, 7] and batch.targets.tolist() == [7, 1]
    assert batch.lengths == (3, 0) and batch.cu_seqlens.tolist() == [0, 3, 3]
    assert divide([cut, cut], ranks=1, budget=6) == [[[0, 1]]]
    assert divide([cut, cut], ranks=1, budget=5) == [[[0], [1]]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("multiple", [1, 2, 7, 16])
def test_every_scored_token_is_predicted_from_the_position_before(seed: int, multiple: int) -> None:
    samples = random_samples(9, seed)
    batch = pack(samples, multiple=multiple)
    assert batch.tokens.numel() % multiple == 0
    contexts = [context(s) for s in samples]
    assert batch.tokens.numel() - sum(map(len, contexts)) < multiple
    starts = batch.cu_seqlens.long()
    for i, tokens in enumerate(contexts):
        assert batch.tokens[starts[i] : starts[i + 1]].tolist() == tokens
    # Each row's token is followed by the target: in the row, or the row is the sequence's last.
    for row, target, i in zip(batch.rows, batch.targets, batch.sequence, strict=True):
        at, sample = int(row - starts[i]), samples[int(i)]
        assert sample.tokens[at + 1] == target and at >= sample.prompt_length - 1
    assert batch.targets.tolist() == scored_tokens(samples)
    # The sequence that is named is the one that the row lies in.
    ends = batch.cu_seqlens[1:].long()
    assert torch.equal(torch.bucketize(batch.rows, ends, right=True), batch.sequence)
    counted = [torch.arange(int(n)) for n in starts.diff()]
    assert torch.equal(batch.positions, torch.cat(counted))
    assert starts[-1] == batch.tokens.numel() and batch.max_seqlen == starts.diff().max()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("parts", [1, 2, 3, 8, 50])
def test_balance(seed: int, parts: int) -> None:
    sizes = np.random.default_rng(seed).integers(1, 25, 30).tolist()
    shares = balance(sizes, parts)
    assert len(shares) == parts
    assert sorted(i for share in shares for i in share) == list(range(30))
    loads = [sum(sizes[i] for i in share) for share in shares]
    # Longest first to the least loaded: no two loads differ by more than the longest sample.
    assert max(loads) - min(loads) <= max(sizes)
    assert balance(sizes, parts) == shares


def test_balance_by_hand() -> None:
    # 9 to the first, 6 to the second, 5 to the second (11), 4 to the first (13), 3 to the second
    assert balance([4, 9, 3, 6, 5], 2) == [[1, 0], [3, 4, 2]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [1, 10, 24, 100, 10**6])
def test_fill(seed: int, budget: int) -> None:
    rng = np.random.default_rng(seed)
    sizes, share = rng.integers(1, 25, 40).tolist(), rng.permutation(40)[:30].tolist()
    bins = fill(sizes, share, budget)
    assert sorted(i for part in bins for i in part) == sorted(share)
    loads = [sum(sizes[i] for i in part) for part in bins]
    assert all(load <= budget or len(part) == 1 for load, part in zip(loads, bins, strict=True))
    # First fit: no two bins would fit into one.
    assert all(a + b > budget for a, b in itertools.combinations(loads, 2))


def test_fill_by_hand() -> None:
    sizes = [3, 9, 4, 6, 12, 1, 10]  # budget 10, without the last -> 12 | 9, 1 | 6, 4 | 3
    assert fill(sizes, [0, 1, 2, 3, 4, 5], 10) == [[4], [1, 5], [3, 2], [0]]


@pytest.mark.parametrize(("count", "ranks", "budget"), [(13, 4, 16), (3, 4, 100), (40, 3, 30)])
def test_ranks_have_equal_counts_and_each_sample_once(count: int, ranks: int, budget: int) -> None:
    samples = random_samples(count, seed=count)
    divided = divide(samples, ranks=ranks, budget=budget)
    assert len(divided) == ranks and len({len(bins) for bins in divided}) == 1
    parts = [part for bins in divided for part in bins]
    active = [i for i, s in enumerate(samples) if s.weight.any()]
    assert sorted(i for part in parts for i in part) == active
    batches = [pack([samples[i] for i in part], multiple=2) for part in parts]
    found = sorted(t for batch in batches for t in batch.targets.tolist())
    assert found == sorted(scored_tokens(samples))
    longest = max(s.tokens.size for s in samples)
    assert all(batch.tokens.numel() <= max(budget, longest) + 1 for batch in batches)


def test_samples_without_weight_are_left_out() -> None:
    samples = [new_sample([1], [2, 3], 0.0), new_sample([1], [4]), new_sample([1], [])]
    assert divide(samples, ranks=1, budget=100) == [[[1]]]
    # and take no room: with budget 2 a rank has one micro-batch, the other an empty one
    assert divide(samples, ranks=2, budget=2) == [[[1]], [[]]]


@pytest.mark.parametrize("samples", [[], [new_sample([1], [2], 0.0)]])
def test_nothing_to_learn_from_is_one_empty_micro_batch(samples: list[Sample]) -> None:
    assert divide(samples, ranks=2, budget=8) == [[[]], [[]]]


@pytest.mark.parametrize("mode", Aggregation)
def test_any_division_of_the_work_gives_the_same_sum(mode: Enum) -> None:
    """sum of weight * x over all scored tokens, for any ranks and budget: the loss in short."""
    algo = AlgoConfig(aggregation=mode)
    samples = weigh(random_samples(24, seed=0, longest=20), algo, max_tokens=20)

    def total(batches: list[MicroBatch]) -> float:
        return sum(float((b.weight.double() * b.targets.double().sin()).sum()) for b in batches)

    expected = sum(
        float((s.weight.astype(float) * np.sin(s.tokens[s.prompt_length :].astype(float))).sum())
        for s in samples
    )
    assert abs(expected) > 0.003
    for ranks, budget, multiple in itertools.product((1, 2, 3, 7), (8, 30, 1000), (1, 4)):
        divided = divide(samples, ranks=ranks, budget=budget)
        parts = [part for bins in divided for part in bins]
        batches = [pack([samples[i] for i in part], multiple=multiple) for part in parts]
        assert total(batches) == pytest.approx(expected, rel=1e-9)
