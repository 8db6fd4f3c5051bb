"""A run folder is never taken over by accident."""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from peergrad.config import RunConfig
from peergrad.running.rundir import RunDir, check_run_dir, log_to


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


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    names = [logging.getLogger(name) for name in ("py.warnings", "httpx")]
    levels = [logger.level for logger in names]
    root.handlers = []  # log_to closes what it replaces
    yield
    logging.captureWarnings(False)
    for handler in root.handlers:
        handler.close()
    root.handlers, root.level = handlers, level
    for logger, old in zip(names, levels, strict=True):
        logger.setLevel(old)


@pytest.mark.usefixtures("restored_logging")
@pytest.mark.parametrize("screen", [True, False])
def test_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str], screen: bool) -> None:
    log_to(tmp_path, "rank_00003", screen=screen)
    logging.getLogger("peergrad").info("progress")
    logging.getLogger("peergrad").warning("trouble")
    logging.getLogger("httpx").info("HTTP Request: 200 OK")
    warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
    text = (tmp_path / "rank_00003.log").read_text()
    assert "INFO peergrad: progress" in text and "WARNING peergrad: trouble" in text
    assert "HTTP Request" not in text and "deprecated" not in text
    error = capsys.readouterr().err
    assert ("trouble" in error) == screen and "progress" not in error
