"""When a run stops early, and why."""

import os
import signal
import time
from datetime import UTC, datetime, timedelta

import pytest

from peergrad.config import RunConfig
from peergrad.running import stopping
from peergrad.running.stopping import Stop, stop_before

TERM, USR1 = signal.SIGTERM, signal.SIGUSR1


def listening(stop):
    told = []
    stop.listen(told.append, lambda: None)
    return told


def test_a_signal_is_told_to_all_once_and_a_later_one_is_not_waited_for(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    stop = Stop()
    assert not stop.hear(TERM) and stop.reason() is None  # nothing to save yet
    told = listening(stop)
    assert stop.hear(USR1) and stop.reason() == "SIGUSR1" and told == ["SIGUSR1"]
    now[0] += 2.9
    assert stop.hear(TERM)  # a launcher that hands on what its group was told
    now[0] += 0.2
    assert not stop.hear(TERM)
    assert told == ["SIGUSR1"] and stop.reason() == "SIGUSR1"


def test_what_another_rank_heard_counts():
    stop, asked = Stop(), []
    stop.listen(lambda why: None, lambda: asked[0] if asked else None)
    assert stop.reason() is None
    asked.append("SIGTERM")
    assert stop.reason() == stop.between_steps() == "SIGTERM"


def test_a_step_that_would_end_too_late_is_not_begun(monkeypatch):
    """The machine is there until 1000, 100 are to be left: steps of 200, 300 and 100 seconds, so
    that one more is begun until 600, when another 300 would still fit."""
    clock = [0.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(stopping.time, "time", lambda: clock[0])
    stop = Stop(ends=1000.0, before=100.0)
    for seconds in (200, 300, 100):
        assert stop.between_steps() is None
        clock[0] += seconds
    assert stop.between_steps() is None
    clock[0] += 1
    assert stop.reason() is None and stop.between_steps() == "the time limit"
    clock[0] = 901
    assert stop.reason() == "the time limit"


def test_the_end_is_run_until_or_the_end_of_the_slurm_job(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert stop_before(None, 5).reason(ahead=1e9) is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3600))
    assert stop_before(None, 5).reason(ahead=3200) is None
    assert stop_before(None, 5).reason(ahead=3400) == "the time limit"
    later = datetime.now(UTC) + timedelta(hours=3)
    assert stop_before(later.isoformat(), 5).reason(ahead=3400) is None  # it wins
    assert stop_before(later.isoformat(), 5).reason(ahead=10600) == "the time limit"
    with pytest.raises(ValueError, match=r"^checkpoint.before = 60: the Slurm job ends in 60 min"):
        stop_before(None, 60)
    with pytest.raises(ValueError, match=r"run.until = '2020-01-01T08:00' is in -\S+ minutes"):
        stop_before("2020-01-01T08:00", 5)
    with pytest.raises(ValueError, match=r"^run.until = 'tomorrow': must be a date and a time; "):
        RunConfig(until="tomorrow")


def test_local_time_without_an_offset(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        local = datetime.fromtimestamp(time.time() + 3600).isoformat()
        assert stop_before(local, 0).reason(ahead=3500) is None
        assert stop_before(local, 0).reason(ahead=3700) is not None
    finally:
        monkeypatch.undo()
        time.tzset()
    assert os.environ.get("TZ") != "Asia/Tokyo"
