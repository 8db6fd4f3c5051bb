"""Logs hold everything; the screen is spared."""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from peergrad.running.logs import Few, log_to


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


def record(line: int, created: float) -> logging.LogRecord:
    found = logging.LogRecord("a", logging.WARNING, "file.py", line, "failed: %s", ("x",), None)
    found.created = created
    return found


def test_a_warning_that_repeats_itself_is_held_back() -> None:
    """Three of one place in the code at once, then one whenever the first is a minute old."""
    few = Few()
    passed = [t for t in range(0, 180, 10) if few.filter(record(7, float(t)))]
    assert passed == [0, 10, 20, 60, 70, 80, 120, 130, 140]
    assert few.filter(record(8, 180.0))  # another place
