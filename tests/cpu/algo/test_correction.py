"""Weights and masks of the engine's mismatch by hand, and m2po against its description."""

import math

import pytest
import torch
from torch import Tensor

from peergrad.algo.correction import (
    at_level,
    dppo_keep,
    m2po_keep,
    masked,
    opsm_keep,
    sequence_masked,
    truncated,
    within,
)
from peergrad.config import CorrectionLevel

INF = math.inf
DTYPES = [torch.float64, torch.float32]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (CorrectionLevel.token, [1.0, 3.0, -4.0, 5.0]),
        (CorrectionLevel.sequence, [-3.0, 8.0, -3.0, 8.0]),  # 1 - 4, 3 + 5
        (CorrectionLevel.geometric, [-1.5, 4.0, -1.5, 4.0]),
    ],
)
def test_levels(level: CorrectionLevel, expected: list[float]) -> None:
    # The sequences are interleaved, and one of the three has no token here.
    assert at_level(f64(1, 3, -4, 5), ids(0, 2, 0, 2), 3, level).tolist() == expected
    assert at_level(f64(7), ids(0), 1, level).tolist() == [7.0]
    assert at_level(f64(), ids(), 2, level).tolist() == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_bounds_belong_to_the_band(dtype: torch.dtype) -> None:
    k = torch.tensor([0.5, 2.0, 0.49, 2.01, 1.0], dtype=dtype)
    log_k = torch.cat([k.log(), torch.tensor([200.0, INF, -INF, math.nan], dtype=dtype)])
    assert log_k[:2].exp().tolist() == [0.5, 2.0]  # or the test would not test the bounds
    keep = [True, True, False, False, True, False, False, False, False]
    assert within(log_k, low=0.5, high=2.0).tolist() == keep
    assert within(log_k, low=0.0, high=2.0)[-2].item()  # k = 0 lies within 0 and 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_truncated(dtype: torch.dtype) -> None:
    log_k = torch.tensor([5, 0.3, 2, 1], dtype=dtype).log()
    tail = torch.tensor([200.0, INF, -200.0, -INF], dtype=dtype)
    found = truncated(torch.cat([log_k, tail]), low=0.0, high=2.0).tolist()
    assert found == pytest.approx([2, 0.3, 2, 1, 2, 2, 0, 0], rel=1e-6, abs=1e-80)
    found = truncated(torch.cat([log_k, tail]), low=0.5, high=2.0).tolist()
    assert found == pytest.approx([2, 0.5, 2, 1, 2, 2, 0.5, 0.5], rel=1e-6)


def test_masked_keeps_the_weight_within_the_bounds() -> None:
    log_k = torch.cat([f64(5, 0.3, 2, 0.5).log(), f64(800, INF, -INF)])
    weight, keep = masked(log_k, low=0.5, high=2.0)
    assert keep.tolist() == [False, False, True, True, False, False, False]
    assert weight[keep].tolist() == pytest.approx([2, 0.5], rel=1e-15)
    assert weight.isfinite().all()  # a dropped token's weight is still multiplied by 0


def test_sequence_masked_decides_by_the_geometric_mean_and_weighs_by_token() -> None:
    """Sequence 0: k = 8, .5, mean sqrt(4) = 2: kept, and 8 is not truncated. Sequence 1: k = 1, 9,
    mean 3: dropped though its first token is within the bounds. Sequence 2: one token, k = 1."""
    log_k = f64(8, 1, 0.5, 9, 1).log()
    weight, keep = sequence_masked(log_k, ids(0, 1, 0, 1, 2), 3, low=0.5, high=2.001)
    assert keep.tolist() == [True, False, True, False, True]
    assert weight[keep].tolist() == pytest.approx([8, 0.5, 1], rel=1e-15)
    assert weight.isfinite().all()


@pytest.mark.parametrize("bad", [(INF, 0.0), (-INF, 0.0), (INF, -INF), (math.nan, 0.0)])
def test_sequence_masked_drops_a_sequence_of_impossible_tokens(bad: tuple[float, float]) -> None:
    weight, keep = sequence_masked(f64(*bad, 0.0), ids(0, 0, 1), 2, low=0.5, high=2.0)
    assert keep.tolist() == [False, False, True]
    assert weight.isfinite().all()


def test_no_tokens() -> None:
    weight, keep = masked(f64(), low=0.5, high=2.0)
    assert weight.numel() == keep.numel() == 0
    weight, keep = sequence_masked(f64(), ids(), 3, low=0.5, high=2.0)
    assert weight.numel() == keep.numel() == 0
    assert opsm_keep(f64(), f64(), f64(), ids(), 2, delta=0.1).numel() == 0
    assert dppo_keep(f64(), f64(), f64(), bound=0.2).numel() == 0
    assert m2po_keep(f64(), threshold=0.04).numel() == 0


@pytest.mark.parametrize(
    ("p", "p_engine", "advantage", "expected"),
    [
        (0.8, 0.5, 1.0, False),  # pushed up and already .3 above
        (0.8, 0.5, -1.0, True),
        (0.8, 0.5, 0.0, True),
        (0.2, 0.5, 1.0, True),
        (0.2, 0.5, -0.01, False),  # the size of the advantage plays no part
        (0.6, 0.5, 9.0, True),
        (1.0, 0.75, 1.0, True),  # at the bound
        (0.75, 1.0, -1.0, True),
        (0.0, 0.5, -1.0, False),  # logp = -inf
        (0.0, 0.0, 1.0, True),
    ],
)
def test_dppo(p: float, p_engine: float, advantage: float, expected: bool) -> None:
    keep = dppo_keep(f64(p).log(), f64(p_engine).log(), f64(advantage), bound=0.25)
    assert keep.tolist() == [expected]


@pytest.mark.parametrize(
    ("drifts", "advantages", "expected"),
    [
        ([0.5, 0.1], [-1.0, -1.0], False),  # mean .3 above .25
        ([0.5, 0.1], [1.0, 1.0], True),
        ([0.5, 0.1], [0.0, 0.0], True),
        ([0.5, 0.0], [-1.0, -1.0], True),  # .25: at the bound
        ([-0.9, -0.9], [-1.0, -1.0], True),  # the other direction
        ([0.5, 0.1], [-2.0, 1.0], False),  # mean advantage -.5
        ([0.5, 0.1], [2.0, -1.0], True),
        ([0.3], [-1.0], False),  # a single token
        ([INF, 0.0], [-1.0, -1.0], False),  # the policy's logp is -inf
    ],
)
def test_opsm(drifts: list[float], advantages: list[float], expected: bool) -> None:
    """Next to a sequence that stays and one that goes."""
    size = len(drifts)
    keep = opsm_keep(
        f64(-1.0, *([-1.0] * size), -1.0) - f64(0.0, *drifts, 1.0),
        torch.full((size + 2,), -1.0, dtype=torch.float64),
        f64(-1.0, *advantages, -1.0),
        ids(1, *([0] * size), 2),
        3,
        delta=0.25,
    )
    assert keep.tolist() == [True, *([expected] * size), False]


@pytest.mark.parametrize(
    ("log_k", "threshold", "expected"),
    [
        ([0.1, 1, -0.2], 0.04, [1, 0, 1]),  # squares .01, 1, .04; without the 1 the mean is .025
        ([0.1, 1, -0.2], 0.02, [1, 0, 0]),
        ([0.1, 1, -0.2], 0.36, [1, 1, 1]),  # mean .35
        ([0.1, 1, -0.2], 0.001, [0, 0, 0]),
        ([0.5, -0.5], 0.25, [0, 0]),  # below, not at, the threshold
        ([0.0, -2.0, 2.0, 2.0], 3.0, [1, 0, 1, 1]),
        ([0.1], 0.04, [1]),
        ([0.3], 0.04, [0]),
        ([math.nan, 0.1, INF, -INF], 0.04, [0, 1, 0, 0]),
    ],
)
def test_m2po_by_hand(log_k: list[float], threshold: float, expected: list[int]) -> None:
    assert m2po_keep(f64(*log_k), threshold=threshold).tolist() == [bool(x) for x in expected]


@pytest.mark.parametrize("threshold", [1e-4, 0.04, 0.3, 1.0, 99.0])
@pytest.mark.parametrize("seed", range(4))
def test_m2po_drops_the_largest_until_the_mean_is_below(seed: int, threshold: float) -> None:
    log_k = torch.randn(30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    log_k[::7] = log_k[0]  # equal sizes
    squares = [x * x for x in log_k.tolist()]
    rest = list(range(30))
    while rest and not math.fsum(squares[i] for i in rest) / len(rest) < threshold:
        rest.remove(max(rest, key=lambda i: (squares[i], -i)))
    keep = m2po_keep(log_k, threshold=threshold)
    assert keep.nonzero().flatten().tolist() == rest
