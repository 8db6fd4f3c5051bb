"""The clipped ratio: which branch, which gradient."""

import math

import pytest
import torch

from peergrad.algo.surrogate import clipped_token_ratio

LOW, HIGH = 0.2, 0.28  # bounds .8 and 1.28

# ratio, advantage -> loss -min(rho A, clip(rho) A), gradient -A rho or 0, clip that bites
CASES = [
    (1.5, 2.0, -2.56, 0.0, "high"),  # min(3, 1.28 * 2)
    (1.5, -2.0, 3.0, 3.0, ""),  # min(-3, -2.56): too likely and bad is always pushed down
    (0.5, 2.0, -1.0, -1.0, ""),  # min(1, 1.6): too unlikely and good is always pulled up
    (0.5, -2.0, 1.6, 0.0, "low"),  # min(-1, -1.6)
    (1.1, 2.0, -2.2, -2.2, ""),  # within the bounds
    (1.1, -2.0, 2.2, 2.2, ""),
    (0.9, 3.0, -2.7, -2.7, ""),
    (1.25, 1.0, -1.25, -1.25, ""),  # beyond 1 + LOW, below 1 + HIGH
    (0.75, -1.0, 0.8, 0.0, "low"),  # below 1 - LOW, above 1 - HIGH
    (1.5, 0.0, 0.0, 0.0, ""),  # nothing to clip where the advantage is 0
    (0.5, 0.0, 0.0, 0.0, ""),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient", "clip"), CASES)
def test_by_hand(ratio: float, advantage: float, loss: float, gradient: float, clip: str) -> None:
    logp_old = torch.tensor([-1.7], dtype=torch.float64)
    logp = (logp_old + math.log(ratio)).requires_grad_()
    result = clipped_token_ratio(
        logp,
        logp_old,
        torch.tensor([advantage], dtype=torch.float64),
        clip_low=LOW,
        clip_high=HIGH,
    )
    result.loss.sum().backward()
    assert result.loss.item() == pytest.approx(loss, abs=1e-12)
    assert logp.grad is not None
    assert logp.grad.item() == pytest.approx(gradient, abs=1e-12)  # d rho / d logp = rho
    assert (result.low.item(), result.high.item()) == (clip == "low", clip == "high")


@pytest.mark.parametrize(("ratio", "advantage"), [(2.0, 1.0), (2.0, -1.0), (0.5, 1.0), (0.5, -1.0)])
def test_exactly_at_a_bound_the_gradient_is_whole(ratio: float, advantage: float) -> None:
    logp = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    assert logp.exp().item() == ratio  # or the test would not test the bound
    result = clipped_token_ratio(
        logp, zero, torch.tensor([advantage], dtype=torch.float64), clip_low=0.5, clip_high=1.0
    )
    result.loss.sum().backward()
    assert logp.grad is not None
    assert logp.grad.item() == -advantage * ratio
    assert not result.low.item() and not result.high.item()


def test_on_policy_the_gradient_is_the_advantage() -> None:
    logp = torch.randn(5, requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 0.3, 0.0, -2.0])
    result = clipped_token_ratio(logp, logp.detach(), advantage, clip_low=LOW, clip_high=HIGH)
    result.loss.sum().backward()
    torch.testing.assert_close(logp.grad, -advantage, rtol=0, atol=0)
    assert not (result.low | result.high).any()


def test_gradient_is_that_of_the_formula() -> None:
    """Against numerical differences, away from the kinks."""
    generator = torch.Generator().manual_seed(1)
    logp, old, advantage = torch.randn(3, 200, generator=generator, dtype=torch.float64)
    logp = (old + 0.4 * logp).requires_grad_()

    def loss(logp: torch.Tensor) -> torch.Tensor:
        ratio = (logp - old).exp()
        return -torch.minimum(ratio * advantage, ratio.clip(1 - LOW, 1 + HIGH) * advantage)

    result = clipped_token_ratio(logp, old, advantage, clip_low=LOW, clip_high=HIGH)
    result.loss.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(result.loss, loss(logp), rtol=1e-12, atol=0)
        difference = (loss(logp + 1e-6) - loss(logp - 1e-6)) / 2e-6
    torch.testing.assert_close(logp.grad, difference, rtol=1e-6, atol=1e-8)
    assert min(result.low.sum(), result.high.sum()) > 20  # both clips were at work


def test_overflowing_ratios_leave_no_nan_behind() -> None:
    """exp(200) is inf in float32. A clipped token's loss is -1.2 A and its gradient 0; a token with
    advantage 0 adds nothing; only A < 0, where nothing bounds the ratio, is infinite by its
    formula.
    """
    logp = torch.tensor([200.0, 200.0, -200.0], requires_grad=True)
    result = clipped_token_ratio(
        logp, torch.zeros(3), torch.tensor([1.0, 0.0, -1.0]), clip_low=0.2, clip_high=0.2
    )
    torch.testing.assert_close(result.loss, torch.tensor([-1.2, 0.0, 0.8]))
    result.loss.sum().backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == [0.0, 0.0, 0.0]
