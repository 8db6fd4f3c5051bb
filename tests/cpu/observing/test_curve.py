"""The curve: drawn whole, of anything that a run may have measured, also while it goes on."""

import json
import signal
import sys
import warnings
from pathlib import Path

import pytest

from peergrad.observing.curve import CurveSink, draw_curve, main
from tests.waiting import PATIENCE_SECONDS

ROWS: list[dict[str, object]] = [
    {"kind": "start", "step": 0, "time/start": 3.0},
    {"kind": "eval", "step": 0, "pass@1": 0.1},
    {"kind": "train", "step": 1, "reward/mean": 0.2, "logprob_gap/max": 1e-6},
    {"kind": "train", "step": 2, "reward/mean": None, "logprob_gap/max": None},
    {"kind": "train", "step": 3, "reward/mean": -4.0, "logprob_gap/max": 0.0},
]


def write(folder: Path, rows: int) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:rows]))
    return path


def test_every_row_changes_the_picture(tmp_path: Path) -> None:
    pictures = []
    for rows in (2, 4, 5):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # matplotlib warns of empty legends and the like
            draw_curve(write(tmp_path, rows), tmp_path / "curve.png")
        pictures.append((tmp_path / "curve.png").read_bytes())
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert len(set(pictures)) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curve.png", "metrics.jsonl"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", 4)
    write(tmp_path / "b", 1)
    assert main([str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/a/curve.png\n"
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/b/metrics.jsonl: holds no train")


def test_is_drawn_beside_the_run(tmp_path: Path) -> None:
    """Only where there is something new to see, and by one process at a time."""
    write(tmp_path, 4)
    sink = CurveSink(tmp_path)
    sink.write("train", 1, {})
    assert sink._process is None
    sink.write("eval", 1, {})
    assert sink._process is not None and sink._process.wait(PATIENCE_SECONDS) == 0
    assert (tmp_path / "curve.png").exists()
    sink._command = [sys.executable, "-c", "import time; time.sleep(60)"]  # draws for long
    sink.write("checkpoint", 1, {})
    drawing = sink._process
    sink.write("eval", 2, {})
    assert sink._process is drawing
    sink.close()  # does not wait for the picture
    assert drawing.returncode == -signal.SIGTERM
