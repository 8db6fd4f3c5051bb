"""Rows, their sinks, resumption, and what a person sees."""

import json
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from peergrad.config import LoggerConfig
from peergrad.observing.metrics import (
    JsonLines,
    Metrics,
    Row,
    Sink,
    TensorBoard,
    WandB,
    read_metrics,
)


class Memory:
    """Keeps the rows; says when it is closed."""

    def __init__(self, fail: bool = False) -> None:
        self.rows: list[tuple[str, int, dict[str, float]]] = []
        self.closed = False
        self.fail = fail

    def write(self, kind: str, step: int, row: Row) -> None:
        self.rows.append((kind, step, dict(row)))

    def close(self) -> None:
        self.closed = True
        if self.fail:
            raise OSError("disk full")


def test_phases_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # step begins at 0, rollout 1..4, sync 4..5, rollout 6..10, step ends at 16
    ticks = iter([0.0, 1.0, 4.0, 4.0, 5.0, 6.0, 10.0, 16.0, 20.0, 23.0])
    monkeypatch.setattr(
        "peergrad.observing.metrics.time", SimpleNamespace(perf_counter=ticks.__next__)
    )
    memory = Memory()
    waited: list[str] = []

    def waiting(what: str) -> nullcontext[None]:
        waited.append(what)
        return nullcontext()

    metrics = Metrics([memory], waiting=waiting)
    with metrics.step(3):
        for phase in ("rollout", "sync", "rollout"):
            with metrics.time(phase):
                pass
        metrics.log({"tokens/total": 64.0, "reward/mean": 0.25})
        metrics.log({"reward/mean": 0.5})
    with metrics.event("eval", 3) as row:
        row["pass@1"] = 0.25
    assert memory.rows == [
        (
            "train",
            3,
            {
                "time/rollout": 7.0,
                "time/sync": 1.0,
                "time/step": 16.0,
                "tokens/total": 64.0,
                "tokens/per_second": 4.0,
                "reward/mean": 0.5,
            },
        ),
        ("eval", 3, {"pass@1": 0.25, "time/eval": 3.0}),
    ]
    rollout, sync = "the rollouts of step 3", "the weight sync of step 3"
    assert waited == [rollout, sync, rollout, "the evaluation after step 3"]


def test_a_step_starts_anew_and_a_failed_one_is_not_written() -> None:
    memory = Memory()
    metrics = Metrics([memory])
    with pytest.raises(RuntimeError), metrics.step(1):
        metrics.log({"a": 1.0})
        raise RuntimeError
    with metrics.step(2):
        metrics.log({"b": 2.0})
    metrics.write("eval", 2, {"pass@1": 0.5})
    assert [(kind, step, set(row)) for kind, step, row in memory.rows] == [
        ("train", 2, {"b", "time/step"}),
        ("eval", 2, {"pass@1"}),
    ]


def test_close_reaches_every_sink() -> None:
    sinks = [Memory(), Memory(fail=True), Memory()]
    with pytest.raises(OSError, match="disk full"):
        Metrics(list[Sink](sinks)).close()
    assert all(sink.closed for sink in sinks)


# --- metrics.jsonl -------------------------------------------------------------------------------


def write_run(path: Path, *, start: int, steps: range) -> None:
    """Rows of both kinds as the loop writes them: one evaluation before the first step."""
    sink = JsonLines(path, start)
    if start == 0:
        sink.write("eval", 0, {"pass@1": 0.0})
    for step in steps:
        sink.write("train", step, {"loss": float(start)})
        sink.write("eval", step, {"pass@1": step / 10})
    sink.close()


def test_rows_are_strict_json_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, 0)
    sink.write("train", 1, {"a": 1e-7, "b": math.nan, "c": math.inf, "d": -math.inf})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert abs(row.pop("timestamp") - time.time()) < 60
    assert row == {"kind": "train", "step": 1, "a": 1e-7, "b": None, "c": None, "d": None}
    sink.close()


def test_resuming_cuts_off_what_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path, start=0, steps=range(1, 5))
    write_run(path, start=2, steps=range(3, 6))
    rows = [(row["kind"], row["step"], row.get("loss")) for row in read_metrics(path)]
    trained = [(1, 0.0), (2, 0.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert [(step, loss) for kind, step, loss in rows if kind == "train"] == trained
    assert [step for kind, step, _ in rows if kind == "eval"] == [0, 1, 2, 3, 4, 5]


def test_resuming_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    """The evaluation at step 0 is done again, too."""
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        write_run(path, start=0, steps=range(1, 3))
        rows = [(row["kind"], row["step"]) for row in read_metrics(path)]
        assert rows == [("eval", 0), ("train", 1), ("eval", 1), ("train", 2), ("eval", 2)]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_cut_short_is_left_out(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path, start=0, steps=range(1, 3))
    whole = read_metrics(path)
    os.truncate(path, path.stat().st_size - cut - 1)  # 1 for the line break
    assert read_metrics(path) == whole[:-1]
    write_run(path, start=2, steps=range(3, 4))
    assert [row["step"] for row in read_metrics(path) if row["kind"] == "train"] == [1, 2, 3]


def test_a_bad_line_costs_no_other(tmp_path: Path) -> None:
    """Not the rows after it, and not itself: the file as it was stays beside the mended one."""
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, 0)
    for step in range(1, 6):
        sink.write("train", step, {"x": float(step)})
    sink.close()
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1][:9] + b"\xff\0" + lines[1][11:]
    bad = [
        b"[]\n",
        b'{"kind": "train"}\n',
        b'{"kind": "train", "step": "3"}\n',
        b"[" * 10**5 + b"\n",
    ]
    mark = b"\xef\xbb\xbf"  # of an editor's
    path.write_bytes(b"".join([mark, *lines[:3], *bad, b"\n", *lines[3:]]))
    before = path.read_bytes()
    assert [row["step"] for row in read_metrics(path)] == [1, 3, 4, 5]
    JsonLines(path, 4).close()
    assert [row["step"] for row in read_metrics(path)] == [1, 3, 4]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


# --- TensorBoard and Weights & Biases ------------------------------------------------------------


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_tensorboard(tmp_path: Path) -> None:
    for start, steps in ((0, (1, 2, 3, 4)), (2, (3,))):
        sink = TensorBoard(tmp_path, start)
        if start == 0:
            sink.write("eval", 0, {"pass@1": 0.25})
        for step in steps:
            sink.write("train", step, {"reward/mean": step + 10.0 * start})
        sink.close()
    assert scalars(tmp_path, "train/reward/mean") == [(1, 1.0), (2, 2.0), (3, 23.0)]
    assert scalars(tmp_path, "eval/pass@1") == [(0, 0.25)]


def test_tensorboard_begins_anew_without_a_checkpoint(tmp_path: Path) -> None:
    for value in (0.25, 0.5):
        sink = TensorBoard(tmp_path, 0)
        sink.write("eval", 0, {"reward": value})
        sink.close()
    assert scalars(tmp_path, "eval/reward") == [(0, 0.5)]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "my_run"
    folder.mkdir()
    sink = WandB(LoggerConfig(wandb="offline"), folder, {"config": "x"})
    sink.write("train", 1, {"reward/mean": 0.5})
    sink.write("eval", 1, {"pass@1": 0.5})
    sink.close()
    assert json.loads((folder / "wandb" / "sent.json").read_text()) == {"train": 1, "eval": 1}
    (run,) = folder.glob("wandb/offline-run-*/run-my_run-*.wandb")
    record = run.read_bytes()
    assert b"train/reward/mean" in record and b"eval/pass@1" in record
    assert not any("wandb" in child.name() for child in psutil.Process().children())


def test_wandb_gets_no_row_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt dies after step 2, before the evaluation of that step; the next goes on from a
    checkpoint of step 1. A damaged record repeats rows instead of losing any."""
    sent: list[tuple[int, list[str]]] = []

    class Module:
        Run = staticmethod(lambda **_: Module)
        init = Run
        define_metric = staticmethod(lambda *_, **__: None)
        log = staticmethod(lambda row: sent.append((row["step"], sorted({*row} - {"step"}))))

    monkeypatch.setitem(sys.modules, "wandb", Module)
    first = WandB(LoggerConfig(wandb="offline"), tmp_path, {})
    for step in (1, 2):
        first.write("train", step, {"x": 1.0})
    second = WandB(LoggerConfig(wandb="offline"), tmp_path, {})
    for step in (2, 3):
        second.write("train", step, {"x": 1.0})
        second.write("eval", step, {"y": 1.0})
    train, evaluated = ["train/x"], ["eval/y"]
    assert sent == [(1, train), (2, train), (2, evaluated), (3, train), (3, evaluated)]
    (tmp_path / "wandb" / "sent.json").write_text("[")
    WandB(LoggerConfig(wandb="offline"), tmp_path, {}).write("train", 3, {"x": 1.0})
    assert sent[-1] == (3, train) and len(sent) == 6


def test_the_step_that_stops_a_run_is_written(tmp_path: Path) -> None:
    """Its numbers say why. A step that was not trained, or that a person interrupted, is not."""
    metrics = Metrics([JsonLines(tmp_path / "m.jsonl", 0)])

    def fail(step: int, error: type[BaseException], row: dict[str, float]) -> None:
        with pytest.raises(error), metrics.step(step):
            metrics.log(row)
            raise error

    fail(1, RuntimeError, {"reward/mean": 1.0})
    fail(2, KeyboardInterrupt, {"loss/total": 1.0})
    fail(3, RuntimeError, {"loss/total": math.nan})
    (row,) = read_metrics(tmp_path / "m.jsonl")
    assert row["step"] == 3 and row["loss/total"] is None


def test_records_beside_the_metrics(tmp_path: Path) -> None:
    """Replaced as a whole; NaN is no JSON; the ranks that do not write name the same file."""
    metrics = Metrics([], tmp_path)
    for records in ([{"a": 1}] * 9, [{"gap": -0.5, "group": "3/é"}, {"gap": math.nan}]):
        name = metrics.record("logprob_gap/step_000003.jsonl", iter(records))
    assert (
        name
        == Metrics([]).record("logprob_gap/step_000003.jsonl", [])
        == str(Path("logprob_gap/step_000003.jsonl"))
    )
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")] == [name]
    lines = (tmp_path / name).read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"gap": -0.5, "group": "3/é"},
        {"gap": None},
    ]
