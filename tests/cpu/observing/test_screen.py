"""What a person sees: nothing is cut, and no wait is silent."""

import logging
import os
import re
import time
from itertools import pairwise
from pathlib import Path
from threading import Event, Timer

import pytest

from peergrad.observing import screen as module
from peergrad.observing.screen import Screen
from peergrad.observing.table import COLUMNS, cells, duration, fit, phases
from tests.waiting import wait_until

HUGE = {metric: 123456.789 for metric, _ in COLUMNS.values()}


class Ticks(Event):
    """Counts how often a screen's thread has looked for something to say."""

    number = 0

    def wait(self, timeout: float | None = None) -> bool:
        self.number += 1
        return super().wait(timeout)

    def let_pass(self, number: int) -> None:
        last = self.number + number
        wait_until(lambda: self.number >= last)


def said(capsys: pytest.CaptureFixture[str], *patterns: str) -> str:
    """What is printed until each of ``patterns`` is in it."""
    printed = ""

    def found() -> bool:
        nonlocal printed
        with module.SPEAKING:  # what is printed while it is read would be lost
            printed += capsys.readouterr().out
        return all(re.search(pattern, printed) for pattern in patterns)

    wait_until(found)
    return printed


def test_a_pipe_gets_a_line_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(steps=40) as screen:
        screen.write("train", 7, HUGE)
        screen.write("train", 8, {"reward/mean": 0.12345, "optim/lr": 3e-4})
        evaluation = {"pass@1": 1 / 3, "reward": 0.25, "length": 12345.678, "time/eval": 2.0}
        screen.write("eval", 8, evaluation | {f"long_name_{i}": 1.0 for i in range(9)})
        screen.write("checkpoint", 8, {"time/checkpoint": 0.25, "checkpoint/seconds": 3.0})
        screen.write("start", 8, {"time/start": 1.25})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4  # not wrapped at 80 columns; a start says nothing
    assert lines[0].startswith("step 7/40  reward 123456.789  length 123456.8  flat 12345679%  KL ")
    assert re.search(r"elapsed \d:\d\d:\d\d  left \?$", lines[0])
    assert lines[1].startswith("step 8/40  reward 0.123  length -  flat -  KL -")
    assert "lr 3.0e-04" in lines[1] and re.search(r"left \d:\d\d:\d\d$", lines[1])
    assert lines[2].startswith("evaluation after step 8: pass@1 0.333  reward 0.250  length 12345.")
    assert lines[2].endswith("long_name_8 1.000  (2.0 s)")
    assert lines[3] == "checkpoint after step 8 (3.0 s, training waited 0.2 s)"


@pytest.mark.parametrize("width", [20, 40, 80, 120])
@pytest.mark.parametrize("row", [HUGE, {"reward/mean": 0.5}, dict.fromkeys(HUGE, -1e-09)])
def test_no_number_is_cut(width: int, row: dict[str, float]) -> None:
    """Every cell that is shown is whole; columns go from the end of the order of importance."""
    numbers = {"step": "1000/2000", **cells(row)}
    head, *lines = fit([numbers, {"step": "1/2000", **cells({})}], width)
    assert all(len(line) <= width for line in (head, *lines))
    shown = head.split()
    assert shown[0] == "step"
    assert lines[0].split() == [numbers[heading] for heading in shown]


def test_a_usual_step_fits_80_columns_with_what_matters() -> None:
    usual = {
        **{"reward/mean": 0.312, "response/length": 512.3, "reward/flat_groups": 0.12},
        **{"policy/kl": 0.0123, "logprob_gap/max": 1e-5, "optim/grad_norm": 12.3},
        **{"time/step": 123.4, "reward/failed": 1.0, "policy/entropy": 0.5, "optim/lr": 1e-6},
        **{"response/truncated": 0.03, "tokens/per_second": 12345.0},
    }
    (head, _) = fit([{"step": "100/200", **cells(usual)}], 80)
    assert {"reward", "flat", "failed", "lr", "KL", "gap", "s/step"} <= set(head.split())


def test_a_terminal_gets_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(module, "TICK_SECONDS", 0.1)
    with Screen(steps=40) as screen:
        for step in range(1, 21):
            screen.write("train", step, {"reward/mean": step / 100, "time/rollout": 2.5})
        with screen.waiting("the servers"):
            screen.detail("2 of 3")
            waited = said(capsys, r"[1-9]\d* s waiting for the servers: 2 of 3")
        screen.write("eval", 20, {"pass@1": 0.5})
    printed = waited + capsys.readouterr().out
    last = printed.rpartition("tok/s")[2]
    assert "20/40" in last and "0.200" in last and "rollout 2.5" in last
    assert "9/40" in last and " 8/40" not in last  # the last twelve
    assert "waiting" not in last


def test_waits_are_said_for_ever(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The innermost, with how far it is; nothing once it is over."""
    monkeypatch.setattr(module, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(module, "REMINDERS", (0.1, 0.2, 0.4))
    began, screen = time.monotonic(), Screen(steps=1)
    screen._stop = ticks = Ticks()
    with screen:
        with screen.waiting("the run", announce=True), screen.waiting("the rollouts of step 3"):
            screen.detail("37 of 128 groups")
            printed = said(capsys, r"(?s)(step 3.*){4}")
        ticks.let_pass(1)  # which may have begun before the end of the wait
        first, *reminders = (printed + capsys.readouterr().out).splitlines()
        waited = time.monotonic() - began
        ticks.let_pass(50)
        assert capsys.readouterr().out == ""
    assert re.fullmatch(r"\d:\d\d:\d\d  waiting for the run", first)
    assert len(reminders) <= 2 + waited / 0.4  # 0.1, 0.2, 0.4, 0.8, 1.2, ...
    assert all(
        r.endswith("s waiting for the rollouts of step 3: 37 of 128 groups") for r in reminders
    )


def test_reminders_come_ever_more_slowly_but_always() -> None:
    wait = module._Wait("it", began=0.0)
    times = []
    for second in range(600):
        if wait.due(second):
            wait.said += 1
            times.append(second)
    assert times[:5] == [10, 20, 30, 60, 120]
    assert {b - a for a, b in pairwise(times[3:])} == {60}


def test_what_is_not_shown_is_logged(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Screen(steps=2, shown=False) as screen, screen.waiting("the model", announce=True):
        screen.write("train", 1, {"reward/mean": 0.5})
        screen.write("eval", 1, {"pass@1": 0.5})
    assert capsys.readouterr().out == ""
    for part in ("waiting for the model", "step 1/2  reward 0.500", "pass@1 0.500"):
        assert part in caplog.text
    assert re.search(r"the model: \d+\.\d s", caplog.text)


def test_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps at 10 s a step, evaluations between them counted: 5 steps to go are 50 s."""
    now = iter(range(100, 1000, 10))
    screen = Screen(steps=10, shown=False)
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(now)))
    for step in range(1, 6):
        screen.write("train", step, {"time/step": 4.0})
    assert "left 0:00:50" in screen._footer


def test_a_fork_waits_until_nothing_is_being_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """Else the child would inherit the lock of the output, held by a thread that it does not
    have."""
    printing = [True]

    def end() -> None:
        printing.clear()
        module.SPEAKING.release()

    module.SPEAKING.acquire()
    Timer(0.5, end).start()
    child = os.fork()
    if child == 0:
        with Screen(steps=1) as screen:
            screen.say("from the child")
        os._exit(0)
    assert not printing
    assert os.waitpid(child, 0)[1] == 0
    assert "from the child" in capfd.readouterr().out
    with module.SPEAKING:
        pass  # free again


def test_it_speaks_until_it_is_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    """Metrics close their sinks before everything else is cleaned up."""
    with Screen(steps=1) as screen:
        screen.close()
        screen.say("still here")
        assert screen._thread.is_alive()
    assert capsys.readouterr().out == "still here\n" and not screen._thread.is_alive()


def test_words() -> None:
    assert duration(3661.4) == "1:01:01"
    assert phases({"time/rollout": 5.04, "time/sync": 0.01, "time/update": 1.0}) == (
        "rollout 5.0, update 1.0"
    )


def test_rich_markup_in_a_path_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(steps=1) as screen:
        screen.say(f"run {Path('runs/[bold]x[/bold]')}")
    assert capsys.readouterr().out == "run runs/[bold]x[/bold]\n"
