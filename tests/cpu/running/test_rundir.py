"""A run folder is never taken over by accident."""

from pathlib import Path

import pytest

from peergrad.config import RunConfig
from peergrad.running.rundir import RunDir, check_run_dir


def test_a_new_run(tmp_path: Path) -> None:
    run = check_run_dir(RunConfig(root=str(tmp_path), name="a"))
    assert run.path == tmp_path / "a"
    assert run.metrics == tmp_path / "a" / "metrics.jsonl"
    assert not run.path.exists()  # looking does not make it


def test_an_attempt_without_a_result_is_no_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a")
    run.new_attempt()
    run.config.write_text("run: {}")
    run.metrics.touch()
    assert not check_run_dir(RunConfig(root=str(tmp_path), name="a")).started


@pytest.mark.parametrize("what", ["metrics.jsonl", "checkpoints/step_000001"])
def test_an_existing_run_is_refused_unless_resumed(tmp_path: Path, what: str) -> None:
    result = tmp_path / "a" / what
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    with pytest.raises(ValueError, match=r"^run\.name = 'a': .*/a already holds a run; set run\."):
        check_run_dir(RunConfig(root=str(tmp_path), name="a"))
    assert check_run_dir(RunConfig(root=str(tmp_path), name="a", resume=True)).started


def test_attempts_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "a")
    first = run.new_attempt()
    monkeypatch.setattr("os.getpid", lambda: 7)  # another process, maybe in the same second
    second = run.new_attempt()
    latest = tmp_path / "a" / "logs" / "latest"
    assert first != second and first.is_dir() and second.is_dir()
    assert latest.is_symlink() and latest.resolve() == second.resolve()
    assert not latest.readlink().is_absolute()  # a run folder can be moved
    assert sorted(p.name for p in latest.parent.iterdir()) == sorted(
        [first.name, second.name, "latest"]
    )


def test_a_run_has_one_name_for_ever(tmp_path: Path) -> None:
    """To servers; another run of the same name elsewhere has another."""
    run, other = RunDir(tmp_path / "x" / "a"), RunDir(tmp_path / "y" / "a")
    for each in (run, other):
        each.path.mkdir(parents=True)
    assert run.identity() == RunDir(tmp_path / "x" / "a").identity()
    assert run.identity().startswith("a-") and run.identity() != other.identity()


def test_what_an_interrupted_run_can_do(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a")
    assert run.how_to_resume() == "run.resume=true begins again: there is no checkpoint yet"
    run.checkpoints.mkdir(parents=True)
    (run.checkpoints / "latest").write_text("step_000120")
    assert run.how_to_resume() == "run.resume=true continues from step 120"
