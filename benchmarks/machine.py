"""The machine and the software that a figure belongs to."""

import os
import platform
import re
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "megatron-core", "sglang", "transformers", "triton", "numpy")


def describe(gpu: str | None = None, memory: int | None = None) -> dict[str, Any]:
    """Everything a result file says about where it was taken, the script's command line included.

    ``gpu`` and its ``memory`` in bytes are passed in, so that a CPU benchmark need not load torch.
    """
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": ["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]],
        "machine": {
            "cpu": _proc("cpuinfo", r"model name\s*:\s*(.+)") or platform.processor(),
            "cores": os.cpu_count(),
            "memory_gib": _gib(int(_proc("meminfo", r"MemTotal:\s*(\d+)") or 0) * 1024),
            "gpu": gpu,
            "gpu_memory_gib": _gib(memory) if memory else None,
            "os": platform.freedesktop_os_release()["PRETTY_NAME"],
            "kernel": platform.release(),
        },
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        "git": git_state(),
    }


def title(described: dict[str, Any]) -> str:
    """One line for a person."""
    machine, versions = described["machine"], described["versions"]
    gpu = f"{machine['gpu']}, " if machine["gpu"] else ""
    return (
        f"{gpu}{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"torch {versions['torch']}, megatron-core {versions['megatron-core']}"
    )


def result_path(gpu: str | None = None, suffix: str = "") -> Path:
    """``results/<machine>[-suffix]-<date>.json``; the machine is ``cpu<cores>`` or the GPU."""
    words = re.findall(r"[a-z0-9]+", (gpu or f"cpu{os.cpu_count()}").lower())
    name = "-".join([w for w in words if w != "nvidia"] + ([suffix] if suffix else []))
    return RESULTS / f"{name}-{datetime.now():%Y-%m-%d}.json"


def load_average() -> float:
    """Over the last minute, before a measurement: how busy others kept the machine."""
    return round(os.getloadavg()[0], 2)


def _proc(file: str, pattern: str) -> str | None:
    path = Path("/proc") / file
    found = re.search(pattern, path.read_text()) if path.exists() else None
    return found[1] if found else None


def _gib(size: int) -> float:
    return round(size / 2**30, 1)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_state() -> dict[str, Any]:
    """Commit, and whether the sources differ from it; nulls outside a git checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "conf")
    return {
        "commit": git("rev-parse", "HEAD"),
        "changed": None if changed is None else bool(changed),
    }
