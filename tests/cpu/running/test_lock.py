"""A run folder has one holder, whom others can name; a dead one is none."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from peergrad.running import lock as module
from peergrad.running.lock import FolderLock, read_holder
from tests.waiting import PATIENCE_SECONDS, wait_until

HOLD = """
import sys, time
from pathlib import Path
from peergrad.running.lock import FolderLock
with FolderLock(Path(sys.argv[1]), "run.name = 'a'"):
    print("held", flush=True)
    time.sleep(600)
"""


def hold_elsewhere(file: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def refusal(file: Path) -> str:
    with pytest.raises(ValueError) as error, FolderLock(file, "run.name = 'a'"):
        pass
    return str(error.value)


def test_a_living_holder_is_named_and_a_killed_one_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    file = tmp_path / "a" / "holder.json"
    process = hold_elsewhere(file)
    message = refusal(file)
    assert message.startswith(
        f"run.name = 'a': {file.parent} is in use by process {process.pid} on"
    )
    assert "(job 77, since 20" in message and message.endswith("; end that, or wait for it")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert read_holder(file) is not None  # it had no time to sign off
    with FolderLock(file, "run.name = 'a'"):
        holder = read_holder(file)
        assert holder is not None and holder["pid"] == os.getpid()
    assert read_holder(file) is None
    with FolderLock(file, "run.name = 'a'"):
        pass


def test_one_of_many_that_start_at_once_gets_it(tmp_path: Path) -> None:
    file, got, refused = tmp_path / "holder.json", [], []

    def start() -> None:
        try:
            with FolderLock(file, "x"):
                got.append(1)
                wait_until(lambda: len(got) + len(refused) == 8)
        except ValueError:
            refused.append(1)

    threads = [Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(module, "WATCH_SECONDS", PATIENCE_SECONDS)


def write_holder(file: Path, beat: int, host: str = "node7") -> None:
    holder = {"host": host, "pid": 5, "job": None, "since": "2026-01-02 03:04:05", "beat": beat}
    partial = file.with_name("partial")  # whole at every moment, as a real holder's is
    partial.write_text(json.dumps(holder))
    partial.replace(file)


@pytest.mark.usefixtures("impatient")
def test_a_holder_on_a_machine_whose_lock_is_not_seen_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a shared file system without locks: it lives as long as its file changes."""
    file = tmp_path / "holder.json"
    write_holder(file, 1)
    stop = []

    def beat() -> None:
        count = 1
        while not stop:
            write_holder(file, count := count + 1)
            time.sleep(0.1)

    thread = Thread(target=beat, daemon=True)
    thread.start()
    assert "in use by process 5 on node7 (since 2026-01-02 03:04:05)" in refusal(file)
    stop.append(True)
    thread.join()
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.5)
    heard: list[str] = []
    with FolderLock(file, "x", heard=heard.append):
        assert heard[0].startswith("a sign of life of process 5 on node7")
        assert (read_holder(file) or {})["pid"] == os.getpid()


@pytest.mark.usefixtures("impatient")
def test_the_holder_shows_that_it_lives(tmp_path: Path) -> None:
    file = tmp_path / "holder.json"

    def beats() -> int:
        holder = read_holder(file)
        assert holder is not None, "never half written"
        return int(holder["beat"])

    with FolderLock(file, "x"):
        first = beats()
        wait_until(lambda: beats() > first + 5)


def test_where_there_are_no_locks_a_process_of_this_machine_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_try_lock", lambda file: None)
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.1)
    file = tmp_path / "holder.json"
    process = hold_elsewhere(file)
    assert f"process {process.pid} on" in refusal(file)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with FolderLock(file, "x"):
        pass


def test_of_two_that_find_it_free_where_there_are_no_locks_one_finds_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one's mark is the later: it comes while this one waits for that."""
    monkeypatch.setattr(module, "_try_lock", lambda file: None)
    file, slept = tmp_path / "holder.json", list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        write_holder(file, 0)

    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=sleep))
    with pytest.raises(ValueError, match=r"was taken by process 5 on node7"):
        FolderLock(file, "x").__enter__()
    assert (read_holder(file) or {})["pid"] == 5  # which it leaves alone
    assert slept == [module.SETTLE_SECONDS]


def test_a_file_that_says_nothing_is_nobody(tmp_path: Path) -> None:
    file = tmp_path / "holder.json"
    for text in ("", "{", "{}", "\x00\x00"):
        file.write_text(text)
        assert read_holder(file) is None
        with FolderLock(file, "x"):
            pass
