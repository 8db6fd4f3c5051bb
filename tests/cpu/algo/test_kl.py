"""k3: value and gradient."""

import math

import pytest
import torch
from torch import Tensor

from peergrad.algo.kl import k3


def test_by_hand() -> None:
    # log .25 - log .5 = -log 2: q = .5, k3 = .5 + log 2 - 1
    logp, reference = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.25]).log()
    assert k3(logp, reference).tolist() == pytest.approx([0.5 + math.log(2) - 1, 0.0], abs=1e-7)


def test_value_and_gradient() -> None:
    logp = torch.linspace(-9, -0.01, 50, dtype=torch.float64, requires_grad=True)
    reference = torch.linspace(-0.5, -7, 50, dtype=torch.float64)
    q = (reference - logp.detach()).exp()
    value = k3(logp, reference)
    torch.testing.assert_close(value, q - q.log() - 1, rtol=1e-12, atol=1e-12)
    value.sum().backward()
    torch.testing.assert_close(logp.grad, 1 - q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("difference", [1e-3, 1e-4, -1e-4, 1e-6])
def test_small_differences_survive_float32(difference: float) -> None:
    # d^2 / 2 to leading order. exp(d) - d - 1 in float32 is a multiple of 6e-8: noise at d = 1e-4.
    value = k3(torch.zeros(1), torch.tensor([difference]))
    assert value.item() == pytest.approx(difference**2 / 2, rel=2e-3)
    assert value.item() > 0


def test_is_not_clamped() -> None:
    logp = torch.tensor([-30.0], requires_grad=True)
    k3(logp, torch.tensor([0.0])).sum().backward()
    assert logp.grad is not None
    assert logp.grad.item() == pytest.approx(1 - math.exp(30), rel=1e-5)


def test_has_the_mean_of_the_exact_divergence() -> None:
    """sum_x p(x) k3(x) = KL(p || r) for any two distributions."""
    generator = torch.Generator().manual_seed(0)

    def distribution() -> Tensor:
        logits = torch.randn(9, generator=generator, dtype=torch.float64)
        return logits.log_softmax(0)

    p, r = distribution(), distribution()
    exact = (p.exp() * (p - r)).sum()
    torch.testing.assert_close((p.exp() * k3(p, r)).sum(), exact, rtol=1e-12, atol=0)
