"""The program as a user meets it, up to the moment that anything heavy is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peergrad.config import Config
from peergrad.main import finish, main
from peergrad.running.lock import FolderLock
from peergrad.running.ports import free_ports
from peergrad.running.rundir import RunDir
from tests.models import make_hf_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("model"), layers=1)


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "peergrad.main", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def overrides(model: Path, root: Path, *more: str) -> list[str]:
    lengths = ["data.max_prompt_tokens=16", "rollout.max_new_tokens=8"]
    return [f"model.path={model}", f"run.root={root}", "run.name=a", *lengths, *more]


def test_a_folder_in_use_is_refused_and_left_alone(model: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a")
    with FolderLock(run.lock, "x"):
        before = {
            path: path.stat().st_mtime_ns for path in run.path.rglob("*.*") if path != run.lock
        }
        done = start(*overrides(model, tmp_path, "run.resume=true"))
        after = {
            path: path.stat().st_mtime_ns for path in run.path.rglob("*.*") if path != run.lock
        }
    assert done.returncode == 2
    line = f"error: run.name = 'a': {run.path} is in use by process {os.getpid()} on "
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1
    assert before == after == {}


def test_many_processes_that_do_not_know_of_each_other(model: Path, tmp_path: Path) -> None:
    done = start(*overrides(model, tmp_path), SLURM_STEP_NUM_TASKS="4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: SLURM_STEP_NUM_TASKS = '4': srun has started 4 processes")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("root", ["file/runs", "file"])
def test_a_folder_that_cannot_be_made(model: Path, tmp_path: Path, root: str) -> None:
    (tmp_path / "file").write_text("")
    done = start(*overrides(model, tmp_path / root))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and str(tmp_path / "file") in done.stderr


@pytest.mark.parametrize("check", [False, True])
def test_a_server_that_is_not_there_is_waited_for_except_by_a_check(
    model: Path, tmp_path: Path, check: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    external = ["rollout=external", f"rollout.servers.urls=[{url}]", "rollout.servers.wait=1"]
    asked = overrides(model, tmp_path, *external)
    if check:  # here: to import what reads the model is most of a start
        status, (out, err) = main([*asked, "--check"]), capsys.readouterr()
    else:
        done = start(*asked)
        status, out, err = done.returncode, done.stdout, done.stderr
    assert status == 2
    wait = f"waiting for servers, for 1 s at most: {url} (connection refused)\n"
    assert (wait in out) == (not check)
    late = "rollout.servers.wait = 1: 1 of 1 servers did not come within these seconds, "
    now = f"rollout.servers.urls = '{url}': cannot be reached (connection refused); "
    assert err.startswith(f"error: {now if check else late}")
    assert err.count("\n") == 1


def test_a_rank_has_its_environment_before_it_loads_anything(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "1")
    seen: list[tuple[str | None, ...]] = []

    def look(*_: object) -> None:
        seen.append(
            (os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"), os.environ["NCCL_CUMEM_ENABLE"])
        )
        raise ValueError("enough")

    monkeypatch.setattr("peergrad.main.open_folder", look)
    assert main(overrides(model, tmp_path)) == 2
    assert seen == [("1", "1")]


def test_a_check_may_print_the_configuration(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it passes, which the exit status tells a script."""
    asked = overrides(model, tmp_path, "--check", "--cfg")
    assert main(asked) == 0
    assert capsys.readouterr().out.startswith("run:\n  name: a\n")
    assert main([*asked, "data.source=/no/such.jsonl"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: data.source = '/no/such.jsonl': ")


def test_rows_without_a_number_do_not_fail_a_finished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An evaluation that was no number is null; a row may have lost what it was about."""
    rates = ('"pass@1": 0.0', '"pass@1": null', '"x": 1', '"pass@1": 0.5')
    rows = [f'{{"kind": "eval", "step": {i}, {rate}}}\n' for i, rate in enumerate(rates)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    finish(Config(), RunDir(tmp_path), 3.0)
    assert "pass@1 0.000 -> 0.500 in 100 steps, 3 s\n" in capsys.readouterr().out
