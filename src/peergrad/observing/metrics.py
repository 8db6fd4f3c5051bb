"""Metrics of a run: collected per step by ``step``/``time``/``log``, written to every sink.

Only rank 0 writes; elsewhere the same calls do nothing. ``metrics.jsonl`` is always written and is
the record the other sinks repeat.
"""

import json
import logging
import math
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

from peergrad.config import LoggerConfig
from peergrad.storage import replace_text, writing

log = logging.getLogger(__name__)
Row = Mapping[str, float]


class Sink(Protocol):
    """Takes the numbers of one step; ``kind`` is ``train``, or what else was measured: ``start``,
    ``eval``, ``checkpoint``, ``export``."""

    def write(self, kind: str, step: int, row: Row) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line, flushed at once, with a timestamp; NaN and infinities become null
    (strict JSON).

    Opening cuts off what a resumed run does again: the rows beyond step ``start``, or all of them
    if it begins anew, since step 0 has an evaluation. A file with lines that are no rows is kept
    beside it as ``<name>.damaged``.
    """

    def __init__(self, path: Path, start: int) -> None:
        rows, damaged = _read(path)
        kept = [row for row in rows if row["step"] <= start] if start else []
        self._path = path
        with writing("metrics", path):
            if damaged:
                copy = path.with_name(path.name + ".damaged")
                shutil.copyfile(path, copy)
                log.warning("%s: %d line(s) are no rows; as it was: %s", path, damaged, copy)
            replace_text(path, _lines(kept))
            self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, row: Row) -> None:
        # Seconds since 1970: phases tell durations, only this tells when.
        record = {"kind": kind, "step": step, "timestamp": round(time.time(), 3), **row}
        with writing("metrics", self._path):
            self._file.write(_lines([record]))
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # what a full disk did not take has been said
            self._file.close()


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(_strict(record)) + "\n" for record in records)


def _strict(record: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN and no infinity: null stands for them."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }


class TensorBoard:
    """Event files for TensorBoard."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Hides what an earlier attempt wrote from this step on; step 0 has an evaluation.
        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else 0)

    def write(self, kind: str, step: int, row: Row) -> None:
        for key, value in row.items():
            self._writer.add_scalar(f"{kind}/{key}", value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases; ``offline`` writes files that ``wandb sync`` uploads later.

    It takes no row back. So what a resumed run does again is not sent again: ``sent.json`` in its
    folder knows the last step of each kind of row.
    """

    def __init__(self, config: LoggerConfig, folder: Path, run_config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=config.wandb_project,
            name=folder.name,
            id=f"{folder.name}-{zlib.crc32(str(folder.resolve()).encode()):08x}",
            resume="allow",
            mode=config.wandb,  # type: ignore[arg-type]
            dir=str(folder),
            config=dict(run_config),
        )
        self._run.define_metric("*", step_metric="step")  # wandb's own step counts calls
        self._file = folder / "wandb" / "sent.json"
        self._sent: dict[str, int] = _counts(self._file)

    def write(self, kind: str, step: int, row: Row) -> None:
        if step <= self._sent.get(kind, -1):
            return
        self._run.log({"step": step, **{f"{kind}/{key}": value for key, value in row.items()}})
        self._sent[kind] = step
        with writing("metrics", self._file):
            self._file.parent.mkdir(exist_ok=True)
            replace_text(self._file, json.dumps(self._sent))

    def close(self) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()  # waits for wandb's own process, which writes longer than finish() waits


def _counts(file: Path) -> dict[str, int]:
    """What ``sent.json`` holds; nothing if it is not there or damaged."""
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text())
        if isinstance(found, dict):
            return {str(key): value for key, value in found.items() if type(value) is int}
    return {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; empty if there is none. Lines that are no rows, as a crash
    or a disk may leave them, are left out."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Rows, and the number of lines that are none."""
    rows, damaged = [], 0
    if path.exists():
        for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
            row = _row(line)
            if row is not None:
                rows.append(row)
            elif line.strip():
                damaged += 1
    return rows, damaged


def _row(line: str) -> dict[str, Any] | None:
    with suppress(ValueError, RecursionError):
        row = json.loads(line)
        if (
            isinstance(row, dict)
            and isinstance(row.get("kind"), str)
            and type(row.get("step")) is int
        ):
            return row
    return None


WAITS = {
    "rollout": "the rollouts of step {}",
    "reference": "the reference's logprobs in step {}",
    "old_logprobs": "the old policy's logprobs in step {}",
    "update": "the update of step {}",
    "sync": "the weight sync of step {}",
    "eval": "the evaluation after step {}",
    "checkpoint": "the checkpoint of step {}",
    "export": "the export of the model after step {}",
}
"""What a phase or an event is called while it is waited for."""


class Waiting(Protocol):
    """Tells a person what the block is waiting for, if it takes long."""

    def __call__(self, what: str, /) -> AbstractContextManager[object]: ...


class Metrics:
    """Collects a step's numbers and phase times.

    Example:
        >>> metrics = Metrics([])
        >>> with metrics.step(1), metrics.time("rollout"):
        ...     metrics.log({"reward/mean": 0.5})
    """

    def __init__(
        self, sinks: list[Sink], folder: Path | None = None, *, waiting: Waiting = nullcontext
    ) -> None:
        """``folder``: where ``record`` writes; None on the ranks that do not."""
        self._sinks = sinks
        self._folder = folder
        self._waiting = waiting
        self._row: dict[str, float] = {}
        self._step = 0

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Everything logged inside is one row. It is written when the block ends, and when it fails
        once the step has been trained: the row of the step that stops a run is the one to read."""
        self._row, self._step = {}, step
        start = time.perf_counter()
        try:
            yield
        except Exception:
            if "loss/total" in self._row:
                self._finish_step(step, start)
            raise
        self._finish_step(step, start)

    def _finish_step(self, step: int, start: float) -> None:
        self._row["time/step"] = seconds = time.perf_counter() - start
        if "tokens/total" in self._row:
            self._row["tokens/per_second"] = self._row["tokens/total"] / seconds
        self.write("train", step, self._row)

    def time(self, phase: str) -> AbstractContextManager[None]:
        """Add the block's seconds to ``time/<phase>`` of the current step."""
        return self.part_of(phase, self._step, self._row)

    @contextmanager
    def event(self, kind: str, step: int) -> Iterator[dict[str, float]]:
        """Something between the steps, with a row of its own: what the block puts into the
        dictionary, and its seconds as ``time/<kind>``."""
        row: dict[str, float] = {}
        with self.part_of(kind, step, row):
            yield row
        self.write(kind, step, row)

    @contextmanager
    def part_of(self, kind: str, step: int, row: dict[str, float]) -> Iterator[None]:
        """Add the block's seconds to ``time/<kind>`` of ``row``, a step's or an event's."""
        start = time.perf_counter()
        with self._waiting(WAITS.get(kind, kind).format(step)):
            yield
        key = f"time/{kind}"
        row[key] = row.get(key, 0.0) + time.perf_counter() - start

    def log(self, row: Row) -> None:
        """Add numbers to the current step; a name said twice keeps the last value."""
        self._row.update(row)

    def record(self, name: str, records: Iterable[Mapping[str, Any]]) -> str:
        """Write records that are no metrics as JSON lines, complete or not at all; the file's
        name."""
        if self._folder is not None:
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with writing("records", path):
                replace_text(path, _lines(records))
        return name

    def write(self, kind: str, step: int, row: Row) -> None:
        """A whole row for every sink."""
        for sink in self._sinks:
            sink.write(kind, step, row)

    def close(self) -> None:
        with ExitStack() as stack:  # one sink's failure does not keep the others open
            for sink in self._sinks:
                stack.callback(sink.close)
