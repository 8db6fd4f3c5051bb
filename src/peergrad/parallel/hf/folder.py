"""Whether the weights of an HF folder can be whole, from names, sizes and headers alone.

Reads some kilobytes of each file and imports no torch, so that a model that was cut short, left on
a server or made for another configuration is refused before anything is started.
"""

import json
from pathlib import Path
from typing import Any

from peergrad.config import require
from peergrad.parallel.hf.config import Shape
from peergrad.parallel.hf.tensors import tensor_shapes

INDEX = "model.safetensors.index.json"
LFS = b"version https://git-lfs"
HEADER_LIMIT = 100 << 20
"""Bytes; safetensors itself refuses a longer header."""
PRECISIONS = ("F32", "F16", "BF16", "F64")
FETCH = "fetch the real file (git lfs pull)"
AGAIN = "download it again"


def check_weights(path: str, key: str, shape: Shape) -> None:
    """Raise ValueError unless folder ``path``, which ``key`` names, holds every tensor of ``shape``
    in whole safetensors files."""
    folder = Path(path)
    try:
        files = _weight_files(folder, key)
        found: dict[str, Any] = {}
        for file in files:
            found |= _read_header(file, folder, key)
    except OSError as error:
        rule = f"cannot be read ({error.strerror}: {Path(str(error.filename)).name})"
        raise ValueError(f"{key} = {path!r}: {rule}; correct its permissions") from error
    _compare(found, shape, path, key)


def _weight_files(folder: Path, key: str) -> list[Path]:
    path = str(folder)
    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        for name in _indexed(folder, key):
            require(
                (folder / name).is_file(),
                key,
                path,
                f"{INDEX} names {name}, which is not there",
                "download the missing shards",
            )
    if not files and [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]:
        remedy = "convert it: load it with transformers and call save_pretrained"
        require(False, key, path, "holds its weights as pickles, not as *.safetensors", remedy)
    remedy = "point it at a complete HF checkpoint"
    require(bool(files), key, path, "holds no *.safetensors file", remedy)
    return files


def _indexed(folder: Path, key: str) -> list[str]:
    """The shards that the index names."""
    text = (folder / INDEX).read_bytes()
    require(not text.startswith(LFS), key, str(folder), f"{INDEX} is a Git-LFS pointer", FETCH)
    try:
        names = set(json.loads(text)["weight_map"].values())
        return sorted(str(name) for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        rule = f"{INDEX} is no index of safetensors files"
        raise ValueError(f"{key} = {str(folder)!r}: {rule}; {AGAIN}") from error


def _read_header(file: Path, folder: Path, key: str) -> dict[str, Any]:
    """Name -> {dtype, shape, data_offsets} of the tensors of one file, which must be whole."""

    def check(ok: bool, rule: str, remedy: str = AGAIN) -> None:
        require(ok, key, str(folder), f"{file.name} {rule}", remedy)

    size = file.stat().st_size
    check(size > 0, "is empty")
    with file.open("rb") as stream:
        start = stream.read(len(LFS))
        check(start != LFS, "is a Git-LFS pointer instead of weights", FETCH)
        length = int.from_bytes(start[:8], "little")
        sane = size >= 8 and length <= HEADER_LIMIT
        check(sane, "is no safetensors file")
        check(8 + length <= size, f"is cut short: {size} bytes, and its header alone is {length}")
        stream.seek(8)
        header = stream.read(length)
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        whole = 8 + length + int(end)
        _ = [(tensor["dtype"], list(tensor["shape"])) for tensor in tensors.values()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        rule = f"{file.name} is no safetensors file"
        raise ValueError(f"{key} = {str(folder)!r}: {rule}; {AGAIN}") from error
    check(whole == size, f"is not whole: {size} bytes instead of {whole}")
    found: dict[str, Any] = tensors
    return found


def _compare(found: dict[str, Any], shape: Shape, path: str, key: str) -> None:
    """The tensors that there are against those that config.json means."""
    for name, size in tensor_shapes(shape).items():
        missing = f"tensor {name} is in none of its files"
        require(name in found, key, path, missing, "point it at a complete HF checkpoint")
        theirs, precision = tuple(found[name]["shape"]), found[name]["dtype"]
        rule = f"tensor {name} is {theirs}, but config.json means {size}"
        require(theirs == size, key, path, rule, "take both from one model")
        rule = f"tensor {name} is stored as {precision}, which is quantised"
        require(precision in PRECISIONS, key, path, rule, "use the unquantised model")
    biases = sorted(name for name in found if name.endswith("proj.bias"))
    rule = f"has a tensor {biases[0]}, but biases are not supported" if biases else ""
    require(not biases, key, path, rule, "choose another model")
