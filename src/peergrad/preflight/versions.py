"""What must be the same on all nodes: the software, and the model that they read."""

import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import peergrad
from peergrad.parallel.hf.companions import Companions
from peergrad.parallel.hf.config import read_shape
from peergrad.parallel.hf.fit import check_weights
from peergrad.preflight.report import Found

PACKAGES = (
    *("torch", "megatron-core", "transformer-engine", "transformer-engine-torch"),
    *("nvidia-cudnn-cu13", "sglang", "triton"),
)
NCCL = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")
NONE = "none"


def versions() -> Found:
    here = Path(peergrad.__file__).parent
    found = {name: _version(name) for name in PACKAGES}
    nccl = next((v for v in map(_version, NCCL) if v != NONE), NONE)
    return Found(
        facts={
            "python": platform.python_version(),
            **found,
            "nccl": nccl,
            "peergrad": peergrad.__version__,
            "peergrad's commit": _commit(here),
            "peergrad's files": digest(here),
        }
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return NONE


def _commit(folder: Path) -> str:
    """The last commit that touched ``folder``; "none" if it is not from a repository."""
    git = ["git", "-C", str(folder), "log", "-1", "--format=%h", "--", "."]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return NONE
    return done.stdout.strip() or NONE


def digest(folder: Path) -> str:
    """Of all Python files below ``folder``, changed ones too, which a commit does not tell."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        total.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]


def check_model(path: str, weights: bool) -> Found:
    """Whether everything of HF folder ``path`` can be read here; ``weights``: those, too, whose
    headers must fit the sizes of their files."""
    try:
        shape = read_shape(path)
        companions = Companions.read(Path(path))
        total = hashlib.sha256(companions.files["config.json"])
        if weights:
            folder = check_weights(path, "model.path", shape, values=False)
            files = sorted({tensor.file for tensor in folder.tensors.values()})
            for file in files:
                total.update(f"{file.name} {file.stat().st_size}\n".encode())
    except ValueError as error:
        return Found((str(error),))
    return Found(facts={"the model in model.path": total.hexdigest()[:12]})
