"""The converters' command lines, and that of their verification: what a person gets wrong, and what
is said about it."""

import sys
from pathlib import Path
from typing import Any

import pytest

from peergrad import verify
from peergrad.convert import _target, hf_to_megatron, megatron_to_hf, run
from peergrad.parallel.against_hf import LIMITS, Gap
from peergrad.work import Bar

CONFIG = (
    '{"num_attention_heads": 8, "intermediate_size": 96, "num_hidden_layers": 2, '
    '"max_position_embeddings": 512}'
)


def error_of(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    """(exit status, error line) of the converter that ``arguments`` name."""
    convert = hf_to_megatron if arguments[0] == "--hf" else megatron_to_hf
    monkeypatch.setattr(sys, "argv", ["convert", *arguments])
    monkeypatch.setattr("logging.basicConfig", lambda **kwargs: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as they do, and here it is undone
    if "--out" in arguments:
        status = run("Convert.", arguments[0], convert)
    else:
        status = verify.run("Compare.")
    said = capfd.readouterr()
    (line,) = said.err.splitlines()
    return status, line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--hf m --out m", "--out = 'm': exists already; name a new folder"),
        ("--hf m --out y", "--out = 'y.manifest.json': exists already; name a new folder"),
        ("--hf m --out m/x", "--out = 'm/x': is inside --hf; name a folder beside it"),
        (
            "--hf m --out x --tensor 2",
            "--tensor x --pipeline = 2: needs 2 processes and 1 process was started; start it with "
            "torchrun --nproc-per-node 2, or leave both out: the result is the same",
        ),
        ("--hf m --out x --pipeline 0", "--pipeline = 0: must be at least 1; leave it out"),
        (
            "--hf Qwen/Qwen3-0.6B --out x",
            "--hf = 'Qwen/Qwen3-0.6B': is no folder here, and no model hub is asked for it; "
            "download it first (hf download Qwen/Qwen3-0.6B --local-dir models/Qwen3-0.6B) and "
            "name that folder",
        ),
        ("--hf none --out x", "--hf = 'none': is not there; correct the path"),
        ("--hf none --checkpoint run", "--hf = 'none': is not there; correct the path"),
        (
            "--hf m --checkpoint m",
            "--checkpoint = 'm': is no checkpoint (meta.json is missing); name a step folder of a "
            "run, such as runs/x/checkpoints/step_000100",
        ),
        (
            "--hf m/config.json --out x",
            "--hf = 'm/config.json': is a file; name the folder that it is in",
        ),
        (
            "--hf m --out x",
            "--hf = 'm': holds no *.safetensors file; point it at a complete HF checkpoint",
        ),
        (
            "--checkpoint m --out x",
            "--checkpoint = 'm': is no checkpoint (meta.json is missing); name a step folder of a "
            "run, such as runs/x/checkpoints/step_000100",
        ),
        (
            "--checkpoint run --out x",
            "--checkpoint = 'run': is no checkpoint (meta.json is missing); name one of "
            "run/checkpoints/step_000002",
        ),
        (
            "--checkpoint run/checkpoints/step_000002 --out x",
            "--checkpoint = 'run/checkpoints/step_000002': is no whole checkpoint (format None "
            "instead of 1); name another one",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "y.manifest.json").touch()
    (tmp_path / "m" / "config.json").write_text(CONFIG)
    step = tmp_path / "run" / "checkpoints" / "step_000002"
    step.mkdir(parents=True)
    (step / "meta.json").write_text("{}")
    (step.parent / "latest").write_text("../x")
    found = error_of(monkeypatch, capfd, *arguments.split())
    assert found == (2, f"error: {message}")
    assert not (tmp_path / "x").exists()


def test_an_out_that_cannot_be_written_fails_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "sub" / "x"
    status, line = error_of(monkeypatch, capfd, "--hf", str(tmp_path / "m"), "--out", str(out))
    assert status == 1
    assert line == (
        f"error: --out = '{out}': cannot be written, a file is where a folder should be "
        f"({out.parent}); move that file, or choose another name"
    )


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        ({"bfloat16"}, "bfloat16"),
        ({"float32"}, "float32"),
        ({"float16"}, "bfloat16"),
        ({"float32", "bfloat16"}, "float32"),  # norms kept wider lose nothing
    ],
)
def test_the_precision_is_what_the_files_hold(stored: set[str], dtype: str) -> None:
    assert _target(None, stored).name == dtype
    assert _target("bfloat16", stored).name == "bfloat16"


def test_logits_may_differ_by_rounding_alone() -> None:
    near: dict[str, Any] = {"dtype": "float32", "largest": 9e-4, "mean": 9e-5, "scale": 10.0}
    near["limits"] = LIMITS["float32"]
    assert Gap(**near).fits
    for worse in ({"largest": 2e-3}, {"mean": 2e-4}, {"scale": 1.0}, {"mean": float("nan")}):
        assert not Gap(**{**near, **worse}).fits
    near["limits"] = LIMITS["bfloat16"]
    assert Gap(**{**near, "largest": 2.4, "mean": 0.3}).fits
    assert not Gap(**{**near, "largest": 2.4, "mean": 0.4}).fits


def test_the_bar_is_for_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = Bar(2_000_000)
    bar(1_500_000)
    monkeypatch.setattr("os.isatty", lambda stream: False)
    assert bar.text() == "1.5 MB of 2.0 MB"
    monkeypatch.setattr("os.isatty", lambda stream: True)
    assert " 75%|#" in bar.text() or " 75%|█" in bar.text()
