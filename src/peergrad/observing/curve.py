"""The learning curve of a run as a picture: while it goes on, at its end, and by command.

python -m peergrad.observing.curve runs/first [runs/second ...]
"""

import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peergrad.observing.metrics import Row, read_metrics

LINES = (  # kind, metric, label, style
    ("train", "reward/mean", "training reward", "-"),
    ("eval", "pass@1", "held-out pass@1", "o-"),
)


def draw_curve(metrics: Path, picture: Path) -> None:
    """Plot training reward, held-out pass@1 and the logprob gap from ``metrics`` into a PNG, which
    appears when it is whole. Raises ValueError if there is nothing to plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(metrics)
    if not any(_points(rows, kind, key) for kind, key, _, _ in LINES):
        raise ValueError(
            f"{metrics}: holds no training step and no evaluation; name a run's folder"
        )
    figure, (reward, gap) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 6), height_ratios=(2, 1))
    _draw_rewards(reward, rows)
    points = [(x, y) for x, y in _points(rows, "train", "logprob_gap/max") if y > 0]
    if points:
        gap.semilogy(*zip(*points, strict=True), color="tab:red")
    gap.set_ylabel("largest logprob gap\nto the engine (nats)")
    gap.set_xlabel("training step")
    gap.grid(alpha=0.3)
    name = metrics.resolve().parent.name
    figure.suptitle(f"{name}: reward and agreement of trainer and engine")
    figure.tight_layout()
    partial = picture.with_name(f".{picture.name}.partial")
    figure.savefig(partial, dpi=110, format="png")
    partial.replace(picture)
    pyplot.close(figure)


def _draw_rewards(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    for kind, key, label, style in LINES:
        if points := _points(rows, kind, key):
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.legend(loc="lower right")
    rewards = [y for _, y in _points(rows, "train", "reward/mean")]
    if all(0 <= y <= 1 for y in rewards):
        axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("reward, pass rate")
    axes.grid(alpha=0.3)


def _points(rows: Sequence[dict[str, Any]], kind: str, key: str) -> list[tuple[int, float]]:
    return [(r["step"], r[key]) for r in rows if r["kind"] == kind and r.get(key) is not None]


class CurveSink:
    """Has the curve drawn after every evaluation and checkpoint, by a process of its own: importing
    a plotting library would stall the trainer. A picture that is still being drawn is not
    overtaken."""

    def __init__(self, run: Path) -> None:
        self._command = [sys.executable, "-m", "peergrad.observing.curve", "--quiet", str(run)]
        self._process: subprocess.Popen[bytes] | None = None

    def write(self, kind: str, step: int, row: Row) -> None:
        if kind not in ("eval", "checkpoint"):
            return
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C in the terminal is not for it
            )

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw ``curve.png`` into each run folder named; the exit status."""
    parser = ArgumentParser(prog="curve", description="Draw the learning curve of runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, as in runs/first")
    parser.add_argument("--quiet", action="store_true", help="do not say where it is")
    options = parser.parse_args(arguments)
    for run in options.runs:
        try:
            draw_curve(run / "metrics.jsonl", run / "curve.png")
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if not options.quiet:
            print(run / "curve.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
