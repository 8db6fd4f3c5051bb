"""One line, a status, the traceback in the log; of many ranks one speaks."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Timer

import pytest

from peergrad.echo import OtherRankFailed, is_echo
from peergrad.running import ending as module
from peergrad.running.ending import Ending, one_line, refuse
from peergrad.running.place import Place
from tests.waiting import PATIENCE_SECONDS


class OutOfMemoryError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a.b = 1: must be 2; set it"), "a.b = 1: must be 2; set it"),
        (RuntimeError("several\n  lines\tand  blanks"), "several lines and blanks"),
        (OutOfMemoryError("CUDA out"), "out of GPU memory (CUDA out); lower parallel.micro_batch"),
        (MemoryError(), "out of memory (); lower parallel.micro_batch_tokens"),
        (OSError(errno.ENOSPC, "No space", "/x"), "[Errno 28] No space: '/x'"),
        (RuntimeError("Timed out waiting 60000ms for recv"), "parallel.timeout_minutes: another"),
        (KeyError("x"), "KeyError: 'x' (unforeseen)"),
        (AssertionError(), "AssertionError:  (unforeseen)"),
        (RuntimeError(), "RuntimeError:  (unforeseen)"),
        (RuntimeError("x" * 9000), "x" * 700 + " ..."),
    ],
)
def test_lines(error: BaseException, line: str) -> None:
    assert one_line(error).startswith(line) and "\n" not in one_line(error)


class Store:
    """The ranks' word, of one process."""

    def __init__(self, first: str | None = None) -> None:
        self.first, self.log = first, list[str]()

    def failed(self) -> bool:
        return self.first is not None

    def claim(self) -> bool:
        self.first = self.first or "me"
        return self.first == "me"

    def said(self, status: int) -> None:
        self.log.append(f"said {status}")

    def await_said(self, seconds: float) -> int | None:
        self.log.append("waited")
        return 7 if self.first == "7" else None


def end(error: BaseException, store: Store | None = None, rank: int = 0, **place: Path) -> int:
    ending = Ending(Place(rank, 2))
    ending.speaker, ending.log = store, place.get("log")
    ending.begin(error)
    return ending.end(error)


def test_statuses_and_places(capsys: pytest.CaptureFixture[str]) -> None:
    assert end(ValueError("a = 1: no; b")) == 2
    assert capsys.readouterr().err == "error: a = 1: no; b\n"
    assert end(RuntimeError("broken"), Store(), log=Path("logs/rank_00000.log")) == 1
    assert capsys.readouterr().err == "error: broken (log: logs/rank_00000.log)\n"
    assert end(RuntimeError("broken"), Store(), rank=1) == 1
    assert capsys.readouterr().err.startswith("error: broken [rank 1 on ")


def test_the_log_has_the_traceback(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    try:
        raise KeyError("deep inside")
    except KeyError as error:
        end(error)
    assert "failed here" in caplog.text and 'raise KeyError("deep inside")' in caplog.text


def test_who_is_not_first_keeps_silent_and_waits(capsys: pytest.CaptureFixture[str]) -> None:
    other, mine = Store("other"), Store()
    assert end(RuntimeError("broken"), other) == 1
    assert capsys.readouterr().err == "" and other.log == ["waited"]
    assert end(RuntimeError("broken"), mine) == 1
    assert capsys.readouterr().err != "" and mine.log == ["said 1"]


def test_all_ranks_end_with_the_status_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """And after it, for the launcher takes the first that ends: it then ends the others."""
    monkeypatch.setattr(module, "POLITE_SECONDS", 0.5)
    monkeypatch.setattr(module, "LIKE_SECONDS", 0.0)
    began = time.monotonic()
    assert end(RuntimeError("broken"), Store("7"), rank=1) == 7
    assert time.monotonic() - began >= 0.5


def test_what_goes_wrong_while_cleaning_up_hides_nothing(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def fail() -> None:
        raise RuntimeError("Connection closed by peer")

    ending = Ending(Place(0, 2))
    try:
        with ExitStack() as stack, ending.noted():
            stack.callback(fail)
            raise ValueError("a = 1: no; b")
    except RuntimeError as error:
        assert ending.end(error) == 2
    assert capsys.readouterr().err == "error: a = 1: no; b\n"
    assert "while cleaning up" in caplog.text


def test_a_traceback_without_a_log_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert end(KeyError("deep")) == 1
    line = capsys.readouterr().err
    file = Path(line.rpartition("(log: ")[2].removesuffix(")\n"))
    assert "KeyError: 'deep'" in file.read_text()
    file.unlink()
    assert end(ValueError("not meant for a person")) == 2
    line = capsys.readouterr().err
    assert "(log: " in line
    Path(line.rpartition("(log: ")[2].removesuffix(")\n")).unlink()


@pytest.mark.parametrize(
    "echo", [OtherRankFailed("rank 1 failed"), RuntimeError("x: Connection closed by peer [1.2.3]")]
)
def test_an_echo_lets_the_other_speak(
    echo: RuntimeError, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank that failed may be slower than the news of it; if it cannot speak, the echo must."""
    monkeypatch.setattr(module, "POLITE_SECONDS", PATIENCE_SECONDS)
    assert is_echo(echo) and not is_echo(RuntimeError("no"))
    store = Store()
    Timer(0.2, lambda: setattr(store, "first", "other")).start()
    assert end(echo, store) == 1
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "POLITE_SECONDS", 0.5)
    began = time.monotonic()
    assert end(echo, Store()) == 1
    assert time.monotonic() - began >= 0.5
    assert capsys.readouterr().err.startswith("error: ")


def test_an_echo_speaks_at_once_for_a_rank_that_was_killed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher then ends the others: nobody else will speak."""

    class Ended(Store):
        """Is told to end while it waits for another rank's word."""

        def failed(self) -> bool:
            os.kill(os.getpid(), signal.SIGTERM)
            return False

    monkeypatch.setattr(module, "POLITE_SECONDS", 2 * PATIENCE_SECONDS)
    ending, began = Ending(Place(0, 2)), time.monotonic()
    ending.speaker = Ended()
    with ending.signals():
        try:
            with ending.noted():
                raise OtherRankFailed("rank 1 failed")
        except RuntimeError as error:
            assert ending.end(error) == 1
    assert time.monotonic() - began < PATIENCE_SECONDS
    assert capsys.readouterr().err.startswith("error: rank 1 failed")


def test_rank_0_says_what_other_ranks_may_find_as_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIKE_SECONDS", PATIENCE_SECONDS)
    store = Store()
    Timer(0.2, lambda: setattr(store, "first", "0")).start()
    assert end(ValueError("a = 1: no; b"), store, rank=1) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "LIKE_SECONDS", 0.5)
    assert end(ValueError("a = 1: no; b"), Store(), rank=1) == 2
    assert capsys.readouterr().err.startswith("error: a = 1: no; b [rank 1 on ")


def test_a_mistake_that_every_rank_finds_is_said_by_rank_0(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLITE_SECONDS", 0.2)
    assert refuse(ValueError("a = 1: no"), Place(0, 2)) == 2
    assert capsys.readouterr().err == "error: a = 1: no\n"
    began = time.monotonic()
    assert refuse(ValueError("a = 1: no"), Place(1, 2)) == 2
    assert time.monotonic() - began >= 0.2
    assert capsys.readouterr().err.startswith("error: a = 1: no [rank 1 on ")


def test_torchrun_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the form that its own report reads."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert end(ValueError("a = 1: no; b")) == 2
    assert "message" in json.loads((tmp_path / "error.json").read_text())
    failure = ProcessFailure(0, 1, 2, str(tmp_path / "error.json"))
    assert abs(failure.timestamp - time.time()) < 60
    assert " : error: a = 1: no; b\n" in str(ChildFailedError("peergrad", {0: failure}))


INTERRUPTED = """
import signal, sys, time
from contextlib import ExitStack
from peergrad.running.ending import Ending
from peergrad.running.place import Place
ending = Ending(Place(int(sys.argv[1]), 2))
def clean_up():
    print("cleaning", flush=True)
    for _ in range(2):
        sys.stdin.readline()  # comes after a signal
with ending.signals():
    try:
        with ExitStack() as stack, ending.noted():
            stack.callback(clean_up)
            print("ready", flush=True)
            time.sleep(60)
    except BaseException as error:
        status = ending.end(error)
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
sys.exit(status)
"""


def signalled(program: str, rank: str, *signals: tuple[str, int]) -> tuple[int, str]:
    """Status and words of ``program``, which gets each signal after it has printed a word, and
    after each signal a line of input."""
    with subprocess.Popen(
        [sys.executable, "-c", program, rank],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for word, number in signals:
            assert process.stdout.readline() == f"{word}\n"
            os.kill(process.pid, number)
            with suppress(BrokenPipeError):
                process.stdin.write("\n")
                process.stdin.flush()
        _, err = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, err


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGINT, 130, "interrupted; nothing was started\n"),
        (signal.SIGTERM, 75, "stopped by SIGTERM; nothing was started\n"),
        (signal.SIGUSR1, 75, "stopped by SIGUSR1; nothing was started\n"),
    ],
)
def test_signals_before_there_is_anything_to_save(number: int, status: int, said: str) -> None:
    """The first one unwinds, those that torchrun repeats do not disturb the clean-up."""
    signals = (("ready", number), ("cleaning", signal.SIGTERM))
    assert signalled(INTERRUPTED, "0", *signals) == (status, said)
    assert signalled(INTERRUPTED, "1", *signals) == (status, "")


LISTENING = """
import sys, time
from types import SimpleNamespace
from peergrad.running import stopping
from peergrad.running.ending import Ending
from peergrad.running.place import Place
now = 0.0
stopping.time = SimpleNamespace(monotonic=lambda: now)
ending = Ending(Place(int(sys.argv[1]), 1))
with ending.signals():
    try:
        with ending.noted():
            told = []
            ending.stop.listen(told.append, lambda: None)
            print("training", flush=True)
            while not told:
                time.sleep(0.01)
            sys.stdin.readline()
            print("saving", flush=True)
            sys.stdin.readline()  # empty where no more signals come
            now += stopping.REPEAT_SECONDS
            print("still saving", flush=True)
            sys.stdin.readline()
            raise stopping.Stopped(told[0])
    except BaseException as error:
        sys.exit(ending.end(error))
"""


def test_a_signal_is_waited_for_and_a_second_one_is_not() -> None:
    """One that is repeated at once is the same; one later, or Ctrl-C, ends the run there."""
    once, again = ("training", signal.SIGUSR1), ("saving", signal.SIGTERM)
    stopped = (75, "stopped by SIGUSR1; nothing was started\n")
    interrupted = (130, "interrupted; nothing was started\n")
    assert signalled(LISTENING, "0", once) == stopped
    assert signalled(LISTENING, "0", once, again) == stopped
    late = ("still saving", signal.SIGUSR1)
    assert signalled(LISTENING, "0", once, again, late) == interrupted
    assert signalled(LISTENING, "0", once, ("saving", signal.SIGINT)) == interrupted
    assert signalled(LISTENING, "0", ("training", signal.SIGINT)) == interrupted
