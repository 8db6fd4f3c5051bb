"""The header of a safetensors file: which tensors it holds and where, read without torch."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from peergrad.config import require
from peergrad.parallel.hf.strict_json import parse, shown

LFS = b"version https://git-lfs"
HEADER_LIMIT = 100 << 20
"""Bytes; safetensors itself refuses a longer header."""
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of a number in the precisions that weights are kept in."""
FETCH = "fetch the real file (git lfs pull)"
AGAIN = "download it again"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Example:
        ``Stored(file=Path("m/model.safetensors"), dtype="BF16", shape=(1024,), start=9000,
        size=2048)``
    """

    file: Path
    dtype: str  # safetensors' name: BF16, F32, ...
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    size: int  # bytes


def read_header(file: Path, key: str) -> dict[str, Stored]:
    """Name -> tensor of the safetensors file ``file``, in the order of their bytes.

    Raises ValueError, which calls the folder ``key``, unless the file is whole: all bytes that the
    header tells of, and no others. OSError if it cannot be read.
    """

    def check(ok: bool, rule: str, remedy: str = AGAIN) -> None:
        require(ok, key, str(file.parent), f"{file.name} {rule}", remedy)

    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        check(size > 0, "is empty")
        start = stream.read(len(LFS))
        check(start != LFS, "is a Git-LFS pointer instead of weights", FETCH)
        length = int.from_bytes(start[:8], "little")
        check(size >= 8 and length <= HEADER_LIMIT, "is no safetensors file")
        check(8 + length <= size, f"is cut short: {size} bytes, and its header alone is {length}")
        stream.seek(8)
        text = stream.read(length)
    try:
        found = _tensors(text, file, 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f" ({error})" if isinstance(error, ValueError) else ""
        rule = f"{file.name} is no safetensors file{why}"
        raise ValueError(f"{key} = {str(file.parent)!r}: {rule}; {AGAIN}") from error
    end = max((tensor.start + tensor.size for tensor in found.values()), default=8 + length)
    check(end == size, f"is not whole: {size} bytes instead of {end}")
    return found


def _tensors(text: bytes, file: Path, data: int) -> dict[str, Stored]:
    """The tensors of a header; ``data``: where their bytes start. They must follow each other."""
    header: dict[str, Any] = parse(text)
    header.pop("__metadata__", None)
    found = {name: _tensor(name, entry, file, data) for name, entry in header.items()}
    ordered = dict(sorted(found.items(), key=lambda item: item[1].start))
    at = data
    for name, tensor in ordered.items():
        if tensor.start != at:
            raise ValueError(f"the bytes of {shown(name)} do not follow those before them")
        at += tensor.size
    return ordered


def _tensor(name: str, entry: dict[str, Any], file: Path, data: int) -> Stored:
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, start, end]
    sane = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in numbers)
    size = end - start if sane else -1
    if size < 0 or (size != FLOATS.get(dtype, 0) * prod(shape) and dtype in FLOATS):
        raise ValueError(f"the description of {shown(name)} makes no sense")
    return Stored(file, dtype, tuple(shape), data + start, size)
