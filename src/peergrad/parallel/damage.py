"""Whether a checkpoint folder is whole.

``meta.json`` holds the size and the digest of every file, and a digest of itself. Sizes, and the
content of what is below ``SMALL_BYTES``, are compared in a moment by ``damage``; weights and
optimizer state of real models are larger, and ``verify`` has all ranks read them before anything is
loaded.
"""

import json
import logging
import pickle
import time
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint.filesystem import FileSystemReader

from peergrad.parallel.digests import changed_file, digests, first_changed
from peergrad.parallel.mesh import Mesh

log = logging.getLogger(__name__)
FORMAT = 1
SEAL = "seal"
SMALL_BYTES = 64 << 20
_KINDS: dict[str, type] = {
    "step": int,
    "updates": int,
    "world": int,
    "dtype": str,
    "shape": dict,
    "files": dict,
}


def read_meta(path: Path) -> dict[str, Any]:
    """meta.json of checkpoint ``path``. ValueError, which says why, if it is none."""
    try:
        found = json.loads((path / "meta.json").read_bytes())
    except OSError as error:
        raise ValueError(f"meta.json: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"meta.json is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"meta.json holds a {type(found).__name__} instead of an object")
    if found.get("format") != FORMAT:
        raise ValueError(f"format {found.get('format')} instead of {FORMAT}")
    if SEAL in found and found != sealed(found):  # there is none in one of an older peergrad
        raise ValueError("meta.json has another content than was written (XXH3)")
    for key, kind in _KINDS.items():
        if not isinstance(found.get(key), kind):
            raise ValueError(f"meta.json has no {key}, or not of the right kind")
    return found


def sealed(meta: dict[str, Any]) -> dict[str, Any]:
    """``meta`` with the digest of all else in it, as ``read_meta`` compares it."""
    rest = {key: value for key, value in meta.items() if key != SEAL}
    return {**rest, SEAL: xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode())}


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint folder ``path``, as one process can tell in a moment; None
    if nothing is. See ``verify``."""
    if not path.is_dir():
        return "no such folder"
    try:
        meta = read_meta(path)
        sizes = meta["files"]
        if (problem := _misfit(path, sizes)) is not None:
            return problem
        small = {n: v for n, v in _digests(meta).items() if sizes[n] < SMALL_BYTES}
        return first_changed(path, small)
    except (ValueError, OSError, AttributeError, TypeError, KeyError) as error:
        return " ".join(str(error).split())


def verify(path: Path, mesh: Mesh) -> str | None:
    """What is wrong with the content of a checkpoint's large files, whose sizes ``damage`` has
    found right; None if nothing is. Collective; reads all of them once, divided over the ranks."""
    meta = mesh.share(lambda: read_meta(path))
    large = {n: v for n, v in _digests(meta).items() if meta["files"][n] >= SMALL_BYTES}
    start = time.monotonic()
    problem = changed_file(path, large, mesh)
    if mesh.rank == 0 and large:
        size = sum(meta["files"][name] for name in large)
        log.info("%s: %d bytes verified in %.1f s", path, size, time.monotonic() - start)
    return problem


def _digests(meta: dict[str, Any]) -> dict[str, str]:
    """By file name; none in a checkpoint of an older peergrad. ValueError if a file has none."""
    found: dict[str, str] = meta.get("xxh3_128", dict.fromkeys(meta["files"], ""))
    missing = sorted(set(meta["files"]) - set(found))
    if missing:
        raise ValueError(f"meta.json has no digest of {missing[0]}")
    return {name: found[name] for name in meta["files"] if found[name]}


def _misfit(path: Path, sizes: dict[str, int]) -> str | None:
    for name, size in sizes.items():
        inside = PurePath(name)
        if inside.is_absolute() or ".." in inside.parts:
            return f"meta.json names {name!r}, which is not inside the folder"
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def describe_files(folder: Path, mesh: Mesh, known: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Sizes and digests of all files in ``folder``, as ``meta.json`` keeps them; ``known``: digests
    that this rank has taken, by the files' names. Collective; the folder is whole on rank 0."""
    sizes: dict[str, int] = mesh.share(lambda: _sizes(folder))
    return {"files": sizes, "xxh3_128": digests(folder, sizes, mesh, known=known)}


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def culprit(model: Path) -> str | None:
    """The file of a Megatron checkpoint that cannot be read, and why. Reads all of it: for a
    checkpoint whose loading has failed."""
    readers: dict[str, Callable[[Path], object]] = {
        "metadata.json": lambda file: json.loads(file.read_text()),
        "common.pt": lambda file: torch.load(file, weights_only=False, map_location="cpu"),
        ".metadata": lambda file: pickle.loads(file.read_bytes()),
    }
    for name, read in readers.items():
        try:
            read(model / name)
        except Exception as error:
            return f"{model.name}/{name} ({first_line(error)})"
    reader = FileSystemReader(model)
    for part in reader.read_metadata().storage_data.values():
        try:
            with (model / part.relative_path).open("rb") as file:
                file.seek(part.offset)
                content = BytesIO(file.read(part.length))
            torch.load(content, weights_only=False, map_location="cpu")
        except Exception as error:
            return f"{model.name}/{part.relative_path} ({first_line(error)})"
    return None


def first_line(error: BaseException) -> str:
    """The error in one line; of torch's CheckpointException, which quotes all ranks, the first."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
