"""What a node must have for its ranks: processors, memory, room on its disks, limits."""

import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from peergrad.preflight.report import Found, problem
from peergrad.storage import StorageError, existing, in_bytes, writing

GB = 1e9
FILES = 16_384
"""Files and sockets that a process may open: connections to hundreds of prompts in flight, files of
weights and kernels. Slurm's own units allow 51,200 and more."""
MEMORY_OF_A_GPU, MEMORY_WITHOUT = 16.0, 2.0  # GB
CGROUPS = Path("/sys/fs/cgroup")
INFINIBAND = Path("/sys/class/infiniband")
TRIAL = bytes(1 << 20)


def check_cpus(gpus: int, least: int | None) -> Found:
    cores = len(os.sched_getaffinity(0))
    need = max(1, gpus) if least is None else least
    if cores >= need:
        return Found()
    why = "" if least is not None else f" for {gpus} GPUs"
    rule = f"this task may use too few, {need} are needed{why}"
    remedy = "use srun --cpus-per-task or --cpu-bind=none, and sbatch --exclusive"
    return Found((problem("cpus", cores, rule, remedy),))


def check_memory(gpus: int, least: float | None) -> Found:
    default = MEMORY_OF_A_GPU * gpus or MEMORY_WITHOUT
    need = (default if least is None else least) * GB
    free, limit = psutil.virtual_memory().available, memory_limit()
    have = free if limit is None else min(free, limit)
    if have >= need:
        return Found()
    rule = f"at least {in_bytes(need)} must be free"
    remedy = "use sbatch --mem=0, see what else runs there, or lower --min-memory-gb"
    return Found((problem("memory", in_bytes(have), rule, remedy),))


def memory_limit(root: Path = CGROUPS, groups: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that this process's control groups, of either version, allow; None if they do not
    say."""
    found = []
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        old = controllers == "memory"
        if not old and controllers:
            continue
        top = root / "memory" if old else root
        name = "memory.limit_in_bytes" if old else "memory.max"
        for folder in _upwards(top, path):
            text = _text(folder / name)
            found += [int(text)] if text.isdecimal() else []
    return min(found, default=None)


def _upwards(top: Path, path: str) -> Iterator[Path]:
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for length in range(len(parts), -1, -1):
        yield top.joinpath(*parts[:length])


def check_disks(folders: dict[str, Path], least: float, shm: float) -> Found:
    """``folders`` by the name that a message calls them; all must be writable and have ``least``
    GB free."""
    found = Found()
    for key, folder in folders.items():
        found += _check_disk(key, folder, least, "free some space, or lower --min-disk-gb")
    remedy = "remove what dead processes left there, or give the container more (--shm-size)"
    return found + _check_disk("/dev/shm", Path("/dev/shm"), shm, remedy)


def _check_disk(key: str, folder: Path, least: float, remedy: str) -> Found:
    place = existing(folder)
    try:
        with writing(key, folder), tempfile.TemporaryFile(dir=place) as file:
            file.write(TRIAL)
            file.flush()
    except StorageError as error:
        return Found((str(error),))
    there = os.statvfs(place)
    free = there.f_bavail * there.f_frsize
    if free < least * GB:
        rule = f"has {in_bytes(free)} free, {in_bytes(least * GB)} are needed"
        return Found((problem(key, str(folder), rule, remedy),))
    return Found()


def temporary() -> Path:
    """Where Python keeps temporary files; it looks for one that can be written, so a variable that
    names another is taken by its word."""
    return Path(os.environ.get("TMPDIR") or tempfile.gettempdir())


def check_limits(infiniband: Path = INFINIBAND) -> Found:
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)  # up to it a process raises its own
    found = Found()
    if files != resource.RLIM_INFINITY and files < FILES:
        rule = f"a process may open too few files, {FILES} are needed"
        remedy = "raise LimitNOFILE of slurmd, or ulimit -Hn"
        found += Found((problem("ulimit -Hn", files, rule, remedy),))
    return found + check_infiniband(infiniband)


def check_infiniband(folder: Path = INFINIBAND) -> Found:
    """Adapters, if there are any: how many ports are up, which must be the same everywhere, and
    whether memory may be locked for them."""
    states = [_text(path) for path in sorted(folder.glob("*/ports/*/state"))]
    if not states:
        return Found()
    up = sum("ACTIVE" in state for state in states)
    found = Found(facts={"infiniband ports that are up": f"{up} of {len(states)}"})
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked != resource.RLIM_INFINITY and os.geteuid() != 0:
        rule = "memory must be lockable without limit for InfiniBand"
        remedy = "set LimitMEMLOCK=infinity for slurmd, and see PropagateResourceLimitsExcept"
        found += Found((problem("ulimit -l", locked, rule, remedy),))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
