"""Stages of the loop with small stand-ins for engine and trainer."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from peergrad.algo.mismatch import Tokens, freshest
from peergrad.algo.samples import make_samples
from peergrad.config import Config, Dtype, OnGap, OnNonfinite
from peergrad.data import Group, Prompt, Rollout
from peergrad.observing.metrics import Metrics
from peergrad.rollout.evaluation import EvaluationResult
from peergrad.rollout.proof import Proof
from peergrad.rounding import Rounding
from peergrad.stages import (
    check_gap,
    evaluate,
    mean_metrics,
    stop_if_nonfinite,
    sync_weights,
    warn_of_lost_step,
)


def new_group(name: str, rewards: list[float]) -> Group:
    tokens, logprobs = np.array([7, 1], np.int32), np.array([-0.5, -0.25], np.float32)
    rollouts = tuple(Rollout(tokens, logprobs, ((0, 0, 2),), "stop", "", r) for r in rewards)
    return Group(name, Prompt(name, np.array([3], np.int32), "", ""), rollouts)


def update(
    finite: bool = True, refusal: str | None = None, logp: float = -1.0, **metrics: float
) -> Any:
    scores = SimpleNamespace(logp=[np.array([math.nan, logp])])  # the first was not asked for
    return SimpleNamespace(metrics=metrics, finite=finite, refusal=refusal, scores=scores)


def test_mean_metrics(caplog: pytest.LogCaptureFixture) -> None:
    means = mean_metrics([update(a=1.0, b=2.0), update(a=2.0, b=6.0)])
    assert means == {"a": 1.5, "b": 4.0, "optim/refused": 0.0}
    assert caplog.text == ""
    assert mean_metrics([update(a=1.0), update(a=2.0, refusal="too far")])["optim/refused"] == 0.5
    assert "1 of 2 updates not made: too far" in caplog.text
    assert math.isnan(mean_metrics([update(a=1.0), update(a=math.nan)])["a"])  # not hidden


class Recorder:
    """``Rollouts.dump`` that remembers what it was given."""

    def __init__(self) -> None:
        self.dumped: list[tuple[list[str], int]] = []

    def dump(self, groups: list[Group], step: int) -> Path:
        self.dumped.append(([group.id for group in groups], step))
        return Path("rollouts/step_000005.parquet")


BAD = {"loss/total": math.nan, "optim/grad_norm": math.inf}
FINE = {"loss/total": 0.1, "optim/grad_norm": 1.0}


def stop(action: OnNonfinite, *updates: Any) -> Recorder:
    config, recorder = Config(), Recorder()
    config.optim.on_nonfinite = action
    stop_if_nonfinite(config, recorder, [new_group("a", [0, 1])], updates, 5)  # type: ignore[arg-type]
    return recorder


def test_finite_updates_go_on() -> None:
    assert stop(OnNonfinite.stop, update(**FINE), update(**FINE)).dumped == []


def test_nonfinite_updates_stop_the_run() -> None:
    message = (
        r"^step 5: loss nan with gradient norm inf is not finite; .* the rollouts are in "
        r"rollouts/step_000005\.parquet; set optim\.on_nonfinite=skip"
    )
    with pytest.raises(RuntimeError, match=message):
        stop(OnNonfinite.stop, update(**FINE), update(False, **BAD))


def test_nonfinite_updates_can_be_skipped(caplog: pytest.LogCaptureFixture) -> None:
    recorder = stop(OnNonfinite.skip, update(False, **BAD), update(**FINE))
    assert recorder.dumped == [(["a"], 4)]  # recorded after 4 steps: the file of step 5
    assert "step 5: loss nan" in caplog.text


@pytest.mark.parametrize("action", OnNonfinite)
def test_broken_weights_stop_the_run_whatever_is_configured(action: OnNonfinite) -> None:
    """To skip would help no step that follows."""
    with pytest.raises(RuntimeError, match=r"^step 5: .*the weights themselves are broken"):
        stop(action, update(False, logp=math.nan, **BAD))


NUMBERS = {
    **{"reward/flat_groups": 0.5, "reward/mean": 0.25},
    "response/truncated": 0.5,
}


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({}, []),
        (
            {"reward/flat_groups": 1.0},
            ["equal rewards (mean 0.25)", "rollouts/step_000003.parquet"],
        ),
        (
            {"response/truncated": 1.0},
            ["every answer was cut off at rollout.max_new_tokens = 1024"],
        ),
    ],
)
def test_a_step_that_teaches_nothing_is_said(
    numbers: dict[str, float], said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_lost_step(Config(), NUMBERS | numbers, step=3)
    assert len(caplog.records) == bool(said)
    assert all(part in caplog.text for part in said)


def test_what_is_replayed_is_where_it_was_recorded(caplog: pytest.LogCaptureFixture) -> None:
    config = Config()
    config.rollout.replay = "runs/a"
    warn_of_lost_step(config, NUMBERS | {"reward/flat_groups": 1.0}, step=3)
    assert "look at runs/a/rollouts/step_000003.parquet: is" in caplog.text


class Engine:
    """``Rollouts.load_weights`` with a given answer."""

    def __init__(self, proof: Any) -> None:
        self.proof = proof
        self.loaded: tuple[list[tuple[str, int]], int] | None = None

    def load_weights(self, weights: Any, version: int) -> Any:
        self.loaded = list(weights()), version
        return self.proof


class Trainer:
    """``Policy`` that measures a given canary gap."""

    def __init__(self, gap: float) -> None:
        self.gap = gap

    def weights(self) -> Any:
        yield "w", 1

    def canary_gap(self, group: str) -> float:
        assert group == "canary"
        return self.gap


def sync(config: Config, gap: float, canary: Any = "canary") -> dict[str, float]:
    engine = Engine(Proof(7, verified=12, unverified=3, canary=canary, seconds={"send": 0.5}))
    numbers = sync_weights(config, engine, Trainer(gap), version=4)  # type: ignore[arg-type]
    assert engine.loaded == ([("w", 1)], 4)
    return numbers


def config_with(dtype: Dtype, limit: float | None) -> Config:
    config = Config()
    config.model.dtype, config.rollout.max_canary_gap = dtype, limit
    return config


def test_sync_without_an_engine_says_nothing() -> None:
    numbers = sync_weights(Config(), Engine(None), Trainer(0), version=4)  # type: ignore[arg-type]
    assert numbers == {}


def test_sync_reports_its_proof() -> None:
    proved = {"version/engine": 4.0, "sync/verified": 12.0, "sync/unverified": 3.0}
    proved |= {"sync/servers": 1.0, "time/sync/send": 0.5}
    assert sync(Config(), math.nan, canary=None) == proved
    numbers = sync(Config(), 1e-5)
    assert numbers.pop("time/sync/trainer_canary") >= 0
    assert numbers == {**proved, "sync/canary_gap": 1e-5}


@pytest.mark.parametrize("gap", [2e-4, math.nan])
def test_sync_stops_beyond_the_limit(gap: float) -> None:
    with pytest.raises(RuntimeError, match=r"rollout\.max_canary_gap = 0\.0001: .* \(step 4\); "):
        sync(config_with(Dtype.float32, 1e-4), gap)


@pytest.mark.parametrize(
    ("dtype", "gap", "warned"),
    [
        (Dtype.float32, 5e-4, False),
        (Dtype.float32, 2e-3, True),
        (Dtype.bfloat16, 0.3, False),
        (Dtype.bfloat16, 0.6, True),
        (Dtype.bfloat16, math.nan, True),
    ],
)
def test_sync_warns_of_unusual_gaps(
    caplog: pytest.LogCaptureFixture, dtype: Dtype, gap: float, warned: bool
) -> None:
    with caplog.at_level(logging.WARNING):
        sync(config_with(dtype, None), gap)
    assert ("on the canary text (step 4)" in caplog.text) == warned


class Log(Metrics):
    """Keeps rows."""

    def __init__(self) -> None:
        super().__init__([])
        self.rows: list[tuple[str, int, dict[str, float]]] = []

    def write(self, kind: str, step: int, row: Any) -> None:
        self.rows.append((kind, step, dict(row)))


def test_evaluations_have_rows_of_their_own() -> None:
    result = EvaluationResult(
        version=10,
        prompts=8,
        pass_rate=0.5,
        mean_reward=0.6,
        mean_length=7.0,
        truncated=0.1,
        grading={"reward/failed": 0.25, "reward_part/format": 1.5},
    )
    log = Log()
    rollouts: Any = SimpleNamespace(evaluate=lambda version: result)
    evaluate(rollouts, log, step=10)
    ((kind, step, row),) = log.rows
    assert (kind, step) == ("eval", 10) and row.pop("time/eval") >= 0
    assert row == {
        **{"pass@1": 0.5, "reward": 0.6, "length": 7.0, "truncated": 0.1},
        **{"reward/failed": 0.25, "reward_part/format": 1.5},
    }


def gap(tmp_path: Path, size: float, version: int = 3, **options: Any) -> Log:
    """``check_gap`` of step 4 with every token, of ``version``, ``size`` nats off."""
    config, log = Config(), Log()
    config.model.dtype = Dtype.float32
    vars(config.rollout).update(options)
    log._folder = tmp_path
    tokens, logprobs = np.array([7, 1], np.int32), np.array([-0.5, -0.25], np.float32)
    rollouts = tuple(Rollout(tokens, logprobs, ((version, 0, 2),), "stop", "", r) for r in (0, 1))
    groups = [Group("a", Prompt("a", np.array([3], np.int32), "", ""), rollouts)]
    samples = make_samples(groups)
    scores = SimpleNamespace(
        samples=samples,
        logp=[s.logp_engine + np.float32(size) for s in samples],
        entropy=[np.ones(2, np.float32)] * 2,
    )
    check_gap(config, groups, scores, log, Rounding(config), step=4)  # type: ignore[arg-type]
    return log


RECORDED = "logprob_gap/step_000004.jsonl"


def test_a_usual_gap_is_only_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = gap(tmp_path, 5e-4)._row
    assert row["logprob_gap/fresh"] == pytest.approx(5e-4, rel=1e-3)
    assert caplog.text == "" and not list(tmp_path.iterdir())


def test_an_unusual_gap_is_recorded_and_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gap(tmp_path, 0.25)
    assert "step 4: trainer and engine differ by 2.50e-01 nats a token, mostly " in caplog.text
    worst = [json.loads(line) for line in (tmp_path / RECORDED).read_text().splitlines()]
    assert [(row["group"], row["token"], row["gap"]) for row in worst[:1]] == [("a", 7, 0.25)]
    assert len(worst) == 4


@pytest.mark.parametrize("size", [0.25, math.nan])
def test_a_gap_beyond_the_limit_stops_or_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, size: float
) -> None:
    with pytest.raises(RuntimeError, match=r"^rollout\.max_logprob_gap = 0\.2: step 4: .*=warn$"):
        gap(tmp_path, size, max_logprob_gap=0.2)
    assert (tmp_path / RECORDED).exists()
    gap(tmp_path, size, max_logprob_gap=0.2, on_logprob_gap=OnGap.warn)
    assert "the worst tokens are in logprob_gap/step_000004.jsonl" in caplog.text
    gap(tmp_path / "other", 0.1, max_logprob_gap=0.2)
    assert not (tmp_path / "other").exists()


def test_without_a_fresh_token_the_freshest_are_judged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a run that is one step off: to have no fresh token is not to have no gap."""
    row = gap(tmp_path, 0.05, version=2)._row
    assert "logprob_gap/fresh" not in row
    assert row["logprob_gap/judged"] == pytest.approx(0.05, rel=1e-3)
    assert row["logprob_gap/judged_lag"] == 1
    assert caplog.text == ""  # an update may change that much
    gap(tmp_path, 0.25, version=1)
    assert (
        "step 4: trainer and engine differ by 2.50e-01 nats a token (fewer than 50 tokens are of "
        "the present weights, version 3: these lag up to 2), mostly by version; the worst tokens "
        "are in "
    ) in caplog.text
    with pytest.raises(RuntimeError, match=r"^rollout\.max_logprob_gap = 0\.2: .* to 3\), mostly"):
        gap(tmp_path, 0.25, version=0, max_logprob_gap=0.2)
    with pytest.raises(RuntimeError, match=r"differ by nan nats a token \(fewer"):
        gap(tmp_path, math.nan, version=0, max_logprob_gap=0.2)


def test_only_the_freshest_tokens_are_judged_if_they_are_enough() -> None:
    """Tokens of the present weights among a hundred older ones that are far off: one of them, or
    49, is no proof, and would let a broken engine pass."""

    def tokens(fresh: int) -> Tokens:
        lag = np.array([1] * 100 + [0] * fresh)
        off = np.array([1.0] * 100 + [0.0] * fresh)
        zeros, none = np.zeros(lag.size), np.zeros(lag.size, bool)
        whole = np.arange(lag.size)
        return Tokens(off, zeros, zeros, lag, none, none, 0 * whole, whole)

    assert freshest(tokens(50)) == (0, 0.0)
    assert freshest(tokens(49)) == (1, 100 / 149)
    assert freshest(tokens(1)) == (1, 100 / 101)
    many = tokens(60)
    assert freshest(replace(many, lag=many.lag + 2)) == (2, 0.0)
    few = Tokens(**{key: value[80:120] for key, value in vars(many).items()})
    assert freshest(few) == (1, 0.5)  # 20 of each
    empty = {key: value[:0] for key, value in vars(many).items()}
    assert freshest(Tokens(**empty)) is None
