"""The GPUs of a node, by what ``nvidia-smi`` prints as CSV.

It comes with the driver, needs no library of the version that fits, and can be given up on when it
hangs, as it does on a GPU that has fallen off the bus.
"""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from peergrad.preflight.report import Found, problem

PROGRAM = "nvidia-smi"
SECONDS = 15.0
FIELDS = (
    "index",
    "uuid",
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "ecc.errors.uncorrected.volatile.total",
)
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""The same field; drivers before 535 only know the second name."""
PROCESSES = ("gpu_uuid", "pid", "used_memory", "process_name")  # names may have commas: the last
SLOW = {  # NVML's nvmlClocksEventReasons
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
ABSENT = ("[N/A]", "N/A", "[Not Supported]", "[Insufficient Permissions]")
FREE = 0.95
"""Of the memory of a GPU that nobody uses, the driver keeps less than the rest."""
SHARED = "nvidia-cuda-mps-server"
REBOOT = "drain the node and reset the GPU, or reboot"


@dataclass(frozen=True)
class Gpu:
    """A line of ``nvidia-smi --query-gpu``.

    Example:
        ``Gpu(index="0", uuid="GPU-8f...", name="NVIDIA H100 80GB HBM3", driver="580.95.05",
        total="81559", used="4", errors="0", reasons="0x0000000000000001")``
    """

    index: str
    uuid: str
    name: str
    driver: str
    total: str  # MiB
    used: str  # MiB
    errors: str  # uncorrected ones of memory since the driver was loaded
    reasons: str  # why the clock is what it is: bits


@dataclass(frozen=True)
class Process:
    """A line of ``nvidia-smi --query-compute-apps``."""

    uuid: str
    pid: str
    memory: str  # MiB
    name: str


def check_gpus(asked: int | None) -> tuple[int, Found]:
    """How many GPUs there are for this task, and what is wrong with them. ``asked``: how many there
    must be; None for any number, none too."""
    if asked == 0:
        return 0, Found()
    try:
        gpus, processes = ask()
    except FileNotFoundError:
        rule, remedy = f"{PROGRAM} is not there", "install the driver, or use --gpus 0"
        return 0, Found((problem("gpus", asked, rule, remedy),) if asked else ())
    except subprocess.TimeoutExpired:
        rule = f"{PROGRAM} does not answer within {SECONDS:.0f} s"
        return asked or 0, Found((problem("gpus", asked, rule, REBOOT),))
    except (ValueError, OSError) as error:
        return asked or 0, Found((problem("gpus", asked, str(error), REBOOT),))
    mine = visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    found = judge(mine, processes)
    if asked is not None and len(mine) != asked:
        rule = f"{asked} are asked for"
        remedy = "see dmesg for one that is lost, or correct --gpus and sbatch --gpus-per-node"
        found = Found((problem("gpus", len(mine), rule, remedy),)) + found
    return len(mine), found


def ask() -> tuple[list[Gpu], list[Process]]:
    """ValueError for what it reports, TimeoutExpired if it does not answer."""
    for reasons in REASONS:
        done = _query("gpu", (*FIELDS, reasons))
        if "is not a valid field" not in done.stdout + done.stderr:
            break
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())[:200]
        raise ValueError(f"{PROGRAM} ended with status {done.returncode} ({said})")
    apps = _query("compute-apps", PROCESSES)
    return read_gpus(done.stdout), read_processes(apps.stdout if apps.returncode == 0 else "")


def _query(what: str, fields: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    words = [PROGRAM, f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    return subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)


def read_gpus(text: str) -> list[Gpu]:
    return [Gpu(*row) for row in _rows(text, len(FIELDS) + 1)]


def read_processes(text: str) -> list[Process]:
    return [Process(*row) for row in _rows(text, len(PROCESSES))]


def _rows(text: str, columns: int) -> list[list[str]]:
    rows = [line.split(", ", columns - 1) for line in text.splitlines() if line.strip()]
    for row in rows:
        if len(row) != columns:
            raise ValueError(f"{PROGRAM} printed {', '.join(row)[:200]!r}, not {columns} values")
    return [[value.strip() for value in row] for row in rows]


def visible(gpus: Sequence[Gpu], devices: str | None) -> list[Gpu]:
    """Those that ``CUDA_VISIBLE_DEVICES`` names, by number or the beginning of their name; all
    without it. CUDA ends the list at the first that is not there."""
    if devices is None:
        return list(gpus)
    found: list[Gpu] = []
    for device in filter(None, devices.split(",")):
        named = [g for g in gpus if device == g.index or g.uuid.startswith(device)]
        if device.startswith("MIG") or not named:
            break
        found += named[:1]
    return found


def judge(gpus: Sequence[Gpu], processes: Sequence[Process]) -> Found:
    """What is wrong with ``gpus``; processes on others are nobody's business here."""
    wrong, unknown = [], []
    for gpu in gpus:
        name, holders = f"gpu {gpu.index}", [p for p in processes if p.uuid == gpu.uuid]
        wrong += _memory(name, gpu, [p for p in holders if SHARED not in p.name])
        if gpu.errors.isdecimal():
            if int(gpu.errors):
                rule = "uncorrected memory errors since the driver was loaded"
                wrong.append(problem(f"{name} ecc", int(gpu.errors), rule, REBOOT))
        elif gpu.errors in ABSENT:
            unknown.append("memory errors of GPUs")
        slow = _slow(gpu.reasons)
        if slow is None and gpu.reasons in ABSENT:
            unknown.append("slowdown of GPUs")
        elif slow:
            remedy = "see to its cooling and power (nvidia-smi -q -d PERFORMANCE)"
            wrong.append(problem(f"{name} clock", gpu.reasons, f"{slow} is active", remedy))
        odd = [v for v in (gpu.total, gpu.used, gpu.errors, gpu.reasons) if _odd(v)]
        if odd:
            wrong.append(problem(name, odd[0], f"{PROGRAM} says so", REBOOT))
    names = sorted({gpu.name for gpu in gpus})
    if len(names) > 1:
        rule, remedy = "are not of one model", "choose GPUs of one model (sbatch --constraint)"
        wrong.append(problem("gpus", ", ".join(names), rule, remedy))
    drivers = sorted({gpu.driver for gpu in gpus})
    facts = {"gpu model": ", ".join(names), "driver": ", ".join(drivers)} if gpus else {}
    return Found(tuple(wrong), tuple(dict.fromkeys(unknown)), facts)


def _memory(name: str, gpu: Gpu, holders: Sequence[Process]) -> list[str]:
    """A process on a GPU of ours, before we have started any, is left over from another job."""
    if holders:
        who = ", ".join(f"{p.name} (pid {p.pid}, {p.memory} MiB)" for p in holders)
        rule = f"is used by {who}"
        return [problem(f"{name} memory", f"{gpu.used} MiB", rule, "end that process")]
    if not (gpu.used.isdecimal() and gpu.total.isdecimal()):
        return []
    if int(gpu.used) <= (1 - FREE) * int(gpu.total):
        return []
    rule = f"of {gpu.total} MiB in use, by a process that {PROGRAM} does not show"
    return [problem(f"{name} memory", f"{gpu.used} MiB", rule, "end it, or reboot the node")]


def _slow(reasons: str) -> str | None:
    """Why the clock is held down by more than the usual power limit; None if that is not known."""
    try:
        bits = int(reasons, 16)
    except ValueError:
        return None
    return ", ".join(name for bit, name in SLOW.items() if bits & bit)


def _odd(value: str) -> bool:
    """``[GPU requires reset]``, ``[Unknown Error]``, ``ERR!``: neither a number nor its absence."""
    return value not in ABSENT and not value.isdecimal() and _slow(value) is None
