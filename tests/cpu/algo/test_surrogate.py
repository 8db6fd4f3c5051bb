"""Surrogates: which branch, which gradient, which clip; numbers by hand and autograd's own."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peergrad.algo.surrogate import (
    Clipped,
    cispo,
    clip_log_ratio,
    clipped_ratio,
    icepop_ratio,
    reinforce,
    sapo,
    sequence_mean,
    sequence_token_log_ratio,
)

LOW, HIGH = 0.2, 0.28  # bounds .8 and 1.28
CLIPS = {"clip_low": LOW, "clip_high": HIGH}
INF = math.inf
LOG3 = math.log(3)
DTYPES = [torch.float64, torch.float32]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def run(
    surrogate: Callable[..., Clipped],
    x: list[float] | Tensor,
    advantage: list[float] | Tensor,
    dtype: torch.dtype = torch.float64,
    **options: float | None,
) -> tuple[Clipped, Tensor]:
    """The surrogate, and the gradient of its sum in its first argument."""
    x = torch.as_tensor(x, dtype=dtype).requires_grad_()
    result = surrogate(x, torch.as_tensor(advantage, dtype=dtype), **options)
    return result, torch.autograd.grad(result.loss.sum(), x)[0]


def one(
    surrogate: Callable[..., Clipped],
    x: float,
    advantage: float,
    dtype: torch.dtype = torch.float64,
    **options: float | None,
) -> tuple[float, float, str]:
    """Loss, gradient and the clip that bites, of one token."""
    result, gradient = run(surrogate, [x], [advantage], dtype, **options)
    clip = {(1, 0): "low", (0, 1): "high", (0, 0): ""}[result.low.item(), result.high.item()]
    return result.loss.item(), gradient.item(), clip


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "loss", "gradient", "clip"),
    [
        # loss -min(rho A, clip(rho) A), gradient -A rho or 0
        (1.5, 2.0, None, -2.56, 0.0, "high"),  # min(3, 1.28 * 2)
        (1.5, -2.0, None, 3.0, 3.0, ""),  # min(-3, -2.56): too likely and bad is pushed down
        (0.5, 2.0, None, -1.0, -1.0, ""),  # min(1, 1.6): too unlikely and good is pulled up
        (0.5, -2.0, None, 1.6, 0.0, "low"),  # min(-1, -1.6)
        (1.1, 2.0, None, -2.2, -2.2, ""),  # within the bounds
        (1.1, -2.0, None, 2.2, 2.2, ""),
        (0.9, 3.0, None, -2.7, -2.7, ""),
        (1.25, 1.0, None, -1.25, -1.25, ""),  # beyond 1 + LOW, below 1 + HIGH
        (0.75, -1.0, None, 0.8, 0.0, "low"),  # below 1 - LOW, above 1 - HIGH
        (1.5, 0.0, None, 0.0, 0.0, ""),  # nothing to clip where the advantage is 0
        (0.5, 0.0, None, 0.0, 0.0, ""),
        # at most 3 |A| where A < 0
        (5.0, -2.0, 3.0, 6.0, 0.0, "high"),
        (2.0, -2.0, 3.0, 4.0, 4.0, ""),
        (0.5, -2.0, 3.0, 1.6, 0.0, "low"),
        (5.0, 2.0, 3.0, -2.56, 0.0, "high"),  # where A > 0 it changes nothing
        (0.5, 2.0, 3.0, -1.0, -1.0, ""),
        (5.0, 0.0, 3.0, 0.0, 0.0, ""),
        (1.2, -1.0, 1.1, 1.1, 0.0, "high"),  # below 1 + HIGH, too
    ],
)
def test_clip_by_hand(
    ratio: float, advantage: float, dual_clip: float | None, loss: float, gradient: float, clip: str
) -> None:
    found = one(clipped_ratio, math.log(ratio), advantage, **CLIPS, dual_clip=dual_clip)
    assert found[:2] == pytest.approx((loss, gradient), abs=1e-12)  # d rho / d log rho = rho
    assert found[2] == clip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("ratio", "advantage"), [(2.0, 1.0), (2.0, -1.0), (0.5, 1.0), (0.5, -1.0), (4.0, -1.0)]
)
def test_exactly_at_a_bound_the_gradient_is_whole(
    ratio: float, advantage: float, dtype: torch.dtype
) -> None:
    log_ratio = torch.tensor(ratio, dtype=dtype).log()
    assert log_ratio.exp().item() == ratio  # or the test would not test the bound
    options = {"clip_low": 0.5, "clip_high": 1.0, "dual_clip": 4.0}
    found = one(clipped_ratio, log_ratio.item(), advantage, dtype, **options)
    assert found == (-advantage * ratio, -advantage * ratio, "")


@pytest.mark.parametrize("clip_low", [1.0, 11.0])
def test_a_clip_low_of_one_and_more_is_no_lower_bound(clip_low: float) -> None:
    found = one(clipped_ratio, math.log(0.001), -2.0, clip_low=clip_low, clip_high=0.2)
    assert found == (pytest.approx(0.002), pytest.approx(0.002), "")


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_clip_is_min_and_max_of_the_formula(dual_clip: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    x, advantage = torch.randn(2, 400, generator=generator, dtype=torch.float64)

    def formula(x: Tensor, advantage: Tensor) -> Clipped:
        ratio = x.exp()
        term = torch.minimum(ratio * advantage, ratio.clamp(1 - LOW, 1 + HIGH) * advantage)
        if dual_clip is not None:
            term = torch.where(advantage < 0, torch.maximum(term, dual_clip * advantage), term)
        return Clipped(-term, advantage < 0, advantage > 0)

    expected, expected_gradient = run(formula, 0.5 * x, advantage)
    found, gradient = run(clipped_ratio, 0.5 * x, advantage, **CLIPS, dual_clip=dual_clip)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=0)
    assert torch.equal(found.low | found.high, expected_gradient == 0)
    assert min(found.low.sum(), found.high[advantage > 0].sum()) > 20  # both clips were at work
    assert (found.high[advantage < 0].sum() > 20) == (dual_clip is not None)


SEQUENCE = torch.tensor([0, 2, 0, 2, 2])  # interleaved, and none of sequence 1 is here


def gspo(log_ratio: Tensor, advantage: Tensor, **options: float | None) -> Clipped:
    return clipped_ratio(sequence_mean(log_ratio, SEQUENCE, 3), advantage, **options)


def gspo_token(log_ratio: Tensor, advantage: Tensor, **options: float | None) -> Clipped:
    return clipped_ratio(sequence_token_log_ratio(log_ratio, SEQUENCE, 3), advantage, **options)


def test_sequence_mean_by_hand() -> None:
    found = sequence_mean(f64(1, 3, 4, 0, -6), SEQUENCE, 3)
    assert found.tolist() == [2.5, -1, 2.5, -1, -1]
    assert sequence_mean(f64(7), torch.tensor([0]), 1).tolist() == [7]
    assert sequence_mean(f64(1, -INF), torch.tensor([0, 1]), 2).tolist() == [1, -INF]


def test_gspo_by_hand() -> None:
    """Sequence 0: ratios 4 and 1, s = 2, A = 1: loss -2 per token; summed over its two tokens, each
    of which has half of s, the gradient is -2 per token. Sequence 2: 1, 1/8, 1, s = .5, A = -1:
    clipped at .8, no gradient."""
    x = f64(4, 1, 1, 1 / 8, 1).log()
    options = {"clip_low": LOW, "clip_high": 3.0}
    for surrogate in (gspo, gspo_token):
        result, gradient = run(surrogate, x.clone(), f64(1, -1, 1, -1, -1), **options)
        assert result.loss.tolist() == pytest.approx([-2, 0.8, -2, 0.8, 0.8], abs=1e-14)
        assert gradient.tolist() == pytest.approx([-2, 0, -2, 0, 0], abs=1e-14)
        assert result.low.tolist() == [False, True, False, True, True]
        assert not result.high.any()


@pytest.mark.parametrize("dual_clip", [None, 1.05])
def test_gspo_token_is_gspo_where_a_sequence_has_one_advantage(dual_clip: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    options = {"clip_low": 0.1, "clip_high": 0.1, "dual_clip": dual_clip}
    for _ in range(20):
        x = 0.3 * torch.randn(5, generator=generator, dtype=torch.float64)
        advantage = torch.randn(3, generator=generator, dtype=torch.float64)[SEQUENCE]
        whole, gradient = run(gspo, x.clone(), advantage, **options)
        token, token_gradient = run(gspo_token, x.clone(), advantage, **options)
        torch.testing.assert_close(token.loss, whole.loss, rtol=1e-14, atol=0)
        torch.testing.assert_close(token_gradient, gradient, rtol=1e-12, atol=1e-15)


def test_gspo_token_gives_a_token_its_own_advantage() -> None:
    # s = sqrt(4 * 1) = 2 and (1/8)^(1/3) = .5; gradient -A_t s_i
    advantage = f64(1, 2, -3, 0, -1)
    x = f64(4, 1, 1, 1 / 8, 1).log()
    _, gradient = run(gspo_token, x, advantage, clip_low=0.9, clip_high=9.0)
    assert gradient.tolist() == pytest.approx([-2, -1, 6, 0, 0.5], abs=1e-14)


@pytest.mark.parametrize("surrogate", [gspo, gspo_token])
def test_an_impossible_token_makes_its_sequence_silent(surrogate: Callable[..., Clipped]) -> None:
    """A ratio of 0 for sequence 0; its neighbour keeps its own gradient."""
    for advantage, loss in ((1.0, 0.0), (-1.0, 0.8), (0.0, 0.0)):
        x, advantages = [-INF, 0, 0, 0, 0], [advantage, 1, advantage, 1, 1]
        result, gradient = run(surrogate, x, advantages, **CLIPS)
        assert result.loss.tolist() == pytest.approx([loss, -1, loss, -1, -1], abs=1e-14)
        assert gradient.tolist() == pytest.approx([0, -1, 0, -1, -1], abs=1e-14)


@pytest.mark.parametrize(
    ("ratio", "advantage", "unified_mask", "weight", "clip"),
    [
        (1.0, 2.0, False, 1.0, ""),
        (1.1, -2.0, False, 1.1, ""),
        (2.0, 1.0, False, 1.28, "high"),
        (2.0, -1.0, False, 1.28, "high"),  # clipped whatever the advantage
        (0.5, 1.0, False, 0.8, "low"),
        (0.5, -1.0, False, 0.8, "low"),
        (2.0, 1.0, True, 0.0, "high"),  # PPO clips: dropped
        (2.0, -1.0, True, 1.28, ""),
        (0.5, 1.0, True, 0.8, ""),
        (0.5, -1.0, True, 0.0, "low"),
        (1.1, 1.0, True, 1.1, ""),
    ],
)
def test_cispo_by_hand(
    ratio: float, advantage: float, unified_mask: bool, weight: float, clip: str
) -> None:
    """The ratio is that of the same logp: none of its gradient may come through."""

    def surrogate(logp: Tensor, advantage: Tensor) -> Clipped:
        log_ratio = logp - (-1.5 - math.log(ratio))
        return cispo(logp, log_ratio, advantage, **CLIPS, unified_mask=unified_mask)

    found, pushed = one(surrogate, -1.5, advantage), weight * advantage
    assert found[:2] == pytest.approx((1.5 * pushed, -pushed), abs=1e-12)  # loss -w A logp
    assert found[2] == clip


@pytest.mark.parametrize("unified_mask", [False, True])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 2.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cispo_exactly_at_a_bound(
    ratio: float, advantage: float, unified_mask: bool, dtype: torch.dtype
) -> None:
    log_ratio = torch.tensor([ratio], dtype=dtype).log()
    surrogate = with_ratio(log_ratio, clip_low=0.5, clip_high=1.0, unified_mask=unified_mask)
    found = one(surrogate, -3.0, advantage, dtype)
    assert found == (3 * ratio * advantage, -ratio * advantage, "")


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        # A > 0: tau 2, sigmoid(2 (rho - 1)); gradient -A 4 s (1 - s) rho
        (1.0, 1.0, -1.0, -1.0),  # 4 / 2 * .5
        (1 + LOG3 / 2, 1.0, -1.5, -0.75 * (1 + LOG3 / 2)),  # s = 3/4: 4 s (1 - s) = 3/4
        # A < 0: tau .5
        (1.0, -1.0, 4.0, 1.0),  # 4 / .5 * .5
        (1 + 2 * LOG3, -3.0, 18.0, 3 * 0.75 * (1 + 2 * LOG3)),  # s = 3/4
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_sapo_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    found = one(sapo, math.log(ratio), advantage, tau_positive=2.0, tau_negative=0.5)
    assert found[:2] == pytest.approx((loss, gradient), abs=1e-12)
    assert found[2] == ""


def test_sapo_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x, advantage = torch.randn(2, 60, generator=generator, dtype=torch.float64)
    found, gradient = run(sapo, x, advantage, tau_positive=1.1, tau_negative=1.05)
    for i, (log_ratio, a) in enumerate(zip(x.tolist(), advantage.tolist(), strict=True)):
        tau, ratio = (1.1 if a > 0 else 1.05), math.exp(log_ratio)
        gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
        assert found.loss[i].item() == pytest.approx(-a * 4 / tau * gate, rel=1e-13)
        assert gradient[i].item() == pytest.approx(-a * 4 * gate * (1 - gate) * ratio, rel=1e-11)


@pytest.mark.parametrize("taus", [(1.0, 1.05), (0.3, 7.0)])
def test_sapo_on_policy_has_the_gradient_of_the_advantage(taus: tuple[float, float]) -> None:
    advantage = f64(1, -1, 0.3, 0, -2)
    _, gradient = run(sapo, [0.0] * 5, advantage, tau_positive=taus[0], tau_negative=taus[1])
    torch.testing.assert_close(gradient, -advantage, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clip"),
    [
        (2.0, 1.0, -2.0, ""),
        (2.0, -3.0, 6.0, ""),
        (6.0, 1.0, 0.0, "high"),  # dropped whatever the advantage
        (6.0, -1.0, 0.0, "high"),
        (0.4, 1.0, 0.0, "low"),
        (0.4, -1.0, 0.0, "low"),
        (2.0, 0.0, 0.0, ""),
        (0.5, 1.0, -0.5, ""),  # both bounds belong to the band
        (4.0, 1.0, -4.0, ""),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_icepop_by_hand(
    ratio: float, advantage: float, loss: float, clip: str, dtype: torch.dtype
) -> None:
    log_ratio = torch.tensor(ratio, dtype=dtype).log().item()
    found = one(icepop_ratio, log_ratio, advantage, dtype, clip_low=0.5, clip_high=3.0)
    assert found[:2] == pytest.approx((loss, loss), rel=1e-6)  # -A rho is its own derivative
    assert found[2] == clip


def test_reinforce_by_hand() -> None:
    result, gradient = run(reinforce, [-1.5, -0.5, -INF], [2.0, -1.0, 0.0])
    assert result.loss.tolist() == [3.0, -0.5, 0.0]
    assert gradient.tolist() == [-2.0, 1.0, 0.0]
    assert not (result.low | result.high).any()


def with_ratio(log_ratio: Tensor, **options: float) -> Callable[..., Clipped]:
    """cispo of a given ratio, as a function of logp."""
    return lambda logp, advantage: cispo(logp, log_ratio, advantage, **options)


X = f64(-0.9, -0.35, -0.1, 0.05, 0.15, 0.4, 0.9, -0.3, 0.35, 1.4)
A = f64(1, -1, 2, -2, 0.5, 1, -1, 0, 0, -0.5)
PAIRS = torch.arange(10) // 2


# Losses whose value and gradient belong together.
SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "clip": lambda x: clipped_ratio(x, A, **CLIPS).loss,
    "dual clip": lambda x: clipped_ratio(x, A, **CLIPS, dual_clip=2.0).loss,
    "gspo": lambda x: clipped_ratio(sequence_mean(x, PAIRS, 5), A, **CLIPS).loss,
    "cispo": lambda x: with_ratio(X, **CLIPS, unified_mask=False)(x, A).loss,
    "cispo masked": lambda x: with_ratio(X, **CLIPS, unified_mask=True)(x, A).loss,
    "sapo": lambda x: sapo(x, A, tau_positive=1.0, tau_negative=1.05).loss,
    "icepop": lambda x: icepop_ratio(x, A, **CLIPS).loss,
    "reinforce": lambda x: reinforce(x, A).loss,
    "held log ratio": lambda x: clip_log_ratio(x, low=-0.5, high=0.5),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_gradcheck(name: str) -> None:
    """Away from the kinks: no ratio of X, nor mean of two of them, is near a bound."""
    assert torch.autograd.gradcheck(SMOOTH[name], X.clone().requires_grad_())


ON_POLICY = {
    "clip": (clipped_ratio, CLIPS),
    "dual clip": (clipped_ratio, {**CLIPS, "dual_clip": 3.0}),
    "gspo": (gspo, CLIPS),
    "gspo_token": (gspo_token, CLIPS),
    "cispo": (with_ratio(torch.zeros(5), **CLIPS, unified_mask=True), {}),
    "sapo": (sapo, {"tau_positive": 1.0, "tau_negative": 1.05}),
    "icepop": (icepop_ratio, CLIPS),
    "reinforce": (reinforce, {}),
}


@pytest.mark.parametrize("name", ON_POLICY)
def test_on_policy_every_gradient_is_the_advantage(name: str) -> None:
    surrogate, options = ON_POLICY[name]
    advantage = torch.tensor([1.0, -1.0, 0.3, 0.0, -2.0])
    if name == "gspo":
        advantage = torch.tensor([1.0, -1.0, 0.0])[SEQUENCE]
    result, gradient = run(surrogate, torch.zeros(5), advantage, torch.float32, **options)
    torch.testing.assert_close(gradient, -advantage, rtol=1e-6, atol=0)
    assert not (result.low | result.high).any()


SHUT = 4 / (1 + math.e)  # 4 sigmoid(-1), sapo's loss of a ratio of 0


@pytest.mark.parametrize("size", [200.0, INF])
@pytest.mark.parametrize(
    ("surrogate", "options", "sign", "advantage", "loss", "gradient"),
    [
        (clipped_ratio, CLIPS, 1, 1.0, -1.28, 0.0),
        (clipped_ratio, CLIPS, 1, 0.0, 0.0, 0.0),
        (clipped_ratio, CLIPS, 1, -1.0, INF, INF),  # nothing bounds it: infinite by its formula
        (clipped_ratio, CLIPS, -1, 1.0, 0.0, 0.0),
        (clipped_ratio, CLIPS, -1, 0.0, 0.0, 0.0),
        (clipped_ratio, CLIPS, -1, -1.0, 0.8, 0.0),
        (clipped_ratio, {"clip_low": 1.0, "clip_high": HIGH}, -1, -1.0, 0.0, 0.0),
        (clipped_ratio, {**CLIPS, "dual_clip": 3.0}, 1, -1.0, 3.0, 0.0),
        (clipped_ratio, {**CLIPS, "dual_clip": 3.0}, -1, -1.0, 0.8, 0.0),
        *[(icepop_ratio, CLIPS, s, a, 0.0, 0.0) for s in (1, -1) for a in (1.0, 0.0, -1.0)],
        (icepop_ratio, {"clip_low": 1.0, "clip_high": HIGH}, -1, 1.0, 0.0, 0.0),
        *[
            (sapo, {"tau_positive": 1.0, "tau_negative": 1.0}, s, a, -a * x, 0.0)
            for s, x in ((1, 4.0), (-1, SHUT))
            for a in (1.0, 0.0, -1.0)
        ],
    ],
)
def test_overflowing_ratios_leave_no_nan_behind(
    surrogate: Callable[..., Clipped],
    options: dict[str, float],
    sign: int,
    advantage: float,
    loss: float,
    gradient: float,
    size: float,
) -> None:
    # exp(200) is inf in float32, exp(-200) is 0
    found = one(surrogate, sign * size, advantage, torch.float32, **options)
    assert found[:2] == pytest.approx((loss, gradient), rel=1e-6)


@pytest.mark.parametrize(
    ("log_ratio", "clip_low", "advantage", "weight"),
    [
        (INF, LOW, 1.0, 1.28),
        (200.0, LOW, -1.0, 1.28),
        (-200.0, LOW, 1.0, 0.8),
        (-INF, LOW, -1.0, 0.8),
        (-INF, 1.0, 1.0, 0.0),
        (200.0, LOW, 0.0, 0.0),
    ],
)
def test_cispo_of_impossible_tokens(
    log_ratio: float, clip_low: float, advantage: float, weight: float
) -> None:
    """logp = -inf: the loss is infinite where it counts, the gradient never."""
    clips = {"clip_low": clip_low, "clip_high": HIGH, "unified_mask": False}
    surrogate = with_ratio(torch.tensor([log_ratio]), **clips)
    loss, gradient, _ = one(surrogate, -INF, advantage, torch.float32)
    assert loss == (advantage * INF if weight else 0.0)
    assert gradient == pytest.approx(-weight * advantage, rel=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "expected", "gradient"),
    [
        (-2.0, 1.0, [-2, -2, 0.5, 1, 1, 1], [0, 1, 1, 1, 0, 0]),  # at a bound it is whole
        (-2.0, None, [-2, -2, 0.5, 1, 3, INF], [0, 1, 1, 1, 1, 1]),
        (None, 1.0, [-3, -2, 0.5, 1, 1, 1], [1, 1, 1, 1, 0, 0]),
        (None, None, [-3, -2, 0.5, 1, 3, INF], [1, 1, 1, 1, 1, 1]),
    ],
)
def test_clip_log_ratio(
    low: float | None, high: float | None, expected: list[float], gradient: list[float]
) -> None:
    x = f64(-3, -2, 0.5, 1, 3, INF).requires_grad_()
    held = clip_log_ratio(x, low=low, high=high)
    assert held.tolist() == expected
    assert torch.autograd.grad(held.sum(), x)[0].tolist() == gradient


def test_no_tokens() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    surrogates = [
        *[(f, o) for f, o in ON_POLICY.values() if f not in (gspo, gspo_token) and o],
        (lambda x, a: clipped_ratio(sequence_mean(x, nothing, 2), a, **CLIPS), {}),
        (lambda x, a: clipped_ratio(sequence_token_log_ratio(x, nothing, 0), a, **CLIPS), {}),
        (with_ratio(torch.zeros(0), **CLIPS, unified_mask=True), {}),
        (reinforce, {}),
    ]
    for surrogate, options in surrogates:
        result, gradient = run(surrogate, [], [], torch.float32, **options)
        assert result.loss.sum().item() == 0
        assert gradient.numel() == result.low.numel() == result.high.numel() == 0
