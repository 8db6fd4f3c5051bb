"""Servers that are asked again until they are there."""

from collections.abc import Callable

import pytest

from peergrad.observing.screen import Screen
from peergrad.rollout import arrival
from peergrad.rollout.arrival import NAMED, NotThereYet, gather

A, B, C = "http://a:1", "http://b:1", "http://c:1"


class Clock:
    """On which nothing but sleep takes time."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(arrival, "time", Clock())
    return arrival.time


def there_from(**tries: int) -> Callable[[str], str]:
    """Asks servers that answer from so many tries on."""
    left = {f"http://{name}:1": number for name, number in tries.items()}

    def ask(url: str) -> str:
        left[url] -= 1
        if left[url] > 0:
            raise NotThereYet(f"{url} is not there", url, "connection refused")
        return f"answer of {url}"

    return ask


def test_all_answers_come_in_the_order_of_the_urls(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(1) as screen:
        found = gather(there_from(a=3, b=1, c=2), [A, B, C], seconds=60, waiting=screen.waiting)
    assert found == [f"answer of {url}" for url in (A, B, C)]
    assert capsys.readouterr().out.splitlines()[0].partition("  ")[2] == (
        "waiting for servers, for 60 s at most: http://a:1 (connection refused), "
        "http://c:1 (connection refused)"
    )


def test_nothing_is_said_where_all_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(1) as screen:
        gather(there_from(a=1, b=1), [A, B], seconds=60, waiting=screen.waiting)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_nobody_is_waited_for_unless_asked(seconds: float) -> None:
    with Screen(1, shown=False) as screen:
        waiting = None if seconds else screen.waiting
        with pytest.raises(NotThereYet, match=r"^http://b:1 is not there$"):
            gather(there_from(a=1, b=2, c=2), [A, B, C], seconds=seconds, waiting=waiting)


def test_those_that_did_not_come_are_named(clock: Clock) -> None:
    with (
        Screen(1, shown=False) as screen,
        pytest.raises(ValueError) as error,
    ):
        gather(there_from(a=10_000, b=2, c=10_000), [A, B, C], seconds=2.5, waiting=screen.waiting)
    assert clock.now == 2.5
    assert str(error.value) == (
        "rollout.servers.wait = 2.5: 2 of 3 servers did not come within these seconds, http://a:1 "
        "(connection refused), http://c:1 (connection refused); see their logs, correct "
        "rollout.servers.urls, or raise it"
    )


def test_of_many_some_are_named() -> None:
    names = [f"n{number}" for number in range(NAMED + 3)]
    ask = there_from(**dict.fromkeys(names, 10_000))
    with Screen(1, shown=False) as screen, pytest.raises(ValueError) as error:
        gather(ask, [f"http://{n}:1" for n in names], seconds=0.05, waiting=screen.waiting)
    assert f"http://n{NAMED - 1}:1 (connection refused) and 3 more; see" in str(error.value)
    assert f"http://n{NAMED}:1" not in str(error.value)


def test_what_is_wrong_ends_the_wait_at_once(clock: Clock) -> None:
    absent = there_from(a=10_000, b=3)

    def ask(url: str) -> str:
        if absent(url):
            raise ValueError(f"{url} is another program")
        raise AssertionError

    with (
        Screen(1, shown=False) as screen,
        pytest.raises(ValueError, match=r"^http://b:1 is another"),
    ):
        gather(ask, [A, B], seconds=600, waiting=screen.waiting)
    assert clock.now == 2 * arrival.POLL_SECONDS
