"""The packages that a GPU machine without a network lacks: pure Python but for a few, no torch.

``gpu.sh --carry`` gathers them in ``build/gpu-wheels``, for Python 3.12 on x86-64, in the versions
of ``requirements-cpu.lock``; peers that are not in there have theirs here.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from typing import Any

from machine import ROOT, git_state

FOLDER = ROOT / "build" / "gpu-wheels"
COMMIT = FOLDER / "commit.json"
LARGEST = 58  # MiB, and with the sources less than 64
PYTHON = "3.12"
MANYLINUX = ("_2_28", "_2_27", "_2_24", "_2_17", "2014")
NEEDED = (
    *("megatron-core", "jaxtyping", "wadler_lindig", "beartype", "numpy", "psutil", "packaging"),
    *("transformers", "tokenizers", "safetensors", "huggingface_hub", "regex", "PyYAML", "tqdm"),
    *("rich", "markdown-it-py", "mdurl", "Pygments", "truststore", "xxhash"),
    *("pytest", "pytest-timeout", "pluggy", "iniconfig", "filelock", "fsspec", "typing_extensions"),
    *("httpx", "httpcore", "h11", "anyio", "idna", "certifi", "msgspec", "aiohttp", "aiosignal"),
    *("aiohappyeyeballs", "attrs", "frozenlist", "multidict", "propcache", "yarl", "httpx2"),
    "httpcore2",
)
PEERS = ("liger-kernel==0.8.5", "cut-cross-entropy==25.1.1", "verl==0.9.1")


def main() -> int:
    """Fill the folder anew. Raises ValueError if it would not travel."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    for_it = [f"--platform=manylinux{name}_x86_64" for name in MANYLINUX]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *for_it]
    target = ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp"]
    subprocess.run([*command, *target, f"--dest={FOLDER}", *pinned(), *PEERS], check=True)
    COMMIT.write_text(json.dumps({**git_state(), "sources": digest()}))
    size = sum(file.stat().st_size for file in FOLDER.iterdir()) / 2**20
    if size > LARGEST:
        raise ValueError(f"{FOLDER} holds {size:.0f} MiB, at most {LARGEST} travel: leave some out")
    print(f"{len(list(FOLDER.glob('*.whl')))} wheels of {size:.0f} MiB in {FOLDER}")
    return 0


def pinned() -> list[str]:
    """``NEEDED`` with the versions of the lock."""
    lines = (ROOT / "requirements-cpu.lock").read_text().splitlines()
    versions = {line.partition("==")[0]: line for line in lines if "==" in line}
    return [versions[name] for name in NEEDED]


def carried_commit() -> dict[str, Any]:
    """What was checked out where the packages were gathered, and whether the sources are other ones
    now; nulls if nothing was."""
    if not COMMIT.exists():
        return {"commit": None, "changed": None}
    found = json.loads(COMMIT.read_text())
    return {
        "commit": found["commit"],
        "changed": found["changed"] or found["sources"] != digest(),
    }


def digest() -> str:
    """Of everything that is measured, and that measures."""
    whole = hashlib.sha256()
    for folder in ("src", "benchmarks", "tests/kernels"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            whole.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return whole.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
