"""Processes forked from one: what each has of its own, and how its end is known."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from peergrad.rollout.nursery import Nursery, Order
from tests.cpu.rollout import stand_in
from tests.waiting import PATIENCE_SECONDS, wait_until

REPO = Path(__file__).resolve().parents[3]
STAND_IN = stand_in.__name__
SLEEP = "import time; time.sleep(600)"
# As much as there is to say of a process.
TELL = """
import json, os, sys, time
print(json.dumps({
    "arguments": sys.argv[1:], "mine": os.environ.get("MINE"), "ours": os.environ["OURS"],
    "session": os.getsid(0), "parent": os.getppid(), "loaded": loaded,
    "files": os.listdir("/proc/self/fd"),
}), flush=True)
time.sleep(600)
"""


@pytest.fixture
def nursery(tmp_path, monkeypatch):
    """Builds a nursery of one process for each ``(script, argument...)``, with a log and ``MINE``
    of its own."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPO), str(REPO / "src")]))
    built = []

    def build(*scripts, **environment):
        orders = [
            Order(list(arguments), str(tmp_path / f"{index}.log"), {"MINE": str(index)})
            for index, arguments in enumerate(scripts)
        ]
        built.append(Nursery(STAND_IN, orders, environment={**os.environ, **environment}))
        return built[-1]

    yield build
    for one in built:
        one.process.kill()
        one.process.wait()


def told(log):
    wait_until(lambda: log.exists() and log.read_text().endswith("}\n"))
    return json.loads(log.read_text().splitlines()[-1])


def ended(child):
    wait_until(lambda: child.poll() is not None)
    return child.returncode


def is_gone(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("load", "forked"),
    [
        ("print('loads')", True),
        # Whatever it is in the middle of would never be done in a process without it.
        (f"import threading; threading.Thread(target=lambda: exec({SLEEP!r})).start()", False),
    ],
    ids=["one thread", "two threads"],
)
def test_each_has_what_is_its_own(nursery, tmp_path, load, forked):
    started = nursery((TELL, "a", "b c"), (TELL,), OURS="x", MINE="none", **{stand_in.LOAD: load})
    first, second = told(tmp_path / "0.log"), told(tmp_path / "1.log")
    assert (first["arguments"], second["arguments"]) == (["a", "b c"], [])
    assert (first["mine"], second["mine"]) == ("0", "1")
    assert first["ours"] == second["ours"] == "x"
    assert first["parent"] == second["parent"] == started.process.pid
    assert len({first["session"], second["session"], os.getsid(0), started.process.pid}) == 4
    assert first["loaded"] is second["loaded"] is forked
    assert len(first["files"]) == 4  # in, out, err, and the folder that is read
    assert (tmp_path / "0.log").read_text().count("loads") == forked  # not once a process
    assert "loads" not in (tmp_path / "1.log").read_text()


def test_for_one_there_is_no_second_process(nursery, tmp_path):
    started = nursery((TELL, "a"), OURS="x")
    first = told(tmp_path / "0.log")
    assert (first["arguments"], first["mine"], first["loaded"]) == (["a"], "0", True)
    assert (first["parent"], first["session"]) == (os.getpid(), started.process.pid)
    assert not psutil.Process(started.process.pid).children()
    started.process.send_signal(signal.SIGTERM)
    assert ended(*started.children) == -signal.SIGTERM


def test_nobody_waits_for_the_imports(nursery, tmp_path):
    go = tmp_path / "go"
    load = (
        "import os, time\n"
        "for _ in range(3000):\n"
        f"    if os.path.exists({str(go)!r}): break\n"
        "    time.sleep(0.02)\n"
        "else: raise TimeoutError"
    )
    started = nursery((TELL,), (TELL,), OURS="x", **{stand_in.LOAD: load})
    assert [child.poll() for child in started.children] == [None, None]
    assert not (tmp_path / "1.log").exists()
    go.touch()
    assert told(tmp_path / "1.log")["loaded"]


def test_ends_are_told_one_by_one(nursery, tmp_path):
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    started = nursery(
        ("exit(3)",), (killed,), ("raise ValueError('bad')",), (TELL,), ("",), OURS=""
    )
    *quick, lasting, good = started.children
    assert [ended(child) for child in quick] == [3, -signal.SIGKILL, 1]
    assert ended(good) == 0
    assert (tmp_path / "2.log").read_text().endswith("ValueError: bad\n")
    told(tmp_path / "3.log")
    assert lasting.poll() is None and started.process.poll() is None
    os.kill(psutil.Process(started.process.pid).children()[0].pid, signal.SIGTERM)
    assert ended(lasting) == -signal.SIGTERM
    assert started.process.wait(PATIENCE_SECONDS) == 0  # nobody is left
    assert [child.poll() for child in quick] == [3, -signal.SIGKILL, 1]


def test_if_the_imports_fail_so_do_all(nursery, tmp_path):
    started = nursery((SLEEP,), (SLEEP,), **{stand_in.LOAD: "raise ImportError('no such thing')"})
    assert [ended(child) for child in started.children] == [1, 1]
    assert (tmp_path / "0.log").read_text().endswith("ImportError: no such thing\n")


def test_none_outlives_the_nursery(nursery, tmp_path):
    started = nursery((TELL,), (TELL,), OURS="")
    told(tmp_path / "0.log"), told(tmp_path / "1.log")
    children = psutil.Process(started.process.pid).children()
    assert len(children) == 2
    started.process.kill()
    assert [ended(child) for child in started.children] == [-signal.SIGKILL] * 2
    wait_until(lambda: all(map(is_gone, children)))


@pytest.mark.parametrize("load", ["", f"print('loads', flush=True); {SLEEP}"])
def test_none_outlives_a_killed_parent(tmp_path, load):
    """Neither while they run nor while what they need is imported."""
    logs = [str(tmp_path / name) for name in "ab"]
    script = (
        "import os, sys, time\n"
        "from peergrad.rollout.nursery import Nursery, Order\n"
        f"orders = [Order([{TELL!r}], log, {{}}) for log in {logs}]\n"
        f"started = Nursery({STAND_IN!r}, orders, environment=os.environ)\n"
        "print(started.process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    env = {**os.environ, "OURS": "", stand_in.LOAD: load, "PYTHONPATH": f"{REPO}:{REPO / 'src'}"}
    command = [sys.executable, "-c", script]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    root = psutil.Process(int(parent.stdout.readline()))
    if load:
        wait_until(lambda: "loads" in (tmp_path / "a").read_text())
    else:
        told(tmp_path / "a"), told(tmp_path / "b")
    tree = [root, *root.children()]
    assert len(tree) == (1 if load else 3)
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    wait_until(lambda: all(map(is_gone, tree)))
