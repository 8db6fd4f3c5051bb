"""A digest of every file of a checkpoint: taken and compared by all ranks, each its share.

XXH3 with 128 bits sees every flipped bit at the speed of memory. It guards against disks, copies
and cables, not against forgery.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import xxhash

from peergrad.parallel.mesh import Mesh

T = TypeVar("T")
BUFFER_BYTES = 4 << 20
NONE: Mapping[str, str] = {}
WRITER = re.compile(r"__(\d+)_\d+\.distcp")
"""Files of Megatron's state: they carry the number of the rank that wrote them."""


def digest(file: Path) -> str:
    """XXH3-128 of the file's content, 32 hexadecimal digits. OSError as ``open`` raises it."""
    state, buffer = xxhash.xxh3_128(), memoryview(bytearray(BUFFER_BYTES))
    with file.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            state.update(buffer[:size])
    return state.hexdigest()


def digests(
    folder: Path, names: Iterable[str], mesh: Mesh, *, known: Mapping[str, str] = NONE
) -> dict[str, str]:
    """The digest of each file in ``folder``. Collective; raises OSError if a rank cannot read one.

    Whoever wrote a file reads it, while it is still in that machine's memory, unless it is among
    those whose digest it knows."""
    mine = [name for name in names if _writer(name, mesh.world) == mesh.rank]
    found: dict[str, str] = {}

    def taken() -> dict[str, str]:
        return {name: known.get(name) or digest(folder / name) for name in mine}

    for part in mesh.gather(_attempt(taken)):
        if isinstance(part, str):
            raise OSError(part)
        found |= part
    return found


def changed_file(folder: Path, expected: Mapping[str, str], mesh: Mesh) -> str | None:
    """A file in ``folder`` whose digest is not the expected one, and what is wrong with it; None if
    there is none. Collective."""
    mine = sorted(expected)[mesh.rank :: mesh.world]
    found = mesh.gather(_attempt(lambda: first_changed(folder, {n: expected[n] for n in mine})))
    return next(filter(None, found), None)


def first_changed(folder: Path, expected: Mapping[str, str]) -> str | None:
    """``changed_file`` of one process."""
    for name, value in expected.items():
        if digest(folder / name) != value:
            return f"{name} has another content than was written (XXH3)"
    return None


def _writer(name: str, world: int) -> int:
    match = WRITER.search(name)
    return int(match[1]) % world if match else 0


def _attempt(function: Callable[[], T]) -> T | str:
    """Its result, or why it could not be had: the other ranks wait for either."""
    try:
        return function()
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
