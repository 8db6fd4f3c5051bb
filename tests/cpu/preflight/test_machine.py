"""Processors, memory, disks, limits, ports of this machine, and files as kernels write them."""

import os
import resource
import socket
import tempfile
from pathlib import Path

import pytest

from peergrad.preflight.machine import (
    check_cpus,
    check_disks,
    check_infiniband,
    check_limits,
    check_memory,
    memory_limit,
)
from peergrad.preflight.ports import check_ports
from tests.disk import small_disk


def test_processors_that_this_task_may_use_count() -> None:
    allowed = os.sched_getaffinity(0)
    assert check_cpus(len(allowed), None).wrong == ()
    os.sched_setaffinity(0, {min(allowed)})
    try:
        (line,) = check_cpus(8, None).wrong
    finally:
        os.sched_setaffinity(0, allowed)
    assert line.startswith("cpus = 1: this task may use too few, 8 are needed for 8 GPUs; ")
    assert check_cpus(0, 10_000).wrong[0].endswith("sbatch --exclusive")


def test_memory_is_what_is_free() -> None:
    assert check_memory(0, 0.001).wrong == ()
    (line,) = check_memory(0, 1e9).wrong
    assert line.startswith("memory = '") and "at least 1000000000.0 GB must be free; " in line


def test_control_groups_of_both_versions_limit_memory(tmp_path: Path) -> None:
    """The step's own group says max, the job's around it does not."""
    step = tmp_path / "system.slice/job_12/step_0"
    step.mkdir(parents=True)
    (step / "memory.max").write_text("max\n")
    (step.parent / "memory.max").write_text("64000000000\n")
    groups = tmp_path / "cgroup"
    groups.write_text("0::/system.slice/job_12/step_0\n")
    assert memory_limit(tmp_path, groups) == 64_000_000_000
    old = tmp_path / "memory/slurm/job_12"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("32000000000\n")
    groups.write_text("5:devices:/slurm/job_12\n4:memory:/slurm/job_12\n")
    assert memory_limit(tmp_path, groups) == 32_000_000_000
    assert memory_limit(tmp_path, tmp_path / "absent") is None


def test_disks_must_have_room_and_take_what_is_written(tmp_path: Path) -> None:
    assert check_disks({"TMPDIR": tmp_path}, 0.001, 0.0).wrong == ()
    with small_disk(tmp_path / "full", "600k") as full:
        (line,) = check_disks({"run.root": full / "runs"}, 0.0, 0.0).wrong
        assert line.startswith(f"run.root = '{full}/runs': cannot be written, the disk has too lit")
    with small_disk(tmp_path / "small", "4m") as small:
        (line,) = check_disks({"run.root": small}, 0.1, 0.0).wrong
        assert line.startswith(f"run.root = '{small}': has 4.2 MB free, 100.0 MB are needed; ")
    (line,) = check_disks({}, 0.0, 1e9).wrong
    assert line.startswith("/dev/shm = '/dev/shm': has ") and "--shm-size" in line


def test_a_task_must_be_able_to_open_many_files() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < 16_384:
        pytest.skip("this machine itself allows fewer")
    assert check_limits(Path("/nowhere")).wrong == ()
    pid = os.fork()
    if not pid:  # a process cannot raise its limit again
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        found = check_limits(Path("/nowhere")).wrong
        fine = len(found) == 1 and found[0].startswith("ulimit -Hn = 4096: a process may open too")
        os._exit(0 if fine else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_infiniband_ports_are_counted_by_state(tmp_path: Path) -> None:
    assert check_infiniband(tmp_path).facts is None
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN"), ("mlx5_2", "4: ACTIVE")):
        port = tmp_path / name / "ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
    assert check_infiniband(tmp_path).facts == {"infiniband ports that are up": "2 of 3"}


def test_memory_must_be_lockable_where_there_is_infiniband() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own are for one user
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "mlx5_0/ports/1").mkdir(parents=True)
        (folder / "mlx5_0/ports/1/state").write_text("4: ACTIVE\n")
        pid = os.fork()
        if not pid:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (65_536, 65_536))
            if os.geteuid() == 0:  # root may lock as much as it likes
                os.setresuid(65_534, 65_534, 65_534)
            found = check_infiniband(folder).wrong
            fine = len(found) == 1 and found[0].startswith("ulimit -l = 65536: memory must be lock")
            os._exit(0 if fine else 1)
        assert os.waitpid(pid, 0)[1] == 0


def test_a_taken_port_is_named_with_its_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (line,) = check_ports((port,)).wrong
        assert line.startswith(f"port = {port}: is taken by ") and f"(pid {os.getpid()});" in line
    assert check_ports((port,)).wrong == ()


def test_a_port_of_connections_that_have_just_ended_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            server.accept()[0].close()  # this side waits in TIME_WAIT
    assert check_ports((port,)).wrong == ()
