"""The command line of a preflight."""

import os
import re
import socket
import subprocess
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peergrad.config import Config, require
from peergrad.running.compose import compose_config

HIGHEST = 65_535
NAME = re.compile(r"[\w][\w.-]*")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES")


@dataclass(frozen=True)
class Options:
    """What is asked for. Sizes in GB of 10^9 bytes.

    Example:
        ``Options(folder=Path("/shared/preflight-12.0"), rank=0, names=("gpu01", "gpu02"),
        host="gpu01", address="gpu01", ports=(29500,), gpus=8, config=None, ...)``
    """

    folder: Path
    rank: int
    names: tuple[str, ...]  # of all nodes in rank order, as far as the launcher tells
    host: str
    address: str
    ports: tuple[int, ...]
    gpus: int | None  # None: as many as there are
    config: Config | None
    min_disk: float
    min_shm: float
    min_memory: float | None  # None: by the number of GPUs
    min_cpus: int | None
    min_rate: float  # GB/s
    need: int
    deadline: float  # seconds

    @property
    def nodes(self) -> int:
        return len(self.names)

    @property
    def reporting(self) -> float:
        """Seconds until which nodes must have reported: the rest is for what they do together."""
        return self.deadline / 2


def read_options(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> Options:
    """ValueError, with one line, for what makes no sense; argparse's own exit for unknown words."""
    given = _parser().parse_intermixed_args(arguments)
    rank, nodes = _place(given, environment)
    host = given.host or environment.get("SLURMD_NODENAME") or socket.gethostname()
    named = NAME.fullmatch(host) is not None
    require(named, "--host", host, "is no name of a machine", "use letters, digits, . and -")
    gpus = given.gpus if given.gpus is not None else environment.get("SLURM_GPUS_ON_NODE")
    job = environment.get("SLURM_JOB_ID")
    default = f"{job}.{environment.get('SLURM_RESTART_COUNT', '0')}" if job else "local"
    name = f"preflight-{given.id or default}"
    require(NAME.fullmatch(name) is not None, "--id", given.id, "is no name", "use letters, digits")
    memory, cpus = given.min_memory_gb, given.min_cpus
    overrides = [word for word in given.overrides if word != "--"]
    return Options(
        folder=Path(given.shared) / name,
        rank=rank,
        names=_names(nodes, environment),
        host=host,
        address=given.address or host,
        ports=read_ports(given.ports),
        gpus=None if gpus is None else _whole("--gpus", gpus),
        config=compose_config(overrides)[0] if overrides else None,
        min_disk=_number("--min-disk-gb", given.min_disk_gb),
        min_shm=_number("--min-shm-gb", given.min_shm_gb),
        min_memory=memory if memory is None else _number("--min-memory-gb", memory),
        min_cpus=cpus if cpus is None else _whole("--min-cpus", cpus),
        min_rate=_number("--min-bandwidth", given.min_bandwidth),
        need=_need(given.need, nodes),
        deadline=_deadline(given.deadline),
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="tools/preflight.py",
        description="Check every node of a job, and all of them together, before it starts.",
        epilog="exit status: 0 all nodes are good; 3 some are bad, but --need are good; 1 fewer "
        "are; 2 wrong usage. DIR/preflight-ID/ has the files good_nodes, a name a line, and "
        "bad_nodes, a fault a line.",
    )
    add = parser.add_argument
    add("--shared", required=True, metavar="DIR", help="folder that all nodes share")
    add("--id", help="name of this preflight; default: Slurm's job and restart, or local")
    add("--need", help="nodes that suffice; default: all")
    add("--deadline", default="60", metavar="SECONDS", help="default 60")
    add("--gpus", help="GPUs of a node; default: Slurm's, or as many as there are")
    add("--ports", default="", help="that must be free, as 29500,30000-30007")
    add(
        "--min-disk-gb",
        default="10",
        help="free in run.root (or --shared) and in the folder for temporary files; default 10",
    )
    add("--min-shm-gb", default="1", help="free in /dev/shm; default 1")
    add("--min-memory-gb", help="default: 16 for each GPU, 2 without")
    add("--min-cpus", help="default: one for each GPU, 1 without")
    add("--min-bandwidth", default="0", metavar="GB/S", help="of the all-reduce; default: any")
    add("--rank", help="of this node, without Slurm; default: RANK of the environment, or 0")
    add("--nodes", help="that take part, without Slurm; default: WORLD_SIZE, or 1")
    add("--host", help="name of this node; default: Slurm's, or the machine's")
    add("--address", help="at which other nodes reach this one; default: its name")
    add("overrides", nargs="*", help="the run's configuration: its model and folder are checked")
    return parser


def read_ports(text: str) -> tuple[int, ...]:
    """``29500,30000-30007`` as numbers."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, dash, last = part.partition("-")
        ends = (first, last if dash else first)
        fine = all(end.isdecimal() and 0 < int(end) <= HIGHEST for end in ends)
        fine = fine and int(ends[0]) <= int(ends[1])
        rule = f"{part!r} is neither a port nor a range of ports up to {HIGHEST}"
        require(fine, "--ports", text, rule, "write 29500,30000-30007")
        found += range(int(ends[0]), int(ends[1]) + 1)
    return tuple(dict.fromkeys(found))


def _place(given: Namespace, environment: Mapping[str, str]) -> tuple[int, int]:
    """Rank of this node, and how many there are."""
    if given.rank is None and given.nodes is None and all(n in environment for n in SLURM):
        place, tasks, number = (int(environment[name]) for name in SLURM)
        rule = f"must be the number of nodes ({number}): one task checks a node"
        require(tasks == number, SLURM[1], tasks, rule, f"use srun -N{number} -n{number}")
        return place, number
    rank = _whole("--rank", given.rank or environment.get("RANK", "0"))
    nodes = _whole("--nodes", given.nodes or environment.get("WORLD_SIZE", "1"))
    rule = f"must lie below the number of nodes ({nodes})"
    require(rank < nodes, "--rank", rank, rule, "correct it, or --nodes")
    return rank, nodes


def _names(nodes: int, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Only Slurm's own program reads its lists of nodes; without it nodes are named by rank."""
    listed = environment.get("SLURM_STEP_NODELIST", "")
    try:
        show = ["scontrol", "show", "hostnames", listed]
        done = subprocess.run(show, capture_output=True, text=True, timeout=5, check=False)
        names = done.stdout.split() if listed else []
    except (OSError, subprocess.TimeoutExpired):
        names = []
    return tuple(names if len(names) == nodes else (f"node {rank}" for rank in range(nodes)))


def _number(key: str, value: str) -> float:
    fine = re.fullmatch(r"\d+(\.\d+)?", str(value)) is not None
    require(fine, key, value, "must be a number of at least 0", "correct it")
    return float(value)


def _whole(key: str, value: str) -> int:
    require(str(value).isdecimal(), key, value, "must be a whole number", "correct it")
    return int(value)


def _need(value: str | None, nodes: int) -> int:
    need = nodes if value is None else _whole("--need", value)
    rule = f"must lie in [1, {nodes}], the nodes"
    require(1 <= need <= nodes, "--need", need, rule, "correct it")
    return need


def _deadline(value: str) -> float:
    seconds = _number("--deadline", value)
    require(seconds >= 5, "--deadline", value, "must be at least 5 seconds", "use 60")
    return seconds
