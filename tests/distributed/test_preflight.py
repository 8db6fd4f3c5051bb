"""Several nodes, each a real process of this machine with a name of its own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from peergrad.preflight.exchange import Exchange
from peergrad.preflight.report import Report
from peergrad.preflight.versions import versions
from tests.disk import small_disk
from tests.models import make_hf_model

pytestmark = pytest.mark.distributed

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preflight.py"
EASY = ("--min-disk-gb", "0", "--min-shm-gb", "0", "--min-memory-gb", "0", "--gpus", "0")


@dataclass
class Nodes:
    """The nodes n0, n1, ... of one preflight.

    Example:
        ``nodes = Nodes(tmp_path, 2); nodes.start(1); nodes.start(0); nodes.end(0).status``
    """

    shared: Path
    number: int
    words: Sequence[str] = EASY
    deadline: float = 60.0

    def start(self, rank: int, *words: str, **environment: str) -> "subprocess.Popen[str]":
        place = ["--rank", str(rank), "--nodes", str(self.number), "--host", f"n{rank}"]
        common = ["--shared", str(self.shared), "--address", "127.0.0.1", *self.words]
        slurm = [name for name in os.environ if name.startswith("SLURM")]
        inherited = {name: value for name, value in os.environ.items() if name not in slurm}
        return subprocess.Popen(
            [
                *(sys.executable, str(TOOL), *place, *common),
                *("--deadline", str(self.deadline), *words),
            ],
            env={**inherited, "GLOO_SOCKET_IFNAME": "lo", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def listed(self, name: str) -> list[str]:
        return (self.shared / "preflight-local" / name).read_text().splitlines()


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_good_nodes_meet_and_are_listed(tmp_path: Path, model: Path) -> None:
    nodes = Nodes(tmp_path / "new" / "shared", 2)
    run = (f"model.path={model}", f"run.root={tmp_path}")
    processes = [nodes.start(rank, *run) for rank in (1, 0)]
    found = [ended(process) for process in processes]
    assert [status for status, _, _ in found] == [0, 0], found
    (out,) = (out for _, out, _ in found if out)
    assert out.startswith("2 of 2 nodes are good, all-reduce ") and out.count("\n") == 1, out
    assert "clocks within " in out and all(err == "" for _, _, err in found)
    assert nodes.listed("good_nodes") == ["n0", "n1"] and nodes.listed("bad_nodes") == []


@contextmanager
def read_only(folder: Path, view: Path) -> Iterator[Path]:
    """``folder``, seen at ``view`` where nothing can be written."""
    folder.mkdir(exist_ok=True)
    view.mkdir()
    try:
        subprocess.run(["mount", "--bind", str(folder), str(view)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not permitted here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(view)], check=True)
        yield view
    finally:
        subprocess.run(["umount", "-l", str(view)], check=True)


def test_every_fault_is_named_with_its_node_and_the_good_one_is_enough(tmp_path: Path) -> None:
    """n1: a taken port; n2: a full disk; n3: a read-only shared folder; n4: a cut model; n5: other
    versions; n6: a clock ahead; n7: a canary that did not arrive whole; n8: never starts; n9: a
    file that nobody can finish reading."""
    shared, cut, stuck = tmp_path / "shared", tmp_path / "cut", tmp_path / "stuck"
    weights = make_hf_model(cut, layers=1) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    stuck.mkdir()
    os.mkfifo(stuck / "config.json")
    nodes = Nodes(shared, 10, (*EASY, "--need", "1"), deadline=30)
    with (
        small_disk(tmp_path / "full", "600k") as full,
        read_only(shared, tmp_path / "view") as view,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        port = str(server.getsockname()[1])
        first = nodes.start(0)
        nodes.start(1, "--ports", port)
        nodes.start(2, TMPDIR=str(full))
        unable = replace(nodes, shared=view).start(3)
        nodes.start(4, f"model.path={cut}", f"run.root={tmp_path}")
        hung = nodes.start(9, f"model.path={stuck}", f"run.root={tmp_path}")
        for rank in (5, 6, 7):
            pose(nodes, rank)
        status, out, err = ended(first)
        assert status == 3, err
        assert out.startswith("1 of 10 nodes are good")
        assert nodes.listed("good_nodes") == ["n0"]
        said = dict(line.split(": ", 1) for line in err.splitlines())
        silent = ("node 3", "node 8", "node 9")  # without Slurm nobody knows their names
        assert list(said) == ["n1", "n2", silent[0], "n4", "n5", "n6", "n7", *silent[1:]]
        assert said["n1"].startswith(f"port = {port}: is taken by ")
        assert f"(pid {os.getpid()}); end that process" in said["n1"]
        assert said["n2"].startswith(f"TMPDIR = '{full}': cannot be written, the disk has too lit")
        assert all(
            said[name].startswith(f"said nothing in {shared} within 15 s") for name in silent
        )
        assert said["n4"].startswith(f"model.path = '{cut}': model.safetensors ")
        assert said["n5"].startswith("torch = '1.0': 6 of 7 nodes have '")
        assert said["n6"].startswith("clock = 'ahead': is off by 300.")
        assert said["n7"].startswith(
            f"--shared = '{shared}': its file is cut off at 4096 bytes on "
        )
        status, _, err = ended(unable)
        assert status == 1 and err.startswith(
            f"n3: --shared = '{view}/preflight-local': cannot be "
        )
        assert "the file system is read-only; " in err and err.count("\n") == 1
        status, _, err = ended(hung)
        assert status == 1 and err == (
            f"n9: has not ended within 30 s, while reading {stuck}; see to that, or raise "
            "--deadline\n"
        )


def pose(nodes: Nodes, rank: int) -> None:
    """Nodes 5, 6 and 7 of the test above."""
    exchange = Exchange(nodes.shared / "preflight-local", f"n{rank}")
    end = time.monotonic() + nodes.deadline
    while not exchange.join():
        assert time.monotonic() < end, "no preflight has begun"
        time.sleep(0.05)
    ahead = 300.0 if rank == 6 else 0.0
    other = {"torch": "1.0"} if rank == 5 else {}
    facts = {**(versions().facts or {}), "gpus": "0", **other}
    now = time.time() + ahead
    exchange.put_canary()
    if rank == 7:
        os.truncate(exchange.folder / "n7.canary", 4096)
    report = Report(rank, f"n{rank}", "127.0.0.1", (1, 2), 0, now, now, facts=facts)
    exchange.say(f"n{rank}.json", report)


@pytest.mark.slow
def test_a_node_that_does_not_come_to_the_all_reduce_is_told_from_those_that_wait(
    tmp_path: Path,
) -> None:
    """n1 has no such network; the others wait for it in vain, and prove themselves in pairs."""
    nodes = Nodes(tmp_path, 3, (*EASY, "--need", "2"), deadline=50)
    others = [nodes.start(2), nodes.start(1, GLOO_SOCKET_IFNAME="absent0")]
    status, out, err = ended(nodes.start(0))
    assert status == 3, err
    assert out.startswith("2 of 3 nodes are good; all-reduce of all 3 nodes failed")
    assert err.startswith("n1: all-reduce failed: n0 and n1: n1 failed after meeting the others (")
    assert err.count("\n") == 1 and "absent0" in err
    assert nodes.listed("good_nodes") == ["n0", "n2"]
    assert [ended(other)[0] for other in others] == [0, 0]


def test_an_earlier_preflight_in_the_same_folder_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """A node that is there before the first one meets what that has left behind."""
    nodes = Nodes(tmp_path, 2, (*EASY, "--need", "1"))
    for key in ("cpus", "memory-gb"):
        other = nodes.start(1, f"--min-{key}", "1000000")
        time.sleep(2)
        first = nodes.start(0)
        status, _, err = ended(first)
        assert status == 3 and err.startswith(f"n1: {key[:4]}") and err.count("\n") == 1, err
        assert ended(other)[0] == 0


def test_fewer_good_nodes_than_needed_are_a_failure(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, 1)
    status, out, err = ended(nodes.start(0, "--min-cpus", "1000000"))
    assert status == 1 and out.startswith("0 of 1 nodes are good")
    assert err.startswith("n0: cpus = ") and nodes.listed("good_nodes") == []


def test_a_shared_folder_that_the_first_node_cannot_write_is_one_line(tmp_path: Path) -> None:
    with read_only(tmp_path / "shared", tmp_path / "view") as view:
        status, out, err = ended(Nodes(view, 1).start(0))
    assert status == 1 and out == ""
    assert err == (
        f"n0: --shared = '{view}/preflight-local': cannot be written, the file system is "
        "read-only; choose a folder that can be written\n"
    )


def test_a_folder_that_is_not_the_same_one_is_said_where_it_is_not(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path / "elsewhere", 2, deadline=5)
    status, _, err = ended(nodes.start(1))
    assert status == 1
    assert err.startswith(f"n1: --shared = '{nodes.shared}': shows no sign of the first node (node")
