"""A whole run with the real server: what it writes, what it exports."""

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from peergrad.main import main
from peergrad.observing.metrics import read_metrics
from tests.e2e.run import Run, assert_same_weights, run_in_turn

pytestmark = pytest.mark.engine

KINDS = ("start", "eval", "checkpoint", "export")
TRAIN_KEYS = {
    *("reward/mean", "reward/std", "reward/flat_groups"),
    *("response/length", "response/length_max", "response/truncated"),
    *("tokens/response", "tokens/total", "tokens/per_second"),
    *("version/trainer", "version/engine", "version/staleness"),
    *("loss/policy", "loss/total", "policy/clip_low", "policy/clip_high", "policy/ratio"),
    *("policy/entropy", "policy/kl", "optim/grad_norm", "optim/lr"),
    *("logprob_gap/mean", "logprob_gap/p99", "logprob_gap/max"),
    *("sync/verified", "sync/unverified", "sync/canary_gap"),
    *("time/rollout", "time/grade", "time/reference", "time/update", "time/sync", "time/step"),
}


def test_every_step_is_measured(whole: Run) -> None:
    rows = whole.rows("train")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row.keys() >= TRAIN_KEYS
        assert row["version/trainer"] == row["step"] - 1
        assert row["version/engine"] == row["step"]
        assert row["version/staleness"] == 0
        assert row["logprob_gap/max"] <= 1e-4
        assert row["sync/canary_gap"] <= 1e-4
        assert row["sync/verified"] > 0 and row["sync/unverified"] == 0
        assert row["policy/ratio"] == 1 and row["policy/clip_low"] == row["policy/clip_high"] == 0
        assert row["optim/grad_norm"] > 0 and row["policy/entropy"] > 0
        assert row["optim/lr"] == 1e-3
        phases = [row[f"time/{phase}"] for phase in ("rollout", "grade", "update", "sync")]
        assert all(seconds > 0 for seconds in phases) and sum(phases) <= row["time/step"]
    assert rows[0]["policy/kl"] < 1e-6 < rows[-1]["policy/kl"]  # starts as its own reference
    evaluations = whole.rows("eval")
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    assert all(0 <= row["pass@1"] <= 1 for row in evaluations)


def test_its_time_is_accounted_for(whole: Run) -> None:
    """From the start of rank 0's process to the export: what no row tells is a few per cent."""
    rows = read_metrics(whole.metrics)
    order = [(row["kind"], row["step"]) for row in rows]
    first = order.index(("checkpoint", 2))  # written beside the steps that follow
    assert first > order.index(("train", 2))
    assert [kind for kind, _ in order[:first] + order[first + 1 :]] == [
        *("start", "eval", "train", "train", "eval", "train", "train", "eval"),
        *("checkpoint", "export"),
    ]
    names = {"train": "time/step", **{kind: f"time/{kind}" for kind in KINDS}}
    told = sum(row[names[row["kind"]]] for row in rows)
    whole_time = rows[-1]["timestamp"] - rows[0]["timestamp"] + rows[0]["time/start"]
    assert 0.9 * whole_time < told < 1.01 * whole_time
    stages = ("libraries", "join", "model", "reference", "collector", "servers", "sync")
    assert sum(rows[0][f"start/{stage}"] for stage in stages) > 0.9 * rows[0]["time/start"]


def test_its_screen_and_logs_tell_its_story(whole: Run) -> None:
    """A wait is named before it is over, the objective is a file, and every line is whole."""
    lines = whole.printed.splitlines()
    assert lines[0] == f"run            {whole.path}"
    assert sum("waiting for SGLang to start" in line for line in lines) >= 1
    assert sum(bool(re.match(r"step \d+/4 ", line)) for line in lines) == 4
    assert not any(word in whole.printed for word in ("Traceback", "Warning", "effective ("))
    logs = whole.path / "logs" / "latest"
    assert "effective (" in (logs / "objective.txt").read_text()
    rank, collector = (logs / f"{name}.log" for name in ("rank_00000", "collector"))
    for word in ("step 4/4", "server 0 healthy", "sync of version 4", "step_000004", "export"):
        assert word in rank.read_text(), word
    assert "the servers hold weights of version 4" in collector.read_text()
    assert (logs / "rank_00001.log").stat().st_size > 0


def test_recorded_rollouts_are_what_was_trained_on(whole: Run) -> None:
    for row in whole.rows("train"):
        groups = whole.groups(row["step"])
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        assert (len(groups), len(rollouts)) == (8, 32)
        assert sum(r.tokens.size for r in rollouts) == row["tokens/response"]
        assert sum(r.reward for r in rollouts) / 32 == pytest.approx(row["reward/mean"])
        assert all(r.versions == ((row["step"] - 1, 0, r.tokens.size),) for r in rollouts)


def test_leaves_its_results(whole: Run) -> None:
    assert whole.done.exists() and whole.curve.stat().st_size > 10_000
    assert list(whole.tensorboard.iterdir()) and (whole.path / "logs" / "latest").is_dir()
    first, *_, last = whole.rows("eval")
    start = f"pass@1 {first['pass@1']:.3f} -> {last['pass@1']:.3f} in 4 steps, "
    assert whole.printed.splitlines()[-1].startswith(start)
    model = AutoModelForCausalLM.from_pretrained(whole.hf)
    assert next(model.parameters()).shape == (100, 64)
    assert AutoTokenizer.from_pretrained(whole.hf)("17+25=")["input_ids"]
    whole.assert_gone(timeout=120)


def test_conversions_are_bit_exact(whole: Run, tmp_path: Path) -> None:
    """The last checkpoint converts to what the run exported; HF -> Megatron with TP 2 -> HF with
    PP 2 changes no bit."""
    last, megatron, back = (tmp_path / name for name in ("last", "megatron", "back"))
    to_hf = ["tools/megatron_to_hf.py", "--dtype", "float32"]
    to_megatron = ["tools/hf_to_megatron.py", "--dtype", "float32"]
    run_in_turn(
        2,
        [*to_hf, "--checkpoint", whole.checkpoints / "step_000004", "--out", last],
        [*to_megatron, "--tensor", 2, "--hf", whole.hf, "--out", megatron],
        [*to_hf, "--pipeline", 2, "--checkpoint", megatron, "--out", back],
    )
    assert_same_weights(last, whole.hf)
    assert_same_weights(back, whole.hf)


def test_is_not_overwritten_by_a_second_start(
    whole: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.path.rglob("*")}
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(whole.arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: run.name = 'whole': ") and "run.resume=true" in line
    assert before == {path: path.stat().st_mtime_ns for path in whole.path.rglob("*")}
