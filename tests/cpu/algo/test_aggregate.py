"""Token weights by hand, and the loss they add up to against the modes' definitions."""

import random

import pytest
import torch

from peergrad.algo.aggregate import token_weights
from peergrad.config import Aggregation, Denominator

ALL, KEPT = Denominator.all, Denominator.kept
MODES = list(Aggregation)
SEQ_MEAN, TOKEN_MEAN, GROUP_MEAN, SEQ_SUM, CONST = MODES


def weights(
    sampled: list[int],
    kept: list[int],
    group: list[int],
    mode: Aggregation,
    denominator: Denominator,
    max_tokens: int = 5,
) -> list[float]:
    found = token_weights(
        torch.tensor(sampled, dtype=torch.int64),
        torch.tensor(kept, dtype=torch.int64),
        torch.tensor(group, dtype=torch.int64),
        mode=mode,
        denominator=denominator,
        max_tokens=max_tokens,
    )
    # 1 / N of millions of tokens must still sum to 1
    assert not sampled or found.dtype == torch.float64
    return found.tolist()


# Two whole groups and one that is dropped as a whole; one answer without a token.
SAMPLED, SOME, GROUP = [4, 2, 0, 3, 1], [2, 1, 0, 2, 0], [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("mode", "denominator", "expected"),
    [
        # B = 4 (the empty answer counts nowhere), N = 10, P = 3, N_g = 6, 3, 1
        (SEQ_MEAN, ALL, [1 / 16, 1 / 8, 0, 1 / 12, 0]),  # 1 / (4 n)
        (TOKEN_MEAN, ALL, [1 / 10, 1 / 10, 0, 1 / 10, 0]),
        (GROUP_MEAN, ALL, [1 / 18, 1 / 18, 0, 1 / 9, 0]),  # 1 / (3 N_g)
        (SEQ_SUM, ALL, [1 / 4, 1 / 4, 0, 1 / 4, 0]),
        (CONST, ALL, [1 / 20, 1 / 20, 0, 1 / 20, 0]),  # 1 / (4 * 5)
        # B = 3, N = 5, P = 2, N_g = 3, 2
        (SEQ_MEAN, KEPT, [1 / 6, 1 / 3, 0, 1 / 6, 0]),  # 1 / (3 n)
        (TOKEN_MEAN, KEPT, [1 / 5, 1 / 5, 0, 1 / 5, 0]),
        (GROUP_MEAN, KEPT, [1 / 6, 1 / 6, 0, 1 / 4, 0]),  # 1 / (2 N_g)
        (SEQ_SUM, KEPT, [1 / 3, 1 / 3, 0, 1 / 3, 0]),
        (CONST, KEPT, [1 / 15, 1 / 15, 0, 1 / 15, 0]),  # 1 / (3 * 5)
    ],
)
def test_by_hand(mode: Aggregation, denominator: Denominator, expected: list[float]) -> None:
    assert weights(SAMPLED, SOME, GROUP, mode, denominator) == pytest.approx(expected, rel=1e-15)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def definition(
    losses: list[list[float]], n: list[int], group: list[int], mode: Aggregation, max_tokens: int
) -> float:
    """The loss of rollouts that all count, of n_i tokens each; ``losses`` of the kept ones."""
    if mode is SEQ_MEAN:
        return mean([sum(x) / m if m else 0.0 for x, m in zip(losses, n, strict=True)])
    if mode is TOKEN_MEAN:
        return sum(map(sum, losses)) / sum(n)
    if mode is GROUP_MEAN:
        parts = []
        for g in set(group):
            mine = [i for i in range(len(n)) if group[i] == g]
            tokens = sum(n[i] for i in mine)
            parts.append(sum(sum(losses[i]) for i in mine) / tokens if tokens else 0.0)
        return mean(parts)
    return mean([sum(x) for x in losses]) / (max_tokens if mode is CONST else 1)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("denominator", Denominator)
@pytest.mark.parametrize("mode", MODES)
def test_sums_to_the_definition(mode: Aggregation, denominator: Denominator, seed: int) -> None:
    """Groups of any size, in any order, with gaps in their numbers."""
    draw = random.Random(seed)
    sampled = [draw.randint(0, 6) for _ in range(9)] + [3]
    kept = [draw.randint(0, n) for n in sampled[:-1]] + [1]
    group = [draw.choice([1, 4, 5]) for _ in sampled]
    losses = [[draw.gauss(0, 1) for _ in range(k)] for k in kept]
    counts = [i for i in range(10) if (sampled if denominator is ALL else kept)[i]]
    expected = definition(
        [losses[i] for i in counts],
        [sampled[i] if denominator is ALL else kept[i] for i in counts],
        [group[i] for i in counts],
        mode,
        max_tokens=7,
    )
    found = weights(sampled, kept, group, mode, denominator, max_tokens=7)
    total = sum(w * sum(x) for w, x in zip(found, losses, strict=True))
    assert total == pytest.approx(expected, rel=1e-12, abs=1e-15)
    if denominator is KEPT and mode in (
        SEQ_MEAN,
        TOKEN_MEAN,
        GROUP_MEAN,
    ):  # a mean: weights sum to 1
        assert sum(k * w for k, w in zip(kept, found, strict=True)) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_where_everything_is_kept_the_denominators_agree(mode: Aggregation) -> None:
    lengths, group = [3, 1, 5, 2], [0, 1, 1, 1]
    both = [weights(lengths, lengths, group, mode, d) for d in (ALL, KEPT)]
    assert both[0] == both[1]
    assert min(both[0]) > 0


@pytest.mark.parametrize("mode", MODES)
def test_dropping_changes_no_other_weight_if_all_count(mode: Aggregation) -> None:
    whole = weights([3, 1, 5, 2], [3, 1, 5, 2], [0, 0, 1, 1], mode, ALL)
    part = weights([3, 1, 5, 2], [1, 0, 5, 0], [0, 0, 1, 1], mode, ALL)
    assert part == [whole[0], 0.0, whole[2], 0.0]


@pytest.mark.parametrize(
    ("sampled", "group"), [([], []), ([0], [0]), ([0, 0], [0, 1]), ([3, 4], [0, 0])]
)
@pytest.mark.parametrize("denominator", Denominator)
@pytest.mark.parametrize("mode", MODES)
def test_nothing_kept_never_divides_by_zero(
    mode: Aggregation, denominator: Denominator, sampled: list[int], group: list[int]
) -> None:
    nothing = [0] * len(sampled)
    assert weights(sampled, nothing, group, mode, denominator) == [0.0] * len(sampled)


@pytest.mark.parametrize("denominator", Denominator)
@pytest.mark.parametrize("mode", MODES)
def test_a_single_token(mode: Aggregation, denominator: Denominator) -> None:
    expected = 1 / 4 if mode is CONST else 1.0
    assert weights([1], [1], [0], mode, denominator, max_tokens=4) == [expected]
