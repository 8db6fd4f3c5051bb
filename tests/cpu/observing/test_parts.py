"""Seconds of parts, by a clock of the test's own."""

import pytest

from peergrad.observing.parts import Parts


@pytest.fixture
def clock(monkeypatch):
    """A clock that only ``clock(seconds)`` moves."""
    now = [0.0]
    monkeypatch.setattr("peergrad.observing.parts.time.perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_seconds_of_a_name_add_up(clock):
    parts = Parts()
    for seconds in (1.0, 2.0):
        with parts.time("pause"):
            clock(seconds)
        clock(10)
    with pytest.raises(KeyError), parts.time("send"):
        clock(4)
        raise KeyError
    assert parts.seconds == {"pause": 3.0, "send": 4.0}
    assert parts.row("sync") == {"time/sync/pause": 3.0, "time/sync/send": 4.0}


def test_what_is_done_with_an_item_is_not_its_own(clock):
    def items():
        for item in "ab":
            clock(1)
            yield item
        clock(5)

    parts, seen = Parts(), []
    for item in parts.each("export", items()):
        clock(100)
        seen.append(item)
    assert seen == ["a", "b"] and parts.seconds == {"export": 7.0}
