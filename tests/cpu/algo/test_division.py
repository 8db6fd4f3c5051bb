"""Division of the work: every sample once, within the budget, near-equal over ranks."""

import itertools

import numpy as np
import pytest

from peergrad.algo.division import KEYS, Cost, Family, balance, divide, fill
from peergrad.algo.packing import pack
from peergrad.algo.samples import Sample
from tests.samples import new_sample, random_samples, scored_tokens


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
    divided = divide(samples, ranks=ranks, budget=budget).bins
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
    assert divide(samples, ranks=1, budget=100).bins == [[[1]]]
    # and take no room: with budget 2 a rank has one micro-batch, the other an empty one
    assert divide(samples, ranks=2, budget=2).bins == [[[1]], [[]]]
    # as many as the schedule takes at a time
    assert divide(samples, ranks=2, budget=2, multiple=2).bins == [[[1], []], [[], []]]
    assert len(divide([samples[1]] * 5, ranks=1, budget=1, multiple=3).bins[0]) == 6


def test_padding_counts_for_the_budget() -> None:
    """Five tokens are eight where every sequence is a multiple of four."""
    samples = [new_sample([1] * 5, [2])] * 4
    assert [len(part) for part in divide(samples, ranks=1, budget=16).bins[0]] == [3, 1]
    assert [len(part) for part in divide(samples, ranks=1, budget=16, each=4).bins[0]] == [2, 2]


@pytest.mark.parametrize("samples", [[], [new_sample([1], [2], 0.0)]])
def test_nothing_to_learn_from_is_one_empty_micro_batch(samples: list[Sample]) -> None:
    assert divide(samples, ranks=2, budget=8).bins == [[[]], [[]]]


def tokens(samples: list[Sample], division: list[list[list[int]]], *, share: bool) -> list[int]:
    """Of each rank."""
    rows = [[[samples[i] for i in part] for part in bins if part] for bins in division]
    return [sum(pack(row, share=share).tokens.numel() for row in part) for part in rows]


def family(prompt: int, longer: dict[int, int]) -> Family:
    """Of one sample for each answer: sample -> tokens."""
    return Family(prompt, tuple((i,) for i in longer), tuple(longer.values()))


def test_the_size_of_a_family_by_hand() -> None:
    assert Family(prompt=8, members=((3, 4), (5,)), longer=(2, 4)).size == 14  # as documented
    assert family(8, dict.fromkeys(range(4), 1)).size == 12  # 36 keys are fewer than 4 * 12
    assert family(8, dict.fromkeys(range(40), 1)).size == 90  # 360 keys, not 4 * 48
    assert family(8, dict.fromkeys(range(40), 0)).size == 8  # only the prompt attends


def test_the_work_of_a_family_by_hand() -> None:
    one = Family(prompt=8, members=((3, 4), (5,)), longer=(2, 4), scored=(5, 5))
    assert one.work(Cost()) == 14
    assert one.work(Cost(pair=0.5, scored=2.0)) == 14 + 97 / 2 + 20  # as documented, and ten scored


def test_long_sequences_are_more_work_than_their_tokens() -> None:
    """One of 100 has 5050 pairs, ten of 10 have 550: at 100 pairs a token 150.5 and 105.5."""
    samples = [new_sample([1] * 50, [2] * 51), *[new_sample([1] * 5, [2] * 6)] * 12]
    even = divide(samples, ranks=2, budget=100)
    assert [sum(map(len, bins)) for bins in even.bins] == [2, 11]  # 110 tokens each
    assert even.loads == [110, 110] and even.imbalance == 1
    fair = divide(samples, ranks=2, budget=100, cost=Cost(pair=0.01))
    assert [sum(map(len, bins)) for bins in fair.bins] == [1, 12]  # rather than 161.05 and 116.05
    assert fair.loads == pytest.approx([150.5, 126.6])
    assert fair.imbalance == pytest.approx(150.5 / 138.55)
    assert divide([], ranks=2, budget=8).imbalance == 1


def test_logits_are_work_too() -> None:
    """Nine tokens each, of which one answer has nine scored and the others have one."""
    samples = [new_sample([1], [2] * 9), *[new_sample([1], [3] * 9, [0.0] * 8 + [1.0])] * 2]
    assert divide(samples, ranks=2, budget=9, cost=Cost(scored=1.0)).loads == [18, 20]
    assert divide(samples, ranks=2, budget=9).loads == [18, 9]


def test_cutting_a_family_by_hand() -> None:
    whole = family(10, {4: 6, 5: 9, 6: 2, 7: 7})  # 34 tokens
    assert whole.cut(34.0, budget=34) == [whole]
    # in two, longest first to the emptier part: 9, then 7 and 6, then 2 beside the 9
    halves = [family(10, {5: 9, 6: 2}), family(10, {7: 7, 4: 6})]
    assert whole.cut(33.0, budget=34) == halves
    assert whole.cut(34.0, budget=23) == halves  # of 21 and 23 tokens
    thirds = [family(10, {5: 9}), family(10, {7: 7}), family(10, {4: 6, 6: 2})]
    assert whole.cut(34.0, budget=22) == thirds
    assert [part.members for part in whole.cut(34.0, budget=10)] == [((i,),) for i in range(4, 8)]


def test_equal_answers_are_never_parted() -> None:
    """Of an answer the last token is not needed, so that these are 1, none, 4 and 6."""
    answers = [[1, 2], [1, 3], [1], [4, 5], [1, 2], [4, 5], [6, 7], [1, 9]]
    samples = [new_sample([p] * 3, answer) for p in (5, 8) for answer in answers]
    one = [0, 1, 4, 7, 2, 3, 5, 6]
    other = [i + 8 for i in one]
    assert divide(samples, ranks=2, budget=6, share=True).bins == [[one], [other]]
    assert divide(samples, ranks=1, budget=12, share=True).bins == [[one + other]]
    # of 5 and 4 tokens
    assert divide(samples[:8], ranks=1, budget=5, share=True).bins == [[[0, 1, 4, 7, 6], [3, 5, 2]]]


def test_answers_to_one_prompt_stay_together_where_that_is_less_work() -> None:
    """Three prompts with four answers of 4, of which 3 are needed, on two ranks."""

    def samples(prompt: int) -> list[Sample]:
        pairs = itertools.product((5, 6, 7), range(4))
        return [new_sample([p] * prompt, [i, 2, 3, 4]) for p, i in pairs]

    # 22 each: 44 and 22. In halves of 16: 48 and 48.
    whole = divide(samples(10), ranks=2, budget=100, share=True).bins
    assert whole == [[[0, 1, 2, 3, 8, 9, 10, 11]], [[4, 5, 6, 7]]]
    # 15 each: 30 and 15. In halves of 9: 27 and 27; in quarters of 6: 36 and 36.
    halves = divide(samples(3), ranks=2, budget=100, share=True).bins
    assert halves == [[[0, 2, 4, 6, 8, 10]], [[1, 3, 5, 7, 9, 11]]]
    assert tokens(samples(3), halves, share=True) == [27, 27]


def test_one_long_prompt_is_divided_among_the_ranks() -> None:
    """Together 400 + 8 * 9 tokens on one rank; in two parts 400 + 4 * 9 on each."""
    samples = [new_sample([5] * 400, [i] * 10) for i in range(8)]
    divided = divide(samples, ranks=2, budget=1000, share=True).bins
    assert divided == [[[0, 2, 4, 6]], [[1, 3, 5, 7]]]
    assert divide(samples, ranks=1, budget=1000, share=True).bins == [[list(range(8))]]
    # 3 * 409 keys are within four times the budget, 4 * 409 are not
    bins = divide(samples, ranks=1, budget=430, share=True).bins[0]
    assert sorted(map(len, bins)) == [2, 3, 3]


@pytest.mark.parametrize("seed", range(12))
def test_sharing_divides_as_well_and_leaves_less_to_do(seed: int) -> None:
    rng = np.random.default_rng(seed)
    peers, ranks, budget = (int(rng.integers(*x)) for x in ((1, 40), (1, 5), (10, 200)))
    samples = random_samples(120, seed, longest=int(rng.integers(3, 40)), peers=peers)
    divided = divide(samples, ranks=ranks, budget=budget, share=True).bins
    assert len(divided) == ranks and len({len(bins) for bins in divided}) == 1
    parts = [part for bins in divided for part in bins]
    active = [i for i, s in enumerate(samples) if s.weight.any()]
    assert sorted(i for part in parts for i in part) == active
    assert divided == divide(samples, ranks=ranks, budget=budget, share=True).bins
    for part in filter(None, parts):
        batch = pack([samples[i] for i in part], share=True)
        keys = sum(p * max(1, len(more)) + sum(more) for p, *more in batch.families)
        fits = batch.tokens.numel() <= budget and keys <= KEYS * budget
        assert fits or (len(batch.families) == 1 and len(batch.families[0]) == 1)
    alone = tokens(samples, divide(samples, ranks=ranks, budget=budget).bins, share=False)
    together = tokens(samples, divided, share=True)
    assert max(together) <= max(alone) and sum(together) <= sum(alone)
    if peers > 8 and budget > 100:
        assert max(together) < 0.9 * max(alone)
