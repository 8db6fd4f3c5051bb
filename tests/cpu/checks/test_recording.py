"""Whether the policy of a replay is the one that sampled, and what that changes."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from peergrad.algo.plan import Old, make_plan
from peergrad.checks.recording import foreign, settled
from peergrad.config import Config, OldPolicy
from peergrad.running.compose import compose_config
from peergrad.running.keys import groups

PRESETS = sorted(groups()["algo"])


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """What a run with the default preset leaves of its configuration."""
    return record(tmp_path)


def record(folder: Path, *overrides: str) -> Path:
    _, text = compose_config(["model.path=m", "data.source=arithmetic", *overrides])
    (folder / "config.yaml").write_text(text)
    return folder


def replay(folder: Path, *overrides: str) -> Config:
    config, _ = compose_config(["model.path=m", "data.source=arithmetic", *overrides])
    return replace(config, rollout=replace(config.rollout, replay=str(folder)))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_objective_stays_on_policy(tmp_path: Path, preset: str) -> None:
    config = replay(record(tmp_path, f"algo={preset}"), f"algo={preset}")
    assert foreign(config) is None
    assert settled(config) == config


def test_what_does_not_change_the_policy(recording: Path) -> None:
    for more in (
        *("parallel.tensor=2", "run.steps=7", "run.name=y", "checkpoint.every=1"),
        *("optim.on_nonfinite=skip", "reward.workers=2", "rollout.max_concurrency=3"),
        f"model.path={Path('m').absolute()}",
    ):
        assert foreign(replay(recording, more)) is None, more


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("optim.lr=2e-6", "was recorded with optim.lr=1e-06"),
        ("algo.kl.coef=0.5", "was recorded with algo.kl.coef="),
        ("run.seed=1", "was recorded with run.seed=0"),
        ("model.path=n", "was recorded with model.path=m"),
        ("algo.minibatches=2", "was recorded with algo.minibatches=1"),
        ("rollout.max_staleness=1", "was recorded with rollout.max_staleness=0"),
        ("optim.schedule=cosine", "was recorded with optim.schedule=constant"),
        ("algo.sampling.flat_groups=drop", "was recorded with algo.sampling.flat_groups=keep"),
        ("algo.sampling.mean_high=1", "was recorded with algo.sampling.mean_high=None"),
        ("kernels.logits=bfloat16", "was recorded with kernels.logits=float32"),
        ("moe.z_loss_coef=0.1", "was recorded with moe.z_loss_coef=0.0"),
        ("moe.replay=off", "was recorded with moe.replay=auto"),
        ("parallel.megatron={layernorm_zero_centered_gamma: true}", "was recorded with parallel"),
    ],
)
def test_another_course_is_off_policy(recording: Path, change: str, why: str) -> None:
    """The recorded policy's own logprobs are what ratios are taken to: with the pass that a step of
    this run would make of its own weights, they would be 1 on answers that it did not give."""
    config = replay(recording, change)
    assert str(foreign(config)).startswith(why)
    now = settled(config)
    assert now.algo.old_policy is OldPolicy.engine and make_plan(now).old is Old.engine
    assert replace(now, algo=config.algo) == config


def test_the_end_of_a_schedule_is_part_of_the_course(tmp_path: Path) -> None:
    record(tmp_path, "optim.schedule=cosine", "run.steps=20")
    same = replay(tmp_path, "optim.schedule=cosine", "run.steps=10", "optim.decay_steps=20")
    assert foreign(same) is None
    other = replay(tmp_path, "optim.schedule=cosine", "run.steps=10")
    assert foreign(other) == "was recorded with a schedule of 20 steps"


def test_every_attempt_of_the_recorded_run_has_a_say(recording: Path) -> None:
    """A run that was resumed with another learning rate has a config.yaml of the last one only."""
    for name, rate in (("20260101-000000-1", "1e-6"), ("20260102-000000-1", "2e-6")):
        (recording / "logs" / name).mkdir(parents=True)
        record(recording / "logs" / name, f"optim.lr={rate}")
    record(recording, "optim.lr=2e-6")
    other = "was recorded in several attempts, one of them with optim.lr=1e-06"
    assert foreign(replay(recording, "optim.lr=2e-6")) == other
    (recording / "logs/20260101-000000-1/config.yaml").unlink()  # it never got so far
    assert foreign(replay(recording, "optim.lr=2e-6")) is None


def test_recordings_from_before_there_were_experts_have_the_defaults(recording: Path) -> None:
    values = yaml.safe_load((recording / "config.yaml").read_text())
    del values["moe"]
    (recording / "config.yaml").write_text(yaml.safe_dump(values))
    assert foreign(replay(recording)) is None


def test_words_about_an_objective_are_none_of_its_course(recording: Path) -> None:
    text = (recording / "config.yaml").read_text()
    assert "differences:" in text
    (recording / "config.yaml").write_text(text.replace("differences:", "differences:\n  - new"))
    assert foreign(replay(recording)) is None


def test_what_nothing_is_known_of(tmp_path: Path) -> None:
    assert foreign(replay(tmp_path)) == "has no config.yaml"
    assert settled(replay(tmp_path)).algo.old_policy is OldPolicy.engine


def test_who_has_chosen_or_corrects_keeps_it(recording: Path) -> None:
    chosen = replay(recording, "optim.lr=1e-3", "algo.old_policy=recompute", "algo.minibatches=2")
    assert settled(chosen) == chosen
    corrected = replay(recording, "optim.lr=1e-3", "algo.correction.kind=tis")
    assert settled(corrected) == corrected


def test_without_a_replay_nothing_changes() -> None:
    config, _ = compose_config(["model.path=m", "data.source=arithmetic"])
    assert foreign(config) is None and settled(config) == config
