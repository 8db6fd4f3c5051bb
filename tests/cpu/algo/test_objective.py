"""The whole loss by hand, and its gradient for every surrogate, KL and aggregation."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from peergrad.algo.objective import Objective
from peergrad.algo.packing import MicroBatch, pack
from peergrad.algo.samples import Sample, weigh
from peergrad.config import (
    Aggregation,
    AlgoConfig,
    CorrectionConfig,
    CorrectionKind,
    CorrectionLevel,
    KlConfig,
    KlEstimator,
    KlPlace,
    OldPolicy,
    SurrogateConfig,
    SurrogateKind,
)

INF, NAN = math.inf, math.nan
LOG2 = math.log(2)


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def objective(**options: Any) -> Objective:
    """Sections as dicts, enumerations by name; clips .2 and .3 and no KL unless said."""
    surrogate = {"clip_low": 0.2, "clip_high": 0.3, **options.pop("surrogate", {})}
    surrogate["kind"] = SurrogateKind[surrogate.get("kind", "clip")]
    kl = {"coef": 0.0, **options.pop("kl", {})}
    kl["place"] = KlPlace[kl.get("place", "loss")]
    kl["estimator"] = KlEstimator[kl.get("estimator", "k3")]
    correction = dict(options.pop("correction", {}))
    correction["kind"] = CorrectionKind[correction.get("kind", "none")]
    correction["level"] = CorrectionLevel[correction.get("level", "token")]
    return Objective(
        AlgoConfig(
            surrogate=SurrogateConfig(**surrogate),
            correction=CorrectionConfig(**correction),
            kl=KlConfig(**kl),
            **options,
        )
    )


def new_batch(
    advantage: list[float],
    *,
    weight: list[float] | None = None,
    sequence: list[int] | None = None,
    engine: list[float] | None = None,
    **optional: list[float] | None,
) -> MicroBatch:
    """One sequence of weight 1 and engine 0 unless said otherwise, in float64."""
    size = len(advantage)
    index = sequence or [0] * size
    return MicroBatch(
        tokens=torch.zeros(size + 1, dtype=torch.int64),
        positions=torch.arange(size + 1),
        cu_seqlens=torch.tensor([0, size + 1], dtype=torch.int32),
        families=((size + 1,),),
        max_seqlen=size + 1,
        rows=torch.arange(size),
        targets=torch.zeros(size, dtype=torch.int64),
        sequence=torch.tensor(index, dtype=torch.int64),
        sequences=max(index, default=-1) + 1,
        advantage=f64(advantage),
        weight=f64([1.0] * size if weight is None else weight),
        logp_engine=f64([0.0] * size if engine is None else engine),
        **{name: None if values is None else f64(values) for name, values in optional.items()},
    )


def run(
    subject: Objective, logp: list[float], batch: MicroBatch, entropy: list[float] | None = None
) -> tuple[float, list[float], dict[str, tuple[float, int]]]:
    """(loss, its gradient, metrics)."""
    leaf = f64(logp).requires_grad_()
    loss, metrics = subject(leaf, f64(entropy or [0.0] * len(logp)), batch)
    loss.backward()
    assert leaf.grad is not None
    found = {key: (value.item(), int(count)) for key, (value, count) in metrics.items()}
    return loss.item(), leaf.grad.tolist(), found


def approx(value: Any) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-12)


# --- surrogates ----------------------------------------------------------------------------------

# Five tokens of probability 1/2 each, ratios 1.5, .5, 1.5, .5 and 1.
RATIO, ADVANTAGE, WEIGHT = [1.5, 0.5, 1.5, 0.5, 1.0], [1.0, 1.0, -1.0, -1.0, 2.0], [1, 2, 3, 4, 5]
HALF = [-LOG2] * 5


def gate(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def sapo_slope(a: float, rho: float, tau: float) -> float:
    return -4 * a * rho * gate(tau * (rho - 1)) * (1 - gate(tau * (rho - 1)))


@pytest.mark.parametrize(
    ("options", "losses", "slopes", "clipped"),
    [
        # held at 1.3 and .8; not where that would be better for the policy
        ({}, [-1.3, -0.5, 1.5, 0.8, -2], [0, -0.5, 1.5, 0, -2], (1, 1)),
        ({"dual_clip": 1.2}, [-1.3, -0.5, 1.2, 0.8, -2], [0, -0.5, 0, 0, -2], (1, 2)),
        (
            {"log_ratio_high": math.log(1.4)},
            [-1.3, -0.5, 1.4, 0.8, -2],
            [0, -0.5, 0, 0, -2],
            (1, 1),
        ),
        ({"log_ratio_low": math.log(0.6)}, [-1.3, -0.6, 1.5, 0.8, -2], [0, 0, 1.5, 0, -2], (1, 1)),
        ({"clip_low": 2.0}, [-1.3, -0.5, 1.5, 0.5, -2], [0, -0.5, 1.5, 0.5, -2], (0, 1)),
        (
            {"kind": "cispo"},
            [1.3 * LOG2, 0.8 * LOG2, -1.3 * LOG2, -0.8 * LOG2, 2 * LOG2],
            [-1.3, -0.8, 1.3, 0.8, -2],
            (2, 2),
        ),
        (
            {"kind": "cispo", "unified_mask": True},
            [0, 0.8 * LOG2, -1.3 * LOG2, 0, 2 * LOG2],
            [0, -0.8, 1.3, 0, -2],
            (1, 1),
        ),
        (
            {"kind": "sapo", "tau_positive": 1.0, "tau_negative": 2.0},
            [-4 * gate(0.5), -4 * gate(-0.5), 2 * gate(1.0), 2 * gate(-1.0), -4],
            [
                *(sapo_slope(1, 1.5, 1), sapo_slope(1, 0.5, 1)),
                *(sapo_slope(-1, 1.5, 2), sapo_slope(-1, 0.5, 2), -2.0),
            ],
            (0, 0),
        ),
        ({"kind": "icepop"}, [0, 0, 0, 0, -2], [0, 0, 0, 0, -2], (2, 2)),
        (
            {"kind": "icepop", "clip_low": 0.6},
            [0, -0.5, 0, 0.5, -2],
            [0, -0.5, 0, 0.5, -2],
            (0, 2),
        ),
        (
            {"kind": "reinforce"},
            [LOG2, LOG2, -LOG2, -LOG2, 2 * LOG2],
            [-1, -1, 1, 1, -2],
            (0, 0),
        ),
    ],
)
def test_surrogates_of_single_tokens(
    options: dict[str, Any], losses: list[float], slopes: list[float], clipped: tuple[int, int]
) -> None:
    old = [-LOG2 - math.log(rho) for rho in RATIO]
    batch = new_batch(ADVANTAGE, weight=[float(w) for w in WEIGHT], logp_old=old)
    entropy = [1.0, 2.0, 0.5, 0.25, 0.0]
    loss, gradient, metrics = run(objective(surrogate=options), HALF, batch, entropy)
    expected = sum(w * x for w, x in zip(WEIGHT, losses, strict=True))
    assert loss == approx(expected)
    assert gradient == approx([w * x for w, x in zip(WEIGHT, slopes, strict=True)])
    ratios = [
        min(max(rho, math.exp(options.get("log_ratio_low", -9))), high)
        for rho in RATIO
        for high in [math.exp(options.get("log_ratio_high", 9))]
    ]
    assert metrics == {
        "loss/policy": (approx(expected), 0),  # sums already: their weights are global
        "loss/total": (approx(expected), 0),
        "policy/clip_low": (clipped[0], 5),
        "policy/clip_high": (clipped[1], 5),
        "policy/ratio": (approx(sum(ratios)), 5),
        "policy/entropy": (3.75, 5),
    }


def test_sapo_computes_in_the_precision_of_its_input() -> None:
    """1.05 is no float32: rounded to one, it would be off by 5e-8."""
    batch = new_batch([-1.0], logp_old=[-1.5])
    loss, _, _ = run(objective(surrogate={"kind": "sapo"}), [-1.0], batch)
    assert loss == approx(4 / 1.05 * gate(1.05 * (math.exp(0.5) - 1)))


@pytest.mark.parametrize(
    ("kind", "gradient"),
    [
        # Answer 0: ratios 2 and 1.125, geometric mean 1.5, A = 1: clipped. Answer 1: ratio 1/2 of
        # both, A = 1, weights 3 and 5. One ratio has its gradient from all: (3 + 5) / 2 * -.5 each;
        # gspo_token's is the token's own.
        ("gspo", [0, -2, 0, -2]),
        ("gspo_token", [0, -1.5, 0, -2.5]),
    ],
)
def test_surrogates_of_whole_answers(kind: str, gradient: list[float]) -> None:
    ratio = [2.0, 0.5, 1.125, 0.5]
    batch = new_batch(
        [1.0] * 4,
        weight=[1.0, 3.0, 2.0, 5.0],
        sequence=[0, 1, 0, 1],
        logp_old=[-1 - math.log(rho) for rho in ratio],
    )
    loss, found, metrics = run(objective(surrogate={"kind": kind}), [-1.0] * 4, batch)
    assert loss == approx(-1.3 * 3 - 0.5 * 8)
    assert found == approx(gradient)
    assert metrics["policy/clip_high"] == (2, 4) and metrics["policy/ratio"] == (approx(4), 4)


@pytest.mark.parametrize("kind", [k for k in SurrogateKind if k is not SurrogateKind.icepop])
def test_without_old_logprobs_the_ratio_is_exactly_one(kind: SurrogateKind) -> None:
    batch = new_batch([1.0, -1.0, 0.5], weight=[0.25, 0.25, 0.5], sequence=[0, 1, 2])
    _, gradient, metrics = run(objective(surrogate={"kind": kind.name}), [-0.1, -7.3, -2.2], batch)
    assert metrics["policy/ratio"] == (3.0, 3)
    assert metrics["policy/clip_low"] == metrics["policy/clip_high"] == (0.0, 3)
    assert gradient == [-0.25, 0.25, -0.25]  # -A weight, to the bit


@pytest.mark.parametrize(("proximal", "exponent"), [(0.0, 0.5), (0.5, 0.25), (2 / 3, 0.5 / 3)])
def test_the_loglinear_policy(proximal: float, exponent: float) -> None:
    """Engine -1, present -.5: the ratio is that of what is left of the way. It is held constant."""
    subject = objective(old_policy=OldPolicy.loglinear)
    batch = new_batch([-1.0], engine=[-1.0], proximal=[proximal])
    loss, gradient, _ = run(subject, [-0.5], batch)
    assert loss == approx(math.exp(exponent)) and gradient == approx([math.exp(exponent)])
    # and the engine is corrected for the other part
    subject = objective(old_policy=OldPolicy.loglinear, correction={"kind": "tis", "high": 9.0})
    loss, gradient, metrics = run(subject, [-0.5], batch)
    assert metrics["correction/weight"] == (approx(math.exp(0.5 - exponent)), 1)
    assert loss == approx(math.exp(0.5)) and gradient == approx([math.exp(0.5)])


# --- corrections ---------------------------------------------------------------------------------

# Answers of two tokens: k = 1/4, 1 with product 1/4 and mean 1/2; 4, 3/2 with 6 and 2.449.
K, ROOT6 = [0.25, 1.0, 4.0, 1.5], math.sqrt(6)


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({"kind": "tis"}, [0.25, 1, 2, 1.5]),
        ({"kind": "tis", "low": 0.5, "high": 3.0}, [0.5, 1, 3, 1.5]),
        ({"kind": "tis", "level": "sequence"}, [0.25, 0.25, 2, 2]),
        ({"kind": "tis", "level": "geometric", "high": 3.0}, [0.5, 0.5, ROOT6, ROOT6]),
        ({"kind": "mis"}, [0.25, 1, None, 1.5]),
        ({"kind": "mis", "low": 0.5, "high": 5.0}, [None, 1, 4, 1.5]),
        ({"kind": "mis", "level": "sequence"}, [0.25, 0.25, None, None]),
        ({"kind": "mis", "level": "sequence", "low": 0.3, "high": 7.0}, [None, None, 6, 6]),
        (
            {"kind": "mis", "level": "geometric", "low": 0.6, "high": 3.0},
            [None, None, ROOT6, ROOT6],
        ),
        ({"kind": "icepop"}, [None, 1, 4, 1.5]),  # .5 to 5
        ({"kind": "icepop", "level": "sequence", "high": 2.0}, [None, 1, None, 1.5]),
        ({"kind": "seq_mask_tis"}, [0.25, 1, None, None]),
        ({"kind": "seq_mask_tis", "low": 0.6, "high": 3.0}, [None, None, 4, 1.5]),
    ],
)
def test_corrections(options: dict[str, Any], factors: list[float | None]) -> None:
    """Ratio 1 and A = -1: the loss of a token is weight times factor, and so is its gradient."""
    engine = [-1 - math.log(k) for k in K]
    batch = new_batch([-1.0] * 4, weight=[1.0, 2.0, 3.0, 4.0], sequence=[0, 0, 1, 1], engine=engine)
    batch = replace(batch, logp_old=f64([-1.0] * 4))
    subject = objective(correction=options)
    loss, gradient, metrics = run(subject, [-1.0] * 4, batch)
    expected = [(i + 1) * (factor or 0.0) for i, factor in enumerate(factors)]
    assert gradient == approx(expected) and loss == approx(sum(expected))
    assert metrics["correction/weight"] == (approx(sum(f or 0 for f in factors)), 4)
    keep = [factor is not None for factor in factors]
    assert subject.kept(f64([-1.0] * 4), batch).tolist() == keep
    if options["kind"] == "tis":
        assert "correction/dropped" not in metrics
    else:
        assert metrics["correction/dropped"] == (4 - sum(keep), 4)
    assert metrics["policy/ratio"] == (sum(keep), sum(keep))  # of kept tokens alone


def test_the_correction_weighs_neither_kl_nor_entropy() -> None:
    subject = objective(
        correction={"kind": "tis"}, kl={"coef": 0.5, "estimator": "k2"}, entropy_coef=0.25
    )
    batch = new_batch([-1.0], engine=[-1 - LOG2], logp_old=[-1.0], logp_ref=[-3.0])
    loss, _, metrics = run(subject, [-1.0], batch, entropy=[8.0])
    assert loss == approx(2 + 0.5 * 2 - 0.25 * 8)  # k = 2; d^2 / 2 = 2
    assert metrics["loss/policy"] == (approx(2), 0) and metrics["loss/total"] == (approx(1), 0)


@pytest.mark.parametrize(
    ("p", "engine", "advantage", "kept"),
    [  # bound .2
        (0.8, 0.5, 1.0, False),
        (0.8, 0.5, -1.0, True),
        (0.2, 0.5, -1.0, False),
        (0.2, 0.5, 1.0, True),
        (0.6, 0.5, 1.0, True),
        (0.8, 0.5, 0.0, True),
    ],
)
def test_dppo(p: float, engine: float, advantage: float, kept: bool) -> None:
    """By the present policy, whatever the old one."""
    subject = objective(correction={"dppo": 0.2})
    batch = new_batch([advantage], engine=[math.log(engine)], logp_old=[math.log(p)])
    _, gradient, metrics = run(subject, [math.log(p)], batch)
    assert gradient == approx([-advantage if kept else 0.0])
    assert metrics["correction/dropped"] == (float(not kept), 1)
    assert subject.kept(f64([math.log(p)]), batch).tolist() == [kept]


@pytest.mark.parametrize(
    ("advantage", "drift", "kept"),
    [(-1.0, 0.3, False), (-1.0, 0.1, True), (-1.0, -0.3, True), (1.0, 0.3, True)],
)
def test_opsm(advantage: float, drift: float, kept: bool) -> None:
    """delta .2; of the first answer the two tokens drift by twice that and by nothing."""
    subject = objective(correction={"opsm": 0.2}, surrogate={"clip_low": 0.9, "clip_high": 9.0})
    batch = new_batch(
        [advantage, advantage, -1.0], sequence=[0, 0, 1], logp_old=[-1 + 2 * drift, -1.0, -1.0]
    )
    _, gradient, _ = run(subject, [-1.0] * 3, batch)
    slopes = [-advantage * math.exp(-2 * drift), -advantage] if kept else [0.0, 0.0]
    assert gradient == approx([*slopes, 1.0])
    assert subject.kept(f64([-1.0] * 3), batch).tolist() == [kept, kept, True]


def test_nothing_is_dropped_without_a_correction() -> None:
    batch = new_batch([1.0, -1.0], logp_old=[5.0, -5.0])
    assert objective().kept(f64([-1.0, -1.0]), batch).tolist() == [True, True]


DROPPING: list[dict[str, Any]] = [
    {"kind": "mis"},
    {"kind": "mis", "level": "geometric"},
    {"kind": "mis", "level": "sequence"},
    {"kind": "icepop"},
    {"kind": "seq_mask_tis"},
]


@pytest.mark.parametrize("kind", [k.name for k in SurrogateKind if k.name != "icepop"])
@pytest.mark.parametrize("options", DROPPING)
@pytest.mark.parametrize(
    ("now", "old", "engine"),
    [
        *((-1.0, -1.0, -INF), (-1.0, NAN, -1.0), (NAN, NAN, -1.0), (-INF, INF, -1.0)),
        (-1.0, -1.0, -999.0),
    ],
)
def test_dropped_tokens_bring_nothing(
    kind: str, options: dict[str, Any], now: float, old: float, engine: float
) -> None:
    """An answer that cannot be compared leaves a finite loss, the one without it."""
    if kind.startswith("gspo") and options["kind"] in ("mis", "icepop"):
        options = {"kind": "mis", "level": "sequence"}  # single tokens cannot be dropped there
    subject = objective(
        surrogate={"kind": kind},
        correction=options,
        kl={"coef": 0.5, "clamp": 9.0},
        entropy_coef=0.1,
    )
    good = {"logp_old": [-1.1, -0.9], "logp_ref": [-1.0, -1.5], "engine": [-1.2, -1.0]}
    bad = {"logp_old": [old], "logp_ref": [now], "engine": [engine]}
    batch = new_batch([1.0, -1.0], **good)
    both = new_batch([1.0, -1.0, 1.0], sequence=[0, 0, 1], **{k: good[k] + bad[k] for k in good})
    assert subject.kept(f64([-1.0, -1.2, now]), both).tolist() == [True, True, False]
    loss, gradient, metrics = run(subject, [-1.0, -1.2, now], both, entropy=[1.0, 2.0, NAN])
    expected, slopes, _ = run(subject, [-1.0, -1.2], batch, entropy=[1.0, 2.0])
    assert loss == approx(expected) and gradient == approx([*slopes, 0.0])
    assert all(math.isfinite(value) for value, _ in metrics.values())


# --- KL and entropy ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "values", "slopes", "clamped"),
    [  # d = log 2, 0, -2
        ({"estimator": "k2"}, [LOG2**2 / 2, 0, 2], [LOG2, 0, -2], None),
        ({"estimator": "k3"}, [LOG2 - 0.5, 0, math.e**2 - 3], [0.5, 0, 1 - math.e**2], None),
        ({"estimator": "k3_unbiased"}, [LOG2 - 0.5, 0, math.e**2 - 3], [LOG2, 0, -2], None),
        ({"estimator": "abs"}, [LOG2, 0, 2], [1, 0, -1], None),
        ({"estimator": "k2", "clamp_log_ratio": 1.0}, [LOG2**2 / 2, 0, 0.5], [LOG2, 0, 0], 1),
        ({"estimator": "k2", "clamp_log_ratio": 0.5}, [0.125, 0, 0.125], [0, 0, 0], 2),
        ({"estimator": "abs", "clamp": 1.0}, [LOG2, 0, 1], [1, 0, 0], 1),
        # d held at -1 is an estimate of 1 there: |-1|, above .6; log 2 = .693 is, too
        ({"estimator": "abs", "clamp": 0.6, "clamp_log_ratio": 1.0}, [0.6, 0, 0.6], [0, 0, 0], 2),
    ],
)
def test_kl_in_the_loss(
    options: dict[str, Any], values: list[float], slopes: list[float], clamped: int | None
) -> None:
    """A = 0: nothing but the KL, weights 1, 2, 3, coefficient 1/2."""
    batch = new_batch(
        [0.0] * 3, weight=[1.0, 2.0, 3.0], logp_ref=[-1 - LOG2, -1.0, 1.0], logp_old=[-1.0] * 3
    )
    loss, gradient, metrics = run(objective(kl={"coef": 0.5, **options}), [-1.0] * 3, batch)
    assert loss == approx(0.5 * sum((i + 1) * v for i, v in enumerate(values)))
    assert gradient == approx([0.5 * (i + 1) * s for i, s in enumerate(slopes)])
    assert metrics["policy/kl"] == (approx(sum(values)), 3)
    assert metrics["loss/policy"] == (0.0, 0)
    assert metrics.get("policy/kl_clamped") == (None if clamped is None else (clamped, 3))


def test_a_kl_in_the_reward_is_not_in_the_loss() -> None:
    batch = new_batch([1.0], logp_ref=[5.0])
    without = run(objective(), [-1.0], batch)
    assert run(objective(kl={"coef": 0.5, "place": "reward"}), [-1.0], batch) == without
    assert "policy/kl" not in without[2]


def test_a_kl_coefficient_needs_a_reference() -> None:
    with pytest.raises(AssertionError, match="reference"):
        run(objective(kl={"coef": 0.5}), [-1.0], new_batch([1.0]))


@pytest.mark.parametrize("coef", [0.0, 0.25])
def test_the_entropy_bonus(coef: float) -> None:
    entropy = f64([1.0, 3.0]).requires_grad_()
    batch = new_batch([1.0, 1.0], weight=[0.5, 2.0])
    logp = f64([-1.0, -2.0]).requires_grad_()
    loss, metrics = objective(entropy_coef=coef)(logp, entropy, batch)
    assert loss.item() == approx(-2.5 - coef * 6.5)
    (slope,) = torch.autograd.grad(loss, [entropy], allow_unused=True)
    assert slope is None if coef == 0 else slope.tolist() == [-0.125, -0.5]
    assert metrics["policy/entropy"][0].item() == 4.0
    assert all(v.dtype == torch.float64 and not v.requires_grad for v, _ in metrics.values())


# --- every combination ---------------------------------------------------------------------------

LENGTHS = [3, 1, 4, 2, 1, 2]  # two answers a group
LOW, HIGH = math.log(0.8), math.log(1.3)


def weighed_batch(mode: Aggregation) -> tuple[MicroBatch, list[float], list[float]]:
    """(batch, logp, entropy) of six answers with some tokens left out, away from every kink."""
    rng = np.random.default_rng(11)
    samples = []
    for i, n in enumerate(LENGTHS):
        logp = -rng.uniform(0.3, 2, n)
        moved = rng.choice([-0.5, -0.1, 0.12, 0.6], n)
        samples.append(
            Sample(
                tokens=np.arange(n + 2, dtype=np.int32),
                prompt_length=2,
                logp_engine=(logp - moved - rng.normal(0, 0.1, n)).astype(np.float32),
                advantage=np.full(n, (-1) ** i * (1 + i / 4), np.float32),
                weight=np.array([1.0] * (n - 1) + [float(i != 2)], np.float32),
                version=np.zeros(n, np.int32),
                group=i // 2,
                logp_old=(logp - moved).astype(np.float32),
                logp_ref=(logp + rng.choice([-0.7, 0.2, 0.5], n)).astype(np.float32),
                proximal=logp.astype(np.float32),  # carries the logprobs through the packing
            )
        )
    packed = pack(weigh(samples, AlgoConfig(aggregation=mode), max_tokens=5))
    assert packed.proximal is not None
    names = ("advantage", "weight", "logp_engine", "logp_old", "logp_ref")
    wide = {name: getattr(packed, name).double() for name in names}
    logp = packed.proximal.double().tolist()
    batch = replace(packed, proximal=None, **wide)
    means = np.bincount(batch.sequence, f64(logp) - wide["logp_old"]) / np.bincount(batch.sequence)
    assert min(abs(x - kink) for x in means for kink in (LOW, HIGH)) > 0.01
    return batch, logp, rng.uniform(0.1, 2, len(logp)).tolist()


def by_hand(
    kind: str, estimator: str, batch: MicroBatch, logp: list[float], entropy: list[float]
) -> tuple[float, list[float]]:
    """(loss, gradient) with KL coefficient .3, entropy coefficient .05, TIS up to 1.05."""
    assert batch.logp_old is not None and batch.logp_ref is not None
    size, of = len(logp), batch.sequence.tolist()
    old, ref, engine = (x.tolist() for x in (batch.logp_old, batch.logp_ref, batch.logp_engine))
    moved = [logp[t] - old[t] for t in range(size)]
    loss, gradient = 0.0, [0.0] * size
    for t in range(size):
        peers = [u for u in range(size) if of[u] == of[t]]
        whole = kind.startswith("gspo")
        x = sum(moved[u] for u in peers) / len(peers) if whole else moved[t]
        a, w, rho = batch.advantage[t].item(), batch.weight[t].item(), math.exp(x)
        c = min(math.exp(old[t] - engine[t]), 1.05)
        held = math.exp(min(max(x, LOW), HIGH))
        outside = not LOW <= x <= HIGH
        if kind in ("clip", "gspo", "gspo_token"):
            term = -min(rho * a, held * a)
            slope = -rho * a if rho * a <= held * a else 0.0
        elif kind == "cispo":
            term, slope = -held * a * logp[t], -held * a
        elif kind == "sapo":
            tau = 1.0 if a > 0 else 1.25
            term, slope = -a * 4 / tau * gate(tau * (rho - 1)), sapo_slope(a, rho, tau)
        elif kind == "icepop":
            term = slope = 0.0 if outside else -rho * a
        else:
            term, slope = -a * logp[t], -a
        d = logp[t] - ref[t]
        kl, kl_slope = {
            "k2": (d * d / 2, d),
            "k3": (math.exp(-d) + d - 1, 1 - math.exp(-d)),
            "abs": (abs(d), math.copysign(1, d)),
            "k3_unbiased": (math.exp(-d) + d - 1, d),
        }[estimator]
        loss += w * (c * term + 0.3 * kl - 0.05 * entropy[t])
        for u in peers if kind == "gspo" else [t]:
            gradient[u] += w * c * slope / (len(peers) if kind == "gspo" else 1)
        gradient[t] += w * 0.3 * kl_slope
    return loss, gradient


@pytest.mark.parametrize("mode", Aggregation)
@pytest.mark.parametrize("estimator", ["k2", "k3", "abs", "k3_unbiased"])
@pytest.mark.parametrize("kind", [kind.name for kind in SurrogateKind])
def test_loss_and_gradient_of_every_combination(
    kind: str, estimator: str, mode: Aggregation
) -> None:
    """By the formula; and, where no term's gradient is another than its value's, by differences."""
    subject = objective(
        surrogate={"kind": kind, "tau_negative": 1.25},
        # the ratio of icepop is to the engine: nothing is left to correct
        correction={} if kind == "icepop" else {"kind": "tis", "high": 1.05},
        kl={"coef": 0.3, "estimator": estimator},
        entropy_coef=0.05,
        aggregation=mode,
    )
    batch, logp, entropy = weighed_batch(mode)
    if kind == "icepop":
        batch = replace(batch, logp_engine=batch.logp_old)
    loss, gradient, _ = run(subject, logp, batch, entropy)
    expected, slopes = by_hand(kind, estimator, batch, logp, entropy)
    assert loss == approx(expected)
    assert gradient == approx(slopes)
    if kind not in ("gspo_token", "cispo") and estimator != "k3_unbiased":
        inputs = [f64(values).requires_grad_() for values in (logp, entropy)]
        assert torch.autograd.gradcheck(lambda x, h: subject(x, h, batch)[0], inputs)


# --- micro-batches -------------------------------------------------------------------------------

MANY: list[dict[str, Any]] = [
    {"surrogate": {"kind": kind.name}, "kl": {"coef": 0.5, "clamp": 0.2}, "entropy_coef": 0.1}
    for kind in SurrogateKind
] + [
    {"correction": {"kind": "mis", "dppo": 0.01}, "kl": {"coef": 0.5}},
    {"correction": {"kind": "seq_mask_tis", "opsm": 0.01, "high": 1.02}},
]


@pytest.mark.parametrize("options", MANY)
def test_an_empty_micro_batch_still_has_a_backward(options: dict[str, Any]) -> None:
    """A rank without work must run backward too, with the same metrics as the others."""
    subject = objective(**options)
    loss, gradient, metrics = run(subject, [], new_batch([], logp_old=[], logp_ref=[]))
    assert loss == 0.0 and gradient == []
    assert all(found == (0.0, 0) for found in metrics.values())
    full = run(subject, [-1.0], new_batch([1.0], logp_old=[-1.0], logp_ref=[-1.0]))[2]
    assert metrics.keys() == full.keys()


@pytest.mark.parametrize("options", MANY)
def test_loss_gradient_and_metrics_add_up_over_micro_batches(options: dict[str, Any]) -> None:
    subject = objective(**options)
    batch, logp, entropy = weighed_batch(Aggregation.token_mean)
    whole = run(subject, logp, batch, entropy)
    parts = []
    for answers in ([0, 1], [], [2, 3, 4], [5]):
        at = [t for t, s in enumerate(batch.sequence.tolist()) if s in answers]
        fields = ("advantage", "weight", "logp_engine", "logp_old", "logp_ref")
        part = replace(
            batch,
            **{name: getattr(batch, name)[at] for name in (*fields, "rows", "targets")},
            sequence=torch.tensor([answers.index(int(batch.sequence[t])) for t in at]).long(),
            sequences=len(answers),
        )
        parts.append(run(subject, [logp[t] for t in at], part, [entropy[t] for t in at]))
    assert sum(part[0] for part in parts) == approx(whole[0])
    assert [x for part in parts for x in part[1]] == approx(whole[1])
    for key, found in whole[2].items():
        assert np.sum([part[2][key] for part in parts], axis=0).tolist() == approx(list(found)), key
    if "correction" in options:
        assert 0 < whole[2]["correction/dropped"][0] < len(logp)


@pytest.mark.parametrize(
    ("limit", "ratio", "refused"),
    [
        (None, 99.0, False),
        (5.0, 5.0, False),
        (5.0, 5.01, True),
        (5.0, 0.1, False),
        (5.0, NAN, True),
    ],
)
def test_a_mini_batch_of_too_large_a_mean_ratio_is_refused(
    limit: float | None, ratio: float, refused: bool
) -> None:
    subject = objective(surrogate={"max_mean_ratio": limit})
    message = f"mean ratio {ratio:.3g} > max_mean_ratio 5.0"
    assert subject.refusal({"policy/ratio": ratio}) == (message if refused else None)


def test_shapes_are_checked_in_tests() -> None:
    """The pytest flag --jaxtyping-packages is at work: a wrong shape would broadcast otherwise."""
    with pytest.raises(TypeCheckError):
        objective()(torch.zeros(3), torch.zeros(1), new_batch([1.0] * 3))


# --- in parts ------------------------------------------------------------------------------------

CORRECTIONS: list[dict[str, Any]] = [
    {},
    *(
        {"kind": kind, "level": level, "low": 0.5, "high": 2.0}
        for kind in ("tis", "mis")
        for level in ("token", "sequence", "geometric")
    ),
    {"kind": "icepop", "level": "token", "low": 0.5, "high": 2.0},
    {"kind": "seq_mask_tis", "level": "geometric", "low": 0.9, "high": 1.1},
    {"dppo": 0.1},
    {"opsm": 0.05},
]


def in_parts(
    subject: Objective, logp: Tensor, entropy: Tensor, batch: MicroBatch, parts: list[slice]
) -> dict[str, Tensor]:
    """Loss, both gradients and the sums of all metrics, with the batch given in parts."""
    leaves = logp.clone().requires_grad_(), entropy.clone().requires_grad_()
    total: dict[str, Tensor] = {"loss": f64(0.0)}
    for part in parts:
        loss, metrics = subject(leaves[0][part], leaves[1][part], batch.part(part))
        total["loss"] = total["loss"] + loss
        for key, (value, count) in metrics.items():
            pair = torch.stack([value.double(), torch.as_tensor(count).double()])
            total[key] = total.get(key, torch.zeros(2, dtype=torch.float64)) + pair
    gradients = torch.autograd.grad(total["loss"], leaves, allow_unused=True)
    zero = torch.zeros_like(logp)
    found = {"d_logp": gradients[0], "d_entropy": gradients[1]}
    return total | {key: zero if value is None else value for key, value in found.items()}


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
@pytest.mark.parametrize("kind", [kind.name for kind in SurrogateKind])
def test_parts_add_up_if_and_only_if_it_says_so(kind: str, correction: dict[str, Any]) -> None:
    """Two answers of 30 tokens, cut in the middle of each; what the halves have drifted cancels."""
    old = {"old_policy": OldPolicy.engine} if kind == "icepop" else {}
    options = {"surrogate": {"kind": kind}, "correction": correction, "kl": {"coef": 0.1}, **old}
    try:
        subject = objective(entropy_coef=0.01, **options)
    except ValueError:
        pytest.skip("no legal combination")
    generator = torch.Generator().manual_seed(0)

    def near(x: Tensor, by: float) -> Tensor:
        return x + by * torch.randn(60, generator=generator, dtype=torch.float64)

    logp, drift = near(f64([-2.0] * 60), 0.5), f64(([0.3] * 15 + [-0.3] * 15) * 2)
    batch = replace(
        new_batch([1.0] * 30 + [-1.0] * 30, sequence=[0] * 30 + [1] * 30),
        logp_old=near(logp + drift, 0.1),
        logp_engine=near(logp, 0.1),
        logp_ref=near(logp, 0.3),
        weight=torch.rand(60, generator=generator, dtype=torch.float64),
    )
    entropy = near(f64([1.0] * 60), 0.1)
    whole = in_parts(subject, logp, entropy, batch, [slice(0, 60)])
    parts = in_parts(subject, logp, entropy, batch, [slice(0, 17), slice(17, 45), slice(45, 60)])
    equal = all(torch.allclose(parts[key], whole[key], rtol=1e-12, atol=1e-14) for key in whole)
    assert equal == subject.per_token
