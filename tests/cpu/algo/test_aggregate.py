"""Token weights by hand; a rollout of n scored tokens adds n times its weight."""

from enum import Enum

import pytest
import torch

from peergrad.algo.aggregate import token_weights
from peergrad.config import Aggregation

LENGTHS = [3, 0, 1, 4]  # B = 4, N = 8
SEQ_MEAN_TOKEN_MEAN, TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM, TOKEN_SUM_CONST = Aggregation


def weights(mode: Enum, lengths: list[int] = LENGTHS, max_tokens: int = 5) -> list[float]:
    return token_weights(torch.tensor(lengths), mode=mode, max_tokens=max_tokens).tolist()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (SEQ_MEAN_TOKEN_MEAN, [1 / 12, 0, 1 / 4, 1 / 16]),  # 1 / (4 n)
        (TOKEN_MEAN, [1 / 8, 0, 1 / 8, 1 / 8]),  # 1 / (3 + 0 + 1 + 4)
        (SEQ_MEAN_TOKEN_SUM, [1 / 4, 0, 1 / 4, 1 / 4]),  # the empty rollout is one of the 4
        (TOKEN_SUM_CONST, [1 / 20, 0, 1 / 20, 1 / 20]),  # 1 / (4 * 5)
    ],
)
def test_weights(mode: Enum, expected: list[float]) -> None:
    assert weights(mode) == expected


@pytest.mark.parametrize(
    ("mode", "total"),
    [
        (SEQ_MEAN_TOKEN_MEAN, 3 / 4),  # three rollouts that count, of four
        (TOKEN_MEAN, 1.0),
        (SEQ_MEAN_TOKEN_SUM, 8 / 4),
        (TOKEN_SUM_CONST, 8 / 20),
    ],
)
def test_sum_over_all_tokens(mode: Enum, total: float) -> None:
    summed = sum(n * w for n, w in zip(LENGTHS, weights(mode), strict=True))
    assert summed == pytest.approx(total, abs=1e-15)


@pytest.mark.parametrize("mode", Aggregation)
def test_rollouts_without_tokens_never_divide_by_zero(mode: Enum) -> None:
    assert weights(mode, lengths=[0, 0]) == [0.0, 0.0]


def test_weights_are_float64() -> None:
    # 1 / N of millions of tokens must still sum to 1.
    found = token_weights(torch.tensor([7]), mode=TOKEN_MEAN, max_tokens=1)
    assert found.dtype == torch.float64
