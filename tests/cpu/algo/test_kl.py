"""KL estimators: values, gradients, what they are on average, and what clamps do."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from peergrad.algo.kl import ESTIMATORS, Kl, estimate_kl, k3
from peergrad.config import KlEstimator

K1, K2, K3, ABS, K3_UNBIASED = KlEstimator
INF = math.inf
LOG2 = math.log(2)


def estimate(
    d: list[float],
    estimator: KlEstimator,
    *,
    dtype: torch.dtype = torch.float64,
    clamp_log_ratio: float | None = None,
    clamp: float | None = None,
) -> tuple[Kl, Tensor]:
    """The estimate at logp = d and logp_ref = 0, and its gradient in logp."""
    logp = torch.tensor(d, dtype=dtype, requires_grad=True)
    kl = estimate_kl(
        logp, torch.zeros_like(logp), estimator, clamp_log_ratio=clamp_log_ratio, clamp=clamp
    )
    (gradient,) = torch.autograd.grad(kl.value.sum(), logp)
    return kl, gradient


@pytest.mark.parametrize(
    ("estimator", "values", "gradients"),
    [
        # at d = log 2, 0 and -log 2: q = exp(-d) = .5, 1, 2
        (K1, [LOG2, 0, -LOG2], [1, 1, 1]),
        (K2, [LOG2**2 / 2, 0, LOG2**2 / 2], [LOG2, 0, -LOG2]),
        (K3, [LOG2 - 0.5, 0, 1 - LOG2], [0.5, 0, -1]),  # q + d - 1; 1 - q
        (ABS, [LOG2, 0, LOG2], [1, 0, -1]),
        (K3_UNBIASED, [LOG2 - 0.5, 0, 1 - LOG2], [LOG2, 0, -LOG2]),
    ],
)
def test_by_hand(estimator: KlEstimator, values: list[float], gradients: list[float]) -> None:
    kl, gradient = estimate([LOG2, 0.0, -LOG2], estimator)
    assert kl.value.tolist() == pytest.approx(values, abs=1e-15)
    assert gradient.tolist() == pytest.approx(gradients, abs=1e-15)
    assert not kl.clamped.any()


def test_d_is_policy_minus_reference() -> None:
    logp, logp_ref = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    value = estimate_kl(logp, logp_ref, K1, clamp_log_ratio=None, clamp=None).value
    assert value.item() == pytest.approx(LOG2, rel=1e-6)


@pytest.mark.parametrize("clamps", [(None, None), (2.0, None), (None, 1.5), (2.0, 1.5)])
@pytest.mark.parametrize("estimator", [K1, K2, K3, ABS])
def test_gradcheck(estimator: KlEstimator, clamps: tuple[float | None, float | None]) -> None:
    d = torch.tensor([-3.0, -1.1, -0.3, 0.2, 0.9, 1.9, 4.0], dtype=torch.float64)
    logp_ref = torch.linspace(-4, -0.1, 7, dtype=torch.float64)

    def value(logp: Tensor) -> Tensor:
        return estimate_kl(
            logp, logp_ref, estimator, clamp_log_ratio=clamps[0], clamp=clamps[1]
        ).value

    assert torch.autograd.gradcheck(value, (logp_ref + d).requires_grad_())


def test_k3_unbiased_is_k3_by_value_and_d_by_gradient() -> None:
    d = torch.linspace(-5, 8, 60, dtype=torch.float64)
    kl, gradient = estimate(d.tolist(), K3_UNBIASED)
    torch.testing.assert_close(kl.value, k3(d), rtol=0, atol=0)
    torch.testing.assert_close(gradient, d, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("d", [-5.0, -10.0, -15.0, -20.0, -40.0, -80.0])
def test_k3_unbiased_has_its_gradient_far_from_the_reference_in_float32(d: float) -> None:
    # Written as a difference of numbers near exp(-d), it would drown in their rounding.
    _, gradient = estimate([d], K3_UNBIASED, dtype=torch.float32)
    assert gradient.item() == pytest.approx(d, rel=1e-4)


class TestOnAverage:
    """Under the policy's own samples, by enumeration of all tokens."""

    generator = torch.Generator().manual_seed(0)
    logits, reference = 2 * torch.randn(2, 9, generator=generator, dtype=torch.float64)
    logits.requires_grad_()

    @property
    def logp(self) -> Tensor:
        return self.logits.log_softmax(0)

    @property
    def logp_ref(self) -> Tensor:
        return self.reference.log_softmax(0)

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.logits)[0]

    def expected(self, estimator: KlEstimator) -> Tensor:
        """sum_x p(x) estimate(x), with p constant: the samples are given."""
        kl = estimate_kl(self.logp, self.logp_ref, estimator, clamp_log_ratio=None, clamp=None)
        return (self.logp.detach().exp() * kl.value).sum()

    @pytest.mark.parametrize("estimator", [K1, K3, K3_UNBIASED])
    def test_value_is_the_divergence(self, estimator: KlEstimator) -> None:
        exact = (self.logp.exp() * (self.logp - self.logp_ref)).sum()
        torch.testing.assert_close(self.expected(estimator), exact, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("estimator", KlEstimator)
    def test_gradient(self, estimator: KlEstimator) -> None:
        logp, ref = self.logp, self.logp_ref
        forward = (logp.exp() * (logp - ref)).sum()  # KL(policy || reference)
        backward = (ref.exp() * (ref - logp)).sum()  # KL(reference || policy)
        exact = {
            K1: 0 * forward,
            K2: forward,
            K3: backward,
            K3_UNBIASED: forward,
            # E[sign(p - r) grad log p] = sum sign(p - r) grad p
            ABS: (logp.exp() - ref.exp()).abs().sum(),
        }
        found = self.gradient(self.expected(estimator))
        expected = self.gradient(exact[estimator])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("difference", [1e-3, 1e-4, -1e-4, 1e-6])
@pytest.mark.parametrize("estimator", [K3, K3_UNBIASED])
def test_small_differences_survive_float32(estimator: KlEstimator, difference: float) -> None:
    # d^2 / 2 to leading order. exp(-d) + d - 1 in float32 is a multiple of 6e-8: noise at d = 1e-4.
    kl, gradient = estimate([difference], estimator, dtype=torch.float32)
    assert kl.value.item() == pytest.approx(difference**2 / 2, rel=2e-3)
    assert gradient.item() == pytest.approx(difference, rel=2e-3, abs=1e-7)


@pytest.mark.parametrize(
    ("estimator", "clamp_log_ratio", "clamp", "d", "value", "gradient", "clamped"),
    [
        (K1, 2.0, None, 3.0, 2.0, 0.0, True),
        (K1, 2.0, None, -3.0, -2.0, 0.0, True),
        (K1, 2.0, None, 2.0, 2.0, 1.0, False),  # at the bound
        (K1, 2.0, None, -2.0, -2.0, 1.0, False),
        (K1, None, 2.0, -3.0, -2.0, 0.0, True),
        (K1, None, 2.0, -2.0, -2.0, 1.0, False),
        (K2, 2.0, None, -3.0, 2.0, 0.0, True),
        (K2, None, 2.0, -3.0, 2.0, 0.0, True),  # 4.5
        (K2, None, 2.0, -2.0, 2.0, -2.0, False),  # 2, at the bound
        (K2, None, 2.0, 1.0, 0.5, 1.0, False),
        (K3, 2.0, None, 3.0, math.exp(-2) + 1, 0.0, True),
        (K3, None, 2.0, 4.0, 2.0, 0.0, True),  # 3.018
        (K3, None, 4.0, 4.0, math.exp(-4) + 3, 1 - math.exp(-4), False),
        (K3, 2.0, 1.0, -3.0, 1.0, 0.0, True),  # first d to -2, then e^2 - 3 to 1
        (K3, 4.0, 1.0, -2.0, 1.0, 0.0, True),  # the second alone
        (K3_UNBIASED, None, 2.0, 4.0, 2.0, 0.0, True),
        (K3_UNBIASED, 2.0, None, 1.5, math.exp(-1.5) + 0.5, 1.5, False),
        (ABS, 2.0, None, -3.0, 2.0, 0.0, True),
        (ABS, None, 2.0, -1.0, 1.0, -1.0, False),
    ],
)
def test_clamps(
    estimator: KlEstimator,
    clamp_log_ratio: float | None,
    clamp: float | None,
    d: float,
    value: float,
    gradient: float,
    clamped: bool,
) -> None:
    kl, found = estimate([d], estimator, clamp_log_ratio=clamp_log_ratio, clamp=clamp)
    assert kl.value.item() == pytest.approx(value, abs=1e-14)
    assert found.item() == pytest.approx(gradient, abs=1e-14)
    assert kl.clamped.item() is clamped


@pytest.mark.parametrize(
    ("estimator", "d", "value", "gradient"),
    [
        # exp(200) is inf in float32
        (K1, -200.0, -200.0, 1.0),
        (K2, -200.0, 20_000.0, -200.0),
        (K3, 200.0, 199.0, 1.0),
        (K3, -200.0, INF, -INF),
        (ABS, -200.0, 200.0, -1.0),
        (K3_UNBIASED, 200.0, 199.0, 200.0),
        (K3_UNBIASED, -200.0, INF, -200.0),
        (K1, -INF, -INF, 1.0),
        (K1, INF, INF, 1.0),
        (K3, INF, INF, 1.0),
        (ABS, -INF, INF, -1.0),
        (ABS, INF, INF, 1.0),
    ],
)
def test_overflow(estimator: KlEstimator, d: float, value: float, gradient: float) -> None:
    kl, found = estimate([d], estimator, dtype=torch.float32)
    assert (kl.value.item(), found.item()) == (value, gradient)


@pytest.mark.parametrize("d", [-INF, -200.0, 200.0, INF])
@pytest.mark.parametrize("estimator", KlEstimator)
def test_a_clamp_silences_what_overflows(estimator: KlEstimator, d: float) -> None:
    sign = -1 if estimator is K1 and d < 0 else 1
    kl, gradient = estimate([d], estimator, dtype=torch.float32, clamp=10.0)
    assert (kl.value.item(), gradient.item(), kl.clamped.item()) == (sign * 10.0, 0.0, True)
    kl, gradient = estimate([d], estimator, dtype=torch.float32, clamp_log_ratio=2.0)
    held = estimate([math.copysign(2, d)], estimator)[0].value.item()
    assert kl.value.item() == pytest.approx(held, rel=1e-6)
    assert (gradient.item(), kl.clamped.item()) == (0.0, True)


@pytest.mark.parametrize("estimator", [K2, K3, ABS, K3_UNBIASED])
def test_grows_with_the_distance(estimator: KlEstimator) -> None:
    for sign in (-1, 1):
        values = estimate([sign * 0.25 * i for i in range(20)], estimator)[0].value.tolist()
        assert values[0] == 0
        assert all(near < far for near, far in pairwise(values))


@pytest.mark.parametrize("estimator", KlEstimator)
def test_every_estimator_takes_no_tokens(estimator: KlEstimator) -> None:
    kl, gradient = estimate([], estimator, clamp_log_ratio=2.0, clamp=1.0)
    assert kl.value.sum().item() == 0
    assert gradient.numel() == kl.clamped.numel() == 0
    assert estimator in ESTIMATORS
