"""Causes of the logprob gap, told apart on real softmaxes whose mismatch is known."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from peergrad.algo.mismatch import CAUSES, Tokens, attribute, gap_tokens, worst_tokens
from peergrad.algo.samples import Sample, make_samples
from peergrad.data import Group, Prompt, Rollout

LENGTH = 40  # of every answer
COUNT = 100 * LENGTH
VOCAB = 50


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def truncate(logp: np.ndarray, *, top_k: int | None = None, top_p: float = 1.0) -> np.ndarray:
    """The distribution renormalised over the tokens that top-k and top-p keep."""
    order = np.argsort(-logp, axis=1)
    ranked = np.exp(np.take_along_axis(logp, order, axis=1))
    keep = (np.cumsum(ranked, axis=1) - ranked < top_p) & (np.arange(VOCAB) < (top_k or VOCAB))
    kept = np.zeros_like(keep)
    np.put_along_axis(kept, order, keep, axis=1)
    return log_softmax(np.where(kept, logp, -np.inf))


@dataclass(frozen=True)
class Case:
    """Sampled from the engine, with every token's whole trainer and engine distribution."""

    tokens: Tokens
    trainer: np.ndarray  # [N, V] log probabilities
    engine: np.ndarray  # [N, V]

    @property
    def kept_mass(self) -> float:
        return float(np.where(np.isfinite(self.engine), np.exp(self.trainer), 0).sum(1).mean())


def new_logits(seed: int = 0, *, std: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=std, size=(COUNT, VOCAB))


def sample(trainer: np.ndarray, engine: np.ndarray, lag: int | np.ndarray = 0) -> Case:
    """From log probabilities ``[N, V]`` of both sides."""
    noise = np.random.default_rng(1).gumbel(size=engine.shape)
    drawn = (np.arange(COUNT), np.argmax(engine + noise, axis=1))
    position = np.arange(COUNT) % LENGTH
    tokens = Tokens(
        logp=trainer[drawn],
        logp_engine=engine[drawn],
        entropy=-(np.exp(trainer) * trainer).sum(axis=1),
        lag=np.broadcast_to(np.int64(lag), COUNT),
        first=position == 0,
        last=position == LENGTH - 1,
        sample=np.arange(COUNT) // LENGTH,
        position=position,
    )
    return Case(tokens, trainer, engine)


def shares(row: dict[str, float]) -> dict[str, float]:
    """By cause; checks that they are a division of the whole."""
    found = {cause: row[f"logprob_gap/share_{cause}"] for cause in CAUSES}
    assert all(-1e-12 < share < 1 + 1e-12 for share in found.values()), found
    assert sum(found.values()) == pytest.approx(1)
    return found


def estimates(row: dict[str, float]) -> tuple[float, float]:
    return row["logprob_gap/temperature_ratio"], row["logprob_gap/kept_mass"]


def test_no_gap() -> None:
    logp = log_softmax(new_logits())
    row = attribute(sample(logp, logp).tokens, noise=1e-5)
    assert row == {
        **dict.fromkeys([f"logprob_gap/{key}" for key in ("mean", "p99", "max", "fresh")], 0.0),
        **{f"logprob_gap/share_{cause}": 0.0 for cause in CAUSES},
        "logprob_gap/temperature_ratio": 1.0,
        "logprob_gap/kept_mass": 1.0,
    }


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("ratio", [1.02, 0.98, 1.2, 1 / 1.2])
def test_temperature(ratio: float, mixed: bool) -> None:
    logits = new_logits()
    if mixed:  # of sure and of unsure contexts
        logits *= np.random.default_rng(2).choice([0.3, 1, 3], size=(COUNT, 1))
    case = sample(log_softmax(logits / ratio), log_softmax(logits))
    row = attribute(case.tokens, noise=1e-5)
    assert shares(row)["temperature"] > 0.9
    assert row["logprob_gap/temperature_ratio"] == pytest.approx(ratio, rel=0.01)
    assert row["logprob_gap/kept_mass"] == 1


@pytest.mark.parametrize("ratio", [1.02, 1.2])
def test_temperature_amid_rounding(ratio: float) -> None:
    logits = new_logits()
    noisy = logits + np.random.default_rng(3).normal(scale=0.02, size=logits.shape)
    case = sample(log_softmax(logits / ratio), log_softmax(noisy))
    row = attribute(case.tokens, noise=0.03)
    found = shares(row)
    assert found["temperature"] + found["precision"] > 0.95
    assert row["logprob_gap/temperature_ratio"] == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("spread", [1.0, 3.0])  # with 3, most contexts keep nearly everything
@pytest.mark.parametrize("limits", [{"top_p": 0.9}, {"top_p": 0.95}, {"top_k": 10}])
def test_truncation(limits: dict[str, float], spread: float) -> None:
    logits = new_logits() * np.random.default_rng(2).choice([1, spread], size=(COUNT, 1))
    logp = log_softmax(logits)
    case = sample(logp, truncate(logp, **limits))  # type: ignore[arg-type]
    row = attribute(case.tokens, noise=1e-5)
    assert shares(row)["truncation"] > 0.8
    ratio, kept = estimates(row)
    assert kept == pytest.approx(case.kept_mass, rel=0.01)
    assert ratio == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("ratio", [1.1, 0.9])
def test_temperature_and_truncation(ratio: float) -> None:
    logits = new_logits()
    case = sample(log_softmax(logits / ratio), truncate(log_softmax(logits), top_p=0.9))
    row = attribute(case.tokens, noise=1e-5)
    found = shares(row)
    assert found["temperature"] + found["truncation"] > 0.95
    assert min(found["temperature"], found["truncation"]) > 0.2
    assert estimates(row) == pytest.approx((ratio, case.kept_mass), rel=0.01)


@pytest.mark.parametrize("fresh", [0.0, 0.1, 0.9])
def test_version_lag(fresh: float) -> None:
    """Lagged tokens come from other logits; rounding is everywhere."""
    rng = np.random.default_rng(4)
    lag = rng.integers(1, 3, size=COUNT) * (rng.random(COUNT) >= fresh)
    logits = new_logits()
    moved = logits + np.where(lag, 0.2, 0.005)[:, None] * rng.normal(size=logits.shape)
    case = sample(log_softmax(logits), log_softmax(moved), lag)
    row = attribute(case.tokens, noise=0.03)
    assert shares(row)["version"] > 0.95
    assert estimates(row) == (1, 1)
    if fresh:
        mean = np.abs(case.tokens.gap[lag == 0]).mean()
        assert row["logprob_gap/fresh"] == pytest.approx(mean)
    else:
        assert "logprob_gap/fresh" not in row


def test_few_lagged_tokens_of_uneven_gaps() -> None:
    """Six tokens were drawn before a sync, forty after it. The lagged squares are 2.25, .04, .01,
    .01, .0025, 0: mean .385, error .36, so that the mean alone would leave it to chance. By ranks
    five of them beat all forty and one ties: 220 wins of 240, 120 expected, error 30.7."""
    lagged, fresh = [1.5, -0.2, 0.1, -0.1, 0.05, 0.0], [0.0] * 40
    logp = [-2.0] * 46
    engine = [x - gap for x, gap in zip(logp, lagged + fresh, strict=True)]
    row = attribute(tiny(logp, engine, [1] * 6 + [0] * 40), noise=1e-5)
    assert shares(row)["version"] > 0.99


def test_a_wild_token_among_many_lagged_ones() -> None:
    """The lagged tokens are a little higher by rank, but what they have more is one token's."""
    rng = np.random.default_rng(3)
    gap = np.concatenate([rng.normal(scale=1e-3, size=4000), rng.normal(scale=1.3e-3, size=1000)])
    gap[-1] = 5.0
    logp = np.full(5000, -2.0)
    row = attribute(tiny(list(logp), list(logp - gap), [0] * 4000 + [1] * 1000), noise=1e-3)
    assert shares(row)["version"] < 0.01 and shares(row)["unexplained"] > 0.99


def test_a_temperature_is_not_the_lag() -> None:
    """Lagged tokens at the level of the fresh ones are divided as those are."""
    logits = new_logits()
    lag = (np.arange(COUNT) % 10 > 0).astype(np.int64)
    case = sample(log_softmax(logits / 1.1), log_softmax(logits), lag)
    found = shares(attribute(case.tokens, noise=1e-5))
    assert found["version"] < 0.05 and found["temperature"] > 0.9


@pytest.mark.parametrize("end", ["first", "last"])
def test_ends(end: str) -> None:
    """As when one side leaves out the end of sequence, or a wrong token comes first."""
    logp = log_softmax(new_logits())
    tokens = sample(logp, logp).tokens
    broken = replace(tokens, logp_engine=tokens.logp_engine + 2.0 * getattr(tokens, end))
    row = attribute(broken, noise=1e-5)
    assert shares(row)["ends"] == pytest.approx(1)
    assert estimates(row) == (1, 1)


def test_a_gap_everywhere_is_not_the_ends() -> None:
    logits = new_logits()
    case = sample(log_softmax(logits / 1.2), log_softmax(logits))
    assert shares(attribute(case.tokens, noise=1e-5))["ends"] < 0.02


def round_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("side", ["trainer", "engine"])
def test_precision(side: str) -> None:
    """Logits rounded to bfloat16 on one side: the larger the logit, the larger the error."""
    logits = new_logits(std=4.0)
    sides = {"trainer": logits, "engine": logits, side: round_bfloat16(logits)}
    case = sample(log_softmax(sides["trainer"]), log_softmax(sides["engine"]))
    assert np.abs(case.tokens.gap).max() > 0.01
    row = attribute(case.tokens, noise=0.03)
    assert shares(row)["precision"] > 0.99
    assert estimates(row) == (1, 1)
    assert shares(attribute(case.tokens, noise=1e-5))["unexplained"] > 0.99


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("std", [0.1, 1.0, 2.0, 4.0])  # of the engine; .1 is nearly uniform
def test_wrong_weights(std: float, seed: int) -> None:
    """Independent logits: neither a line through logp nor the negative mean is a cause."""
    case = sample(log_softmax(new_logits(seed)), log_softmax(new_logits(seed + 10, std=std)))
    row = attribute(case.tokens, noise=0.03)
    assert shares(row)["unexplained"] > 0.95
    assert estimates(row) == (1, 1)


@pytest.mark.parametrize("std", [0.3, 1.0])
def test_disturbed_weights(std: float) -> None:
    logits = new_logits()
    noise = np.random.default_rng(5).normal(scale=std, size=logits.shape)
    row = attribute(sample(log_softmax(logits), log_softmax(logits + noise)).tokens, noise=0.03)
    assert shares(row)["unexplained"] > 0.8
    assert row["logprob_gap/temperature_ratio"] == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("limit", [1.0, 0.9])
@pytest.mark.parametrize("size", [-30.0, -3.0, 3.0, 30.0])
@pytest.mark.parametrize("at", ["likely", "unlikely", "lagged"])
def test_one_wild_token(at: str, size: float, limit: float) -> None:
    """It stays unexplained, on a token of any leverage, with and without another cause."""
    rng = np.random.default_rng(6)
    logits = new_logits()
    noisy = log_softmax(logits + rng.normal(scale=0.002, size=logits.shape))
    tokens = sample(log_softmax(logits), truncate(noisy, top_p=limit), np.arange(COUNT) % 2).tokens
    inner = ~tokens.first & ~tokens.last & (tokens.lag == (at == "lagged"))
    x = np.where(inner, tokens.logp + tokens.entropy, np.nan)
    where = int(np.nanargmin(x) if at == "unlikely" else np.nanargmax(x))
    engine = tokens.logp_engine.copy()
    engine[where] -= size
    wild = replace(tokens, logp_engine=engine)
    row = attribute(wild, noise=0.03)
    found = shares(row)
    assert max(found["temperature"], found["version"], found["ends"]) < 0.02
    assert found["truncation"] * np.sum(wild.gap**2) <= 1.1 * np.sum(tokens.gap**2)
    assert found["unexplained"] > (0.8 if abs(size) > 3 else 0)
    assert row["logprob_gap/max"] == np.abs(wild.gap).max()


def tiny(logp: list[float], logp_engine: list[float], lag: list[int], first: int = -1) -> Tokens:
    count = len(logp)
    return Tokens(
        logp=np.array(logp, np.float64),
        logp_engine=np.array(logp_engine, np.float64),
        entropy=np.ones(count),
        lag=np.array(lag, np.int64),
        first=np.arange(count) == first,
        last=np.zeros(count, bool),
        sample=np.zeros(count, np.int64),
        position=np.arange(count),
    )


def test_by_hand() -> None:
    # Gaps 5 (lagged), 3 (first), 1 and -1: squares 25, 9, 1, 1, in all 36.
    tokens = tiny([-1, -2, -3, -4], [-6, -5, -4, -3], [1, 0, 0, 0], first=1)
    row = attribute(tokens, noise=0.5)
    assert row.pop("logprob_gap/p99") == pytest.approx(3 + 0.97 * 2)  # at index 2.97 of 1 1 3 5
    assert row == {
        "logprob_gap/mean": 2.5,
        "logprob_gap/max": 5.0,
        "logprob_gap/fresh": pytest.approx(5 / 3),
        # The fresh level is 11 / 3 a token with an error of sqrt(128 / 9 / 3) = 2.18; 25 is 9.8 of
        # these above it. That leaves 11 and 11 / 3, of which 8 in 11 are the first token's own.
        "logprob_gap/share_version": pytest.approx((25 - 11 / 3) / 36),
        "logprob_gap/share_ends": pytest.approx(8 / 11 * (11 + 11 / 3) / 36),
        "logprob_gap/share_temperature": 0.0,
        "logprob_gap/share_truncation": 0.0,
        # Of the rest, 2 of 2 inner tokens, .5^2 of each 1^2 is rounding.
        "logprob_gap/share_precision": pytest.approx(1 / 4 * 3 / 11 * (11 + 11 / 3) / 36),
        "logprob_gap/share_unexplained": pytest.approx(3 / 4 * 3 / 11 * (11 + 11 / 3) / 36),
        "logprob_gap/temperature_ratio": 1.0,
        "logprob_gap/kept_mass": 1.0,
    }


def test_statistics() -> None:
    row = attribute(tiny([-1.0, -2.5, -1.0, -1.0], [-1.5, -1.0, -1.0, -1.0], [0] * 4), noise=0.1)
    # Sorted 0 0 .5 1.5: the quantile .99 lies at index 2.97.
    expected = {"mean": 0.5, "p99": pytest.approx(0.5 + 0.97), "max": 1.5, "fresh": 0.5}
    assert {key: row[f"logprob_gap/{key}"] for key in expected} == expected


def test_no_tokens() -> None:
    assert attribute(tiny([], [], []), noise=0.1) == {}
    assert attribute(gap_tokens([], [], [], version=3), noise=0.1) == {}


@pytest.mark.parametrize(("lag", "cause"), [(0, "unexplained"), (1, "version")])
def test_one_token(lag: int, cause: str) -> None:
    assert shares(attribute(tiny([-1.0], [-3.0], [lag]), noise=0.01))[cause] > 0.99


@pytest.mark.parametrize("count", [20, 49])
def test_few_tokens_have_no_temperature(count: int) -> None:
    logits = new_logits()
    tokens = sample(log_softmax(logits / 1.2), log_softmax(logits)).tokens
    few = Tokens(**{k: v[:count] for k, v in vars(tokens).items()})
    few = replace(few, first=np.zeros(count, bool), last=np.zeros(count, bool))
    row = attribute(few, noise=1e-5)
    assert shares(row)["unexplained"] > 0.99
    assert estimates(row) == (1, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_gap_that_is_not_finite_is_not_hidden(value: float) -> None:
    row = attribute(tiny([-1.0, value, -1.0], [-1.0, -1.0, -1.0], [0, 0, 0]), noise=0.1)
    assert set(row) == {f"logprob_gap/{key}" for key in ("mean", "p99", "max", "fresh")}
    bad = [row[f"logprob_gap/{key}"] for key in ("mean", "max", "fresh")]
    assert np.array_equal(bad, [abs(value)] * 3, equal_nan=True)


@pytest.mark.parametrize("noisier", [False, True])
def test_chance_is_no_cause(noisier: bool) -> None:
    """Of 200 sets of pure noise, a few in a thousand lie beyond three standard errors."""
    rng, count = np.random.default_rng(7), 400
    rows = []
    for _ in range(200):
        logp = -rng.exponential(size=count)
        scale = rng.exponential(size=count) if noisier else 1.0  # some tokens more than others
        gap = 0.005 * scale * rng.normal(size=count)
        rows.append(attribute(tiny(list(logp), list(logp - gap), [0] * count), noise=0.03))
    assert sum(estimates(row) != (1, 1) for row in rows) <= 4
    assert np.mean([shares(row)["precision"] for row in rows]) > 0.98


def new_groups() -> list[Group]:
    def rollout(tokens: list[int], logprobs: list[float], *spans: tuple[int, int, int]) -> Rollout:
        return Rollout(np.array(tokens, np.int32), np.float32(logprobs), spans, "stop", "")

    prompts = [
        Prompt("a", np.array([9, 9], np.int32), "", ""),
        Prompt("b", np.ones(1, int), "", ""),
    ]
    one, two = rollout([5, 6], [-0.5, -1.0], (3, 0, 2)), rollout([7], [-0.25], (4, 0, 1))
    three = rollout([8, 3, 2], [-0.5, -0.5, -0.5], (2, 0, 1), (4, 1, 3))
    return [Group("2/a", prompts[0], (one, two)), Group("2/b", prompts[1], (three,))]


def new_tokens() -> tuple[Tokens, list[Group], list[Sample]]:
    """One token without weight, one that the trainer made NaN."""
    groups = new_groups()
    samples = make_samples(groups)
    samples[2] = replace(samples[2], weight=np.array([1, 0, 1], np.float32))
    logp = [np.float32(x) for x in ([-0.5, -1.25], [np.nan], [-0.5, np.nan, -2.5])]
    entropy = [np.float32(x) for x in ([1, 2], [3], [4, np.nan, 5])]
    return gap_tokens(samples, logp, entropy, version=4), groups, samples


def test_tokens_of_samples() -> None:
    tokens, _, _ = new_tokens()
    expected = {
        "logp": [-0.5, -1.25, np.nan, -0.5, -2.5],
        "logp_engine": [-0.5, -1.0, -0.25, -0.5, -0.5],
        "gap": [0, -0.25, np.nan, 0, -2],
        "entropy": [1, 2, 3, 4, 5],
        "lag": [1, 1, 0, 2, 0],
        "first": [True, False, True, True, False],
        "last": [False, True, True, False, True],
        "sample": [0, 0, 1, 2, 2],
        "position": [0, 1, 0, 0, 2],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(tokens, name), values, err_msg=name)


def test_worst_tokens() -> None:
    tokens, groups, samples = new_tokens()
    rows = worst_tokens(tokens, groups, samples, count=3)
    assert rows[1:] == [
        {
            "group": "2/b",
            "rollout": 0,
            "position": 2,
            "of": 3,
            "token": 2,
            "lag": 0,
            "logp_trainer": -2.5,
            "logp_engine": -0.5,
            "gap": -2.0,
            "entropy": 5.0,
            "first": False,
            "last": True,
        },
        {
            "group": "2/a",
            "rollout": 0,
            "position": 1,
            "of": 2,
            "token": 6,
            "lag": 1,
            "logp_trainer": -1.25,
            "logp_engine": -1.0,
            "gap": -0.25,
            "entropy": 2.0,
            "first": False,
            "last": True,
        },
    ]
    worst = rows[0]
    assert (worst["group"], worst["rollout"], worst["token"]) == ("2/a", 1, 7)
    assert np.isnan(worst["gap"]) and json.loads(json.dumps(rows))[1:] == rows[1:]
    assert len(worst_tokens(tokens, groups, samples, count=99)) == 5
