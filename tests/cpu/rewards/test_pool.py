"""The pool with real processes: hangs, crashes, bad values, bad names, dead parents."""

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from peergrad.config import RewardConfig, RewardKind
from peergrad.data import Prompt, Rollout
from peergrad.grades import Failure, Grade
from peergrad.rewards import RewardPool, process
from peergrad.rewards.process import RewardProcess
from tests.waiting import PATIENCE_SECONDS, until, wait_until

FUNCTIONS = '''
import os, re, signal, subprocess, sys, time

def by_text(prompt, rollout):
    """What to do is what the rollout says."""
    match rollout.text.split():
        case ["hang"]:
            while True: pass
        case ["regex"]:  # holds the interpreter's lock
            re.match(r"(a+)+$", "a" * 64 + "b")
        case ["child", path]:
            child = subprocess.Popen(["sleep", "600"])
            open(path, "w").write(str(child.pid))
            child.wait()
        case ["sleep", seconds]: time.sleep(float(seconds))
        case ["exit"]: os._exit(7)
        case ["end"]: os.closerange(3, 64); time.sleep(0.2); os._exit(9)
        case ["fork", "return"]:
            child = os.fork()
            if not child: return 77
            os.waitpid(child, 0)
        case ["fork", "exit"]:
            child = os.fork()
            if not child: sys.exit(1)
            os.waitpid(child, 0)
        case ["sys.exit"]: sys.exit(3)
        case ["kill"]: os.kill(os.getpid(), signal.SIGKILL)
        case ["raise"]: raise KeyError("no such thing")
        case ["nan"]: return float("nan")
        case ["text"]: return "1.0"
        case ["none"]: return None
        case ["huge"]: return 10 ** 400
        case ["true"]: return True
        case ["pid"]: return os.getpid()
        case ["torch"]: return float("torch" in sys.modules or "transformers" in sys.modules)
        case ["print"]: print("hello")
        case ["extra"]: return prompt.extra["weight"]
        case ["generator"]: return (x for x in [1.0])
    return len(rollout.text)

loaded = []
def slow_to_load(prompt, rollout):
    if not loaded:
        time.sleep(2.5)
        loaded.append(True)
    return by_text(prompt, rollout)

async def judge(prompt, rollout):
    import asyncio
    await asyncio.sleep(0)
    return {"score": float(rollout.text == prompt.answer), "length": len(rollout.text)}

class Judge:
    def by_answer(prompt, rollout): return float(rollout.text == prompt.answer)

def needs_three(a, b, c): return 0.0
constant = 3
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    (tmp_path / "exiting_rewards.py").write_text("import os\nos._exit(5)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_rewards"


def config(function: str = "my_rewards:by_text", **more: Any) -> RewardConfig:
    return RewardConfig(kind=RewardKind.function, function=function, **{"timeout": 120.0, **more})


def prompt() -> Prompt:
    return Prompt("train-17", np.zeros(1, np.int32), "1+2=", "3", {"weight": 0.25})


def rollout(text: str) -> Rollout:
    return Rollout(np.zeros(1, np.int32), np.zeros(1, np.float32), ((0, 0, 1),), "stop", text)


def score(pool: RewardPool, *texts: str) -> list[float | str]:
    """Rewards, and kinds of failures."""

    async def one(text: str) -> float | str:
        result = await pool.score(prompt(), rollout(text))
        return result.kind if isinstance(result, Failure) else result.reward

    async def all_of_them() -> list[float | str]:
        return await asyncio.gather(*map(one, texts))

    return asyncio.run(all_of_them())


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is: what does not hang has its time, and so has what ends."""
    score = RewardProcess.score

    def patiently(self: RewardProcess, p: Prompt, r: Rollout, limit: float) -> Grade | Failure:
        first = process.FIRST_SECONDS and (self._process is None or self._first)
        hangs = r.text.split()[0] in ("hang", "regex", "child")
        return score(self, p, r, limit if hangs or first else PATIENCE_SECONDS)

    monkeypatch.setattr(RewardProcess, "score", patiently)
    monkeypatch.setattr(process, "END_SECONDS", PATIENCE_SECONDS)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more time for a first reward than for others."""
    monkeypatch.setattr(process, "FIRST_SECONDS", 0.0)


def test_values(module: str) -> None:
    with RewardPool(config(workers=2)) as pool:
        texts = ["a", "bb", "ccc"] * 20
        assert score(pool, *texts) == [float(len(text)) for text in texts]
        assert score(pool, "true", "extra", "torch", "print") == [1.0, 0.25, 0.0, 5.0]
    with RewardPool(config("my_rewards:judge")) as pool:
        grade = asyncio.run(pool.score(prompt(), rollout("3")))
        assert (grade.reward, grade.parts) == (1.0, {"length": 1.0})
    with RewardPool(config("my_rewards:Judge.by_answer")) as pool:
        assert score(pool, "3", "4") == [1.0, 0.0]


@pytest.mark.parametrize("what", ["hang", "regex"])
@pytest.mark.usefixtures("impatient")
def test_a_hanging_reward_is_killed_in_time(module: str, what: str) -> None:
    with RewardPool(config(timeout=1.0, workers=2)) as pool:
        values = [6.0, "timeout", 5.0, "timeout", 4.0]
        assert score(pool, "before", what, "after", what, "last") == values
        failure = asyncio.run(pool.score(prompt(), rollout(what)))
    assert failure == Failure("timeout", "took longer than 1 s")


def test_the_first_reward_of_a_process_may_take_longer(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "FIRST_SECONDS", PATIENCE_SECONDS)
    with RewardPool(config("my_rewards:slow_to_load", timeout=1.0)) as pool:
        assert score(pool, "one", "four", "hang", "three") == [3.0, 4.0, "timeout", 5.0]


def test_but_not_over_and_over(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that always hangs would cost a minute a reward."""
    monkeypatch.setattr(process, "FIRST_SECONDS", 2.0)
    with RewardPool(config(timeout=0.1)) as pool:
        start = time.monotonic()
        assert score(pool, "hang") == ["timeout"]
        assert time.monotonic() - start >= 2
        first = pool._processes[0]
        assert not first._patient
        assert score(pool, "hang") == ["timeout"] and not first._patient


@pytest.mark.usefixtures("impatient")
def test_what_a_reward_has_started_is_killed_with_it(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive, file = RewardProcess._receive, tmp_path / "pid"

    def once_it_is_there(self: RewardProcess, limit: float) -> Any:
        if limit == 1.0:
            wait_until(lambda: file.exists() and file.read_text())
        return receive(self, limit)

    monkeypatch.setattr(RewardProcess, "_receive", once_it_is_there)
    with RewardPool(config(timeout=1.0)) as pool:
        assert score(pool, f"child {file}") == ["timeout"]
    assert ends(int(file.read_text()))


@pytest.mark.parametrize(
    ("what", "kind", "reason"),
    [
        ("exit", "crash", "ended its process, status 7"),
        ("end", "crash", "ended its process, status 9"),
        ("sys.exit", "error", "raised SystemExit: 3"),
        ("kill", "crash", "ended its process, status -9"),
        ("raise", "error", "raised KeyError: 'no such thing'"),
        ("huge", "value", "beyond 1e+09"),
        ("generator", "value", "returned <generator object"),
        ("nan", "value", "returned nan"),
        ("text", "value", "returned '1.0'"),
        ("none", "value", "returned None"),
    ],
)
def test_failures(module: str, what: str, kind: str, reason: str) -> None:
    with RewardPool(config()) as pool:
        assert score(pool, "before", what, "after") == [6.0, kind, 5.0]
        failure = asyncio.run(pool.score(prompt(), rollout(what)))
        assert isinstance(failure, Failure) and reason in failure.reason


@pytest.mark.parametrize("how", ["return", "exit"])
def test_a_child_that_a_reward_forked_answers_nothing(module: str, how: str) -> None:
    with RewardPool(config()) as pool:
        for text in (f"fork {how}", "one", "three", "seven"):
            assert score(pool, text) == [len(text)]


def test_a_worker_killed_between_two_rewards_is_replaced(module: str) -> None:
    with RewardPool(config()) as pool:
        (pid,) = score(pool, "pid")
        os.kill(int(pid), signal.SIGKILL)
        assert score(pool, "one")[0] in ("crash", 3.0)
        assert score(pool, "one") == [3.0]


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        ("my_rewards", "must look like package.module:callable"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("my_rewards:nothing", "no attribute 'nothing'"),
        ("my_rewards:constant", "must name something callable"),
        ("my_rewards:needs_three", "must take two arguments"),
        ("broken_rewards:f", "ZeroDivisionError"),
        ("exiting_rewards:f", "importing it ended its process, status 5"),
    ],
)
def test_a_bad_name_stops_at_construction(module: str, function: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule) as caught:
        RewardPool(config(function, workers=2))
    assert str(caught.value).startswith(f"reward.function = {function!r}: ")
    assert "\n" not in str(caught.value)


def test_built_in_rewards_start_no_process() -> None:
    with RewardPool(RewardConfig(kind=RewardKind.gsm8k)) as pool:
        assert score(pool, "#### 3", "#### 4") == [1.0, 0.0]
        assert not psutil.Process().children()
    with RewardPool(RewardConfig()) as pool:
        assert score(pool, "3", "4") == [1.0, 0.0]


def test_close_does_not_wait_for_a_reward(module: str) -> None:
    async def close_while_scoring(pool: RewardPool) -> None:
        running = asyncio.create_task(pool.score(prompt(), rollout("hang")))
        await until(pool._idle.empty)
        pool.close()
        pool.close()
        with pytest.raises(RuntimeError, match="closed"):
            await running

    pool = RewardPool(config())
    children = psutil.Process().children()
    start = time.monotonic()
    asyncio.run(close_while_scoring(pool))
    assert time.monotonic() - start < 60  # of the reward's 120
    assert len(children) == 1 and ends(children[0].pid)


def in_daemon(texts: list[str], values: "multiprocessing.Queue[list[float | str]]") -> None:
    with RewardPool(config(timeout=1.0)) as pool:
        values.put(score(pool, *texts))


def test_a_daemonic_process_may_have_a_pool(module: str) -> None:
    context = multiprocessing.get_context("spawn")
    values = context.Queue()
    process = context.Process(target=in_daemon, args=(["abc", "hang", "ab"], values), daemon=True)
    process.start()
    assert values.get(timeout=PATIENCE_SECONDS) == [3.0, "timeout", 2.0]
    process.join()


PARENT = """
import asyncio, sys, numpy as np
from peergrad.config import RewardConfig, RewardKind
from peergrad.data import Prompt, Rollout
from peergrad.rewards import RewardPool

print("torch" in sys.modules)

async def main():
    config = RewardConfig(kind=RewardKind.function, function="my_rewards:by_text", workers=2)
    with RewardPool(config) as pool:
        a = np.zeros(0, np.int32)
        rollout = lambda text: Rollout(a, a.astype(np.float32), (), "stop", text)
        busy = asyncio.create_task(pool.score(Prompt("p", a, "", ""), rollout("regex")))
        await asyncio.sleep(0.2)
        print("ready", flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent(module: str, tmp_path: Path, signum: int) -> None:
    """One worker is idle and one busy; Ctrl-C goes to the whole group of the terminal."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        # a test run in the background of a shell ignores Ctrl-C, and its children inherit that
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert parent.stdout is not None
    assert [parent.stdout.readline() for _ in range(2)] == ["False\n", "ready\n"]
    workers = [child.pid for child in psutil.Process(parent.pid).children()]
    assert len(workers) == 2
    os.killpg(parent.pid, signum)
    _, errors = parent.communicate(timeout=PATIENCE_SECONDS)
    assert all(map(ends, workers))
    assert "peergrad/rewards/worker.py" not in errors


def ends(pid: int, within: float = PATIENCE_SECONDS) -> bool:
    try:
        process = psutil.Process(pid)
        deadline = time.monotonic() + within
        while time.monotonic() < deadline and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
