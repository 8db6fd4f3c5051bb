"""A real Slurm of several nodes on this computer: only the nodes are emulated, by namespaces.

A node has its own network, host name, processes, /tmp and /dev/shm, and can lose its power. All of
them live below one process in namespaces of its own (``emulator/head.sh``): when it ends, also
because these tests were killed, the kernel takes down every daemon, job, mount and network.
"""

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from string import Template
from types import TracebackType
from typing import Self

import psutil

from tests.waiting import PATIENCE_SECONDS

HERE = Path(__file__).parent / "emulator"
SUBNET = "10.207.0"
CONTROLLER = f"{SUBNET}.254"
FREEZER = Path("/sys/fs/cgroup/freezer")
APART = ["--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]


def why_not() -> str | None:
    """What this computer lacks; None if it can run a cluster."""
    for program in ("slurmctld", "slurmd", "munged", "ip", "nsenter", "unshare"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            return f"{program} is not installed (apt-get install slurm-wlm munge iproute2)"
    test = ["unshare", "--net", *APART, "ip", "link", "add", "bridge", "type", "bridge"]
    tried = subprocess.run(test, capture_output=True, text=True)
    if tried.returncode:
        return f"namespaces of its own need root ({tried.stderr.strip()})"
    return None


def poll(event: Callable[[], object], what: str, seconds: float) -> None:
    """Wait for ``event``; AssertionError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not event():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.5)


class SlurmError(RuntimeError):
    """A Slurm command has failed."""


class Cluster:
    """``with Cluster(folder, nodes=4, shared=[...]) as cluster: cluster.slurm("sinfo")``"""

    def __init__(self, folder: Path, *, nodes: int, shared: Sequence[Path] = ()) -> None:
        """``shared``: what the nodes see of /tmp, besides the cluster's own ``folder``."""
        self.folder, self.nodes = folder, range(1, nodes + 1)
        # Names of its own: cgroups, which go by them, are all in one place.
        self._prefix = f"gpu{os.getpid()}-"
        self._shared = shared
        self._booted: dict[int, psutil.Process] = {}
        self._networks: set[str] = set()
        # The Makefile's tests meet at the loopback; nodes do not.
        ours = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
        self.environment = {
            **ours,
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "SLURM_CONF": str(folder / "etc/slurm.conf"),
        }

    def __enter__(self) -> Self:
        self._configure()
        with (self.folder / "log/head.out").open("w") as log:
            outside = subprocess.Popen(
                ["unshare", "--net", *APART, "bash", HERE / "head.sh", self.folder, CONTROLLER],
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._outside = outside
        try:
            self._head = _first_inside(psutil.Process(outside.pid))
            self._note_network(self._head)
            poll((self.folder / "run/munge.sock").exists, "munged", PATIENCE_SECONDS)
            for node in self.nodes:
                self.boot(node)
            for node in self.nodes:
                self.wait_idle(node)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def slurm(self, *command: object, cwd: Path | None = None, **variables: str) -> str:
        """What a Slurm command prints, run from outside of any node; SlurmError if it fails."""
        done = subprocess.run(
            [*self._at_head(), f"--wd={cwd or self.folder}", "--", *map(str, command)],
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        if done.returncode:
            raise SlurmError(f"{command} exits with {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def boot(self, node: int) -> None:
        """Power on."""
        names = [self.folder, self.name(node), f"{SUBNET}.{node}", *self._shared]
        with (self.folder / f"log/{self.name(node)}.out").open("a") as log:
            outside = subprocess.Popen(
                [*self._at_head(), "bash", HERE / "node.sh", *names],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._booted[node] = _first_inside(psutil.Process(outside.pid), besides=self._head)
        self._note_network(self._booted[node])

    def crash(self, node: int) -> None:
        """Cut the power: whoever is connected hears nothing, not even an end."""
        cut = ["ip", "-n", self.name(node), "link", "set", "eth0", "down"]
        subprocess.run([*self._at_head(), *cut], check=True)
        self._booted.pop(node).kill()

    @contextmanager
    def taken(self, node: int, port: int) -> Iterator[None]:
        """A program listens at ``port`` of the node, which is none of any job's."""
        at = ["nsenter", "-t", str(self._booted[node].pid), "--net"]
        with subprocess.Popen(
            [*at, sys.executable, "-u", "-m", "http.server", str(port)], stdout=subprocess.PIPE
        ) as program:
            assert program.stdout is not None
            program.stdout.readline()  # it listens
            try:
                yield
            finally:
                program.kill()

    def name(self, node: int) -> str:
        return f"{self._prefix}{node:02d}"

    def numbers(self, names: str) -> list[int]:
        """The nodes of a list as Slurm writes it."""
        listed = self.slurm("scontrol", "show", "hostnames", names).splitlines()
        return [int(each.removeprefix(self._prefix)) for each in listed]

    def wait_idle(self, node: int, seconds: float = PATIENCE_SECONDS) -> None:
        """Until Slurm would start jobs there."""
        poll(lambda: self._state(node) == "idle", f"{self.name(node)} idle", seconds)

    def processes(self, node: int) -> list[psutil.Process]:
        """Everything that runs on the node but for Slurm's own."""
        booted = self._booted.get(node)  # None: without power
        children = booted.children(recursive=True) if booted else []
        return [process for process in children if _is_of_a_job(process)]

    def _at_head(self) -> list[str]:
        """What makes a command run in all of the head's namespaces."""
        return ["nsenter", "-t", str(self._head.pid), "-a"]

    def _state(self, node: int) -> str:
        with suppress(SlurmError):  # not there yet
            return self.slurm("sinfo", "-h", "-n", self.name(node), "-o", "%T")
        return "unknown"

    def _configure(self) -> None:
        for part in ("etc", "log", "run", "state", "spool", "dev"):
            (self.folder / part).mkdir(parents=True)
        etc = self.folder / "etc"
        nodes = f"{self._prefix}[{self.nodes[0]:02d}-{self.nodes[-1]:02d}]"
        (etc / "munge.key").touch(0o600)
        (etc / "munge.key").write_bytes(secrets.token_bytes(128))
        values = {
            "folder": self.folder,
            "controller": CONTROLLER,
            "nodes": nodes,
            "proctrack": _proctrack(),
        }
        template = Template((HERE / "slurm.conf").read_text())
        (etc / "slurm.conf").write_text(template.substitute(values))
        for gpu in range(8):  # Slurm wants devices, and looks no further
            (self.folder / f"dev/nvidia{gpu}").symlink_to("/dev/null")
        devices = f"NodeName={nodes} Name=gpu Type=h100 File={self.folder}/dev/nvidia[0-7]\n"
        (etc / "gres.conf").write_text(devices)
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        hosts = {"127.0.0.1": "localhost", CONTROLLER: "head"}
        hosts |= {f"{SUBNET}.{node}": self.name(node) for node in self.nodes}
        (etc / "hosts").write_text("".join(f"{a} {n}\n" for a, n in hosts.items()))
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")

    def _note_network(self, process: psutil.Process) -> None:
        self._networks.add(os.readlink(f"/proc/{process.pid}/ns/net"))

    def _end(self) -> None:
        assert self._outside.stdin is not None
        self._outside.stdin.close()
        try:
            self._outside.wait(10)
        except subprocess.TimeoutExpired:
            self._outside.kill()  # and, for --kill-child, the head
        poll(lambda: not list(self._inhabitants()), "the cluster's end", PATIENCE_SECONDS)
        for node in self.nodes:
            _remove_cgroups(FREEZER / f"slurm_{self.name(node)}")

    def _inhabitants(self) -> Iterator[psutil.Process]:
        """Whatever lives in one of the cluster's networks."""
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if os.readlink(f"/proc/{process.pid}/ns/net") in self._networks:
                    yield process

    def left_behind(self) -> list[str]:
        """What is still there of it after its end."""
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        return [
            *(f"{p.pid}: {p.name()}" for p in self._inhabitants()),
            *(line for line in mounts if str(self.folder) in line),
            *(str(p) for p in Path("/run/netns").glob(f"{self._prefix}*")),
            *(str(p) for p in FREEZER.glob(f"slurm_{self._prefix}*")),
        ]


def _first_inside(outside: psutil.Process, besides: psutil.Process | None = None) -> psutil.Process:
    """The first process of the pid namespace that a descendant of ``outside`` makes, in none of
    its own and that of ``besides``."""
    known = {_pid_namespace(process) for process in (outside, besides) if process}
    found: list[psutil.Process] = []

    def look() -> bool:
        with suppress(OSError, psutil.Error):
            found[:] = [
                process
                for process in outside.children(recursive=True)
                if _pid_namespace(process) not in known
            ]
        return bool(found)

    poll(look, "a new pid namespace", PATIENCE_SECONDS)
    return found[0]


def _pid_namespace(process: psutil.Process) -> str:
    return os.readlink(f"/proc/{process.pid}/ns/pid")


def _proctrack() -> str:
    """cgroup where it can be written, as real clusters have it: of a task only the first process
    gets Slurm's signals. pgid comes closest."""
    probe = FREEZER / f"probe_{os.getpid()}"
    with suppress(OSError):
        probe.mkdir()
        probe.rmdir()
        return "cgroup"
    return "pgid"


def _remove_cgroups(folder: Path) -> None:
    for path, _, _ in os.walk(folder, topdown=False):
        os.rmdir(path)


def _is_of_a_job(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        ended = process.status() == psutil.STATUS_ZOMBIE
        return not ended and process.name() not in ("slurmd", "slurmstepd")
    return False
