"""peergrad.launch reads torchrun's options and peergrad's words, and returns the ranks' status."""

import subprocess
import sys
from pathlib import Path

import pytest

from peergrad.launch import main, read


@pytest.mark.parametrize(
    ("arguments", "ranks", "ours"),
    [
        (["--nproc-per-node", "2", "a=1", "b=2"], "2", ["a=1", "b=2"]),
        (["--nproc-per-node=2", "--check", "a=1"], "2", ["a=1", "--check"]),
        (["--check"], "1", ["--check"]),
        (["a=1", "--cfg", "b=2"], "1", ["a=1", "b=2", "--cfg"]),
        (["--rdzv-conf", "timeout=9", "a=1", "-x"], "1", ["a=1", "-x"]),
        ([], "1", []),
    ],
)
def test_reading(arguments: list[str], ranks: str, ours: list[str]) -> None:
    options = read(arguments)
    assert (options.nproc_per_node, options.training_script_args) == (ranks, ours)
    assert options.training_script == "peergrad.main" and options.module
    assert options.local_addr == "127.0.0.1"


def test_several_machines_find_each_other_by_name() -> None:
    assert read(["--nnodes", "2", "a=1"]).local_addr is None
    assert read(["--local-addr", "10.0.0.7", "a=1"]).local_addr == "10.0.0.7"


def test_a_mistake_of_the_launchers_own_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--nproc-per-node", "abc", "a=1"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "abc" in err


def test_torchrun_itself_tells_the_line_and_the_rank(tmp_path: Path) -> None:
    """Among thirty of its own, and with a status of its own."""
    torchrun = ["torch.distributed.run", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, "-m", "peergrad.main", f"model.path={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    cause = done.stderr.partition("Root Cause")[2]
    assert "rank      : 0 " in cause and f"error: model.path = '{tmp_path}': " in cause
    assert f"\nerror: model.path = '{tmp_path}': " in f"\n{done.stderr}"


def test_one_line_and_the_status_of_the_ranks(tmp_path: Path) -> None:
    """Two real ranks find the same mistake."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "peergrad.launch",
            "--nproc-per-node",
            "2",
            f"model.path={tmp_path}",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    line = done.stderr
    assert line.startswith(f"error: model.path = '{tmp_path}': ") and "[rank" not in line
