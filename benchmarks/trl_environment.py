"""TRL in an environment of its own, beside the torch and transformers that peergrad runs on.

One ``.pth`` file lends it this environment's packages: both trainers load the very same torch and
transformers, and 60 MB hold what only TRL needs. Nothing here can import what lies there.
"""

import json
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import ROOT

LOCK = ROOT / "benchmarks" / "trl.lock"
TRAINER = ROOT / "benchmarks" / "trl_grpo.py"
QUESTION = """
import json
from importlib.metadata import version
packages = "trl", "accelerate", "datasets", "transformers", "torch"
print(json.dumps({p: version(p) for p in packages}))
"""


def make_environment(folder: Path) -> None:
    """Make ``folder``, or bring it up to the lock."""
    if not python_of(folder).exists():
        run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "peergrad-packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python_of(folder)), "install"]
    run([*pip, "--quiet", "--no-deps", "--no-compile", "-r", str(LOCK)])


def python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def versions(folder: Path) -> dict[str, Any]:
    """Of the packages there. Raises ValueError if the environment cannot be used."""
    remedy = f"make it with `python benchmarks/against_trl.py --setup --env {folder}`"
    if not python_of(folder).exists():
        raise ValueError(f"--env = {str(folder)!r}: there is no environment; {remedy}")
    asked = subprocess.run(
        [python_of(folder), "-c", QUESTION], capture_output=True, text=True, check=False
    )
    if asked.returncode != 0:
        raise ValueError(f"--env = {str(folder)!r}: lacks packages of {LOCK.name}; {remedy}")
    found: dict[str, Any] = json.loads(asked.stdout)
    return found


def command(folder: Path, processes: int, task: Path, out: Path) -> list[str]:
    """What starts TRL's trainer; several processes as ``accelerate launch`` would start them."""
    python = str(python_of(folder))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [python, *(torchrun if processes > 1 else []), str(TRAINER), str(task), str(out)]


def run(arguments: Sequence[str]) -> None:
    done = subprocess.run(arguments, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)}: ended with status {done.returncode}")
