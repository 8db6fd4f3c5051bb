"""Seconds per phase and part and tokens per second of the quickstart's training step on this
machine, and which process computes for how long.

    python benchmarks/step.py
    python benchmarks/step.py --steps 20 --layouts tp2,dp2,tp1 --out result.json optim.lr=1e-4

Runs the real program (trainer under peergrad.launch, SGLang server, reward process) once per layout
in a temporary folder, without evaluation and without checkpoints before the end. The first steps
are left out: they compile, fill caches and start the server's batches. Everything after the options
is a Hydra override of ``experiment=quickstart_cpu``. Needs ``models/tiny`` (see
``tools/make_tiny_model.py``). A layout is a product of ``tp`` (tensor), ``pp`` (pipeline) and
``dp`` (data): ``tp2``, ``dp2``, ``tp1``, ``tp2pp2``.

The first table divides the step into phases and these into the parts that the program timed
(``time/<phase>/<part>``), each with what is left over. The second says how long every kind of
process computed: one that is busy all the time is what the others wait for.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from machine import ROOT, describe, load_average, result_path, title
from processes import Watched, run_watched
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from summary import (
    Spread,
    aligned,
    all_keys,
    as_json,
    middle,
    phase_seconds,
    summarise,
    write_result,
)

from peergrad.observing.metrics import read_metrics
from peergrad.running.compose import compose_config

INTERRUPTED = 130
SIZES = {"tp": "tensor", "pp": "pipeline", "dp": "data"}


@dataclass(frozen=True)
class Layout:
    """How the trainer's processes share the work.

    Example:
        ``Layout.parse("tp2pp2")`` is ``Layout("tp2pp2", tensor=2, pipeline=2, data=1)``
    """

    name: str
    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @staticmethod
    def parse(name: str) -> "Layout":
        if not re.fullmatch(r"((tp|pp|dp)[1-9]\d*)+", name):
            raise ValueError(f"--layouts: {name!r} is no layout; write tp2, dp2, tp1 or tp2pp2")
        return Layout(name, **{SIZES[k]: int(n) for k, n in re.findall(r"([a-z]+)(\d+)", name)})

    @property
    def processes(self) -> int:
        return prod((self.tensor, self.pipeline, self.data))

    @property
    def overrides(self) -> list[str]:
        return [f"parallel.{size}={getattr(self, size)}" for size in SIZES.values()]


@dataclass(frozen=True)
class Measured:
    """One run: a layout of ours, or what it is compared with."""

    name: str
    load_before: float  # load average of the machine; well above 0 if others use it
    load_highest: float  # the same while the run goes on, its own part included
    memory_gib: float  # highest sum over its processes
    cpu: dict[str, float]  # CPU seconds per measured step, by kind of process
    rows: list[dict[str, float]]  # per measured step: seconds per phase, tokens, reward, ...
    spreads: dict[str, Spread]


def main() -> int:
    parser = argparse.ArgumentParser(description="The quickstart's training step, in parts")
    parser.add_argument("--steps", type=int, default=20, help="measured steps per layout")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them, left out")
    parser.add_argument("--layouts", default="tp2", help="comma-separated: tp2,dp2,tp1")
    parser.add_argument("--out", type=Path, default=result_path(), help="JSON file to write")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of the quickstart")
    options = parser.parse_intermixed_args()
    try:
        check_sizes(options.steps, options.warmup)
        layouts = [Layout.parse(name) for name in options.layouts.split(",")]
        check_model(options.overrides)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        measure_all(layouts, options)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def measure_all(layouts: Sequence[Layout], options: argparse.Namespace) -> None:
    """One layout after another; the file is written after each, should a later one fail."""
    described = describe()
    settings = {"warmup": options.warmup, "overrides": options.overrides}
    runs: list[Measured] = []
    for layout in layouts:
        runs.append(measure(layout, options.steps, options.warmup, options.overrides))
        done = {"layouts": [to_json(run) for run in runs]}
        write_result(options.out, {"benchmark": "step", **described, **settings, **done})
    print(f"\nquickstart step on {title(described)}")
    show_parts(runs, options.warmup)
    show_cpu(runs)


def check_sizes(steps: int, warmup: int) -> None:
    if steps < 1:
        raise ValueError(f"--steps {steps}: must be at least 1")
    if warmup < 0:
        raise ValueError(f"--warmup {warmup}: must not be negative")


def check_model(overrides: Sequence[str]) -> None:
    """Raise ValueError for a configuration that cannot be composed or a model that is not there."""
    config, _ = compose_config(["experiment=quickstart_cpu", *overrides])
    path = config.model.path
    if not (ROOT / path / "config.json").is_file():
        raise ValueError(
            f"model.path = {path!r}: there is no model; make it, which takes a minute, with "
            f"`python tools/make_tiny_model.py --out {path}`"
        )


def measure(layout: Layout, steps: int, warmup: int, overrides: Sequence[str]) -> Measured:
    """Run the program in a temporary folder, which stays if the run fails."""
    root = Path(tempfile.mkdtemp(prefix="peergrad-step-"))
    load = load_average()
    print(f"{layout.name}: {warmup} + {steps} steps, load average before {load}", flush=True)
    try:
        watched = run_watched(command(layout, warmup + steps, root, overrides), cwd=ROOT)
    except KeyboardInterrupt:
        shutil.rmtree(root)
        raise
    if watched.status != 0:
        raise RuntimeError(f"{layout.name}: the run ended with status {watched.status}; see {root}")
    rows = [r for r in read_metrics(root / "run" / "metrics.jsonl") if r["kind"] == "train"]
    shutil.rmtree(root)
    ends = [row["timestamp"] for row in rows]
    return measured(layout.name, load, watched, [quantities(row) for row in rows], ends, warmup)


def measured(
    name: str,
    load: float,
    watched: Watched,
    rows: Sequence[dict[str, float]],
    ends: Sequence[float],
    warmup: int,
) -> Measured:
    """``rows`` without the first ``warmup``; step i ended at ``ends[i]``, seconds since 1970."""
    kept = aligned(rows[warmup:])
    cpu = watched.cpu_between(ends[warmup] - rows[warmup]["step"], ends[-1])
    per_step = {kind: seconds / len(kept) for kind, seconds in cpu.items()}
    return Measured(
        name, load, watched.load_highest, watched.memory_gib, per_step, kept, summarise(kept)
    )


def command(layout: Layout, steps: int, root: Path, overrides: Sequence[str]) -> list[str]:
    own = [
        f"run.root={root}",
        "run.name=run",
        f"run.steps={steps}",
        "evaluation.every=0",
        "checkpoint.every=0",
    ]
    launch = ["-m", "peergrad.launch", "--standalone", "--nproc-per-node", str(layout.processes)]
    experiment = "experiment=quickstart_cpu"
    return [sys.executable, *launch, experiment, *overrides, *layout.overrides, *own]


def quantities(row: dict[str, Any]) -> dict[str, float]:
    return {
        **phase_seconds(row),
        "tokens": row["tokens/total"],
        "tokens_per_second": row["tokens/per_second"],
        "answer_tokens": row["tokens/response"],
        "reward": row["reward/mean"],
    }


def to_json(run: Measured) -> dict[str, Any]:
    return {
        "layout": run.name,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),  # null: torchrun decides
        "load_average_before": run.load_before,
        "load_average_highest": run.load_highest,
        "memory_gib": run.memory_gib,
        "cpu_seconds_per_step": run.cpu,
        "summary": as_json(run.spreads),
        "middle": middle(run.rows),
        "steps": run.rows,
    }


def show_parts(runs: Sequence[Measured], warmup: int) -> None:
    """Seconds of phases and, indented below each, of its parts; and the other quantities."""
    print(
        f"of {len(runs[0].rows)} steps, the first {warmup} left out: means over the middle half of "
        "them, which\nadd up (parts to the phase above them, phases and rest to the step), and "
        "medians (p10-p90)"
    )

    def cells(run: Measured, key: str) -> list[str]:
        if key not in run.spreads:
            return ["", ""]
        form = FORMS.get(key, ".3f")
        return [f"{middle(run.rows)[key]:{form}}", run.spreads[key].text(form)]

    keys = all_keys([run.spreads for run in runs])
    show(runs, [("   " * key.count("/") + _label(key), key) for key in keys], cells, "seconds")


FORMS = {"tokens": ".0f", "tokens_per_second": ".0f", "answer_tokens": ".0f"}


def _label(key: str) -> str:
    return key.rpartition("/")[2].replace("_per_", " per ").replace("_", " ")


def show_cpu(runs: Sequence[Measured]) -> None:
    """CPU seconds of a step by kind of process, and how much of one core that keeps busy."""
    print("CPU seconds per step by process; a kind near 100 % of a core holds the others up")

    def cells(run: Measured, kind: str) -> list[str]:
        if kind not in run.cpu:
            return ["", ""]
        seconds = float(sum(row["step"] for row in run.rows)) / len(run.rows)
        return [f"{run.cpu[kind]:.2f}", f"{run.cpu[kind] / seconds:.0%}"]

    kinds = all_keys([run.cpu for run in runs])
    show(runs, [(kind, kind) for kind in kinds], cells, "process")


def show(
    runs: Sequence[Measured],
    labels: Sequence[tuple[str, str]],
    cells: Callable[[Measured, str], list[str]],
    head: str,
) -> None:
    """One line a label, two columns a run."""
    table = Table(head, box=SIMPLE)
    for run in runs:
        table.add_column(run.name, justify="right")
        table.add_column("", justify="right")
    for label, key in labels:
        table.add_row(label, *(cell for run in runs for cell in cells(run, key)))
    Console(width=max(Console().width, 40 + 40 * len(runs))).print(table)  # in a file, too


if __name__ == "__main__":
    sys.exit(main())
