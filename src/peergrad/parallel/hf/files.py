"""Reading and writing HF checkpoint folders, one tensor at a time."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peergrad.config import require
from peergrad.storage import StorageError, partial_of, put_in_place, writing

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
FLOATS = ("F64", "F32", "F16", "BF16")
LFS = b"version https://git-lfs"
COMPLETE = "point it at a complete HF checkpoint"
AGAIN = "download that file again"


class TensorReader:
    """Named tensors of an HF folder, read on demand. ``key`` names the folder in errors."""

    def __init__(self, folder: Path, stack: ExitStack, *, key: str) -> None:
        self._folder, self._key = folder, key
        self._files: dict[str, str] = {}  # tensor -> file
        self._handles: dict[str, Any] = {}  # tensor -> open file
        for file in self._find():
            handle = stack.enter_context(self._open(file))
            names = handle.keys()
            self._handles.update(dict.fromkeys(names, handle))
            self._files.update(dict.fromkeys(names, file.name))

    def get(self, name: str, size: tuple[int, ...] | None = None) -> Tensor:
        """Tensor ``name`` on the host, in the file's precision.

        ValueError if it is not there, not a float, or not of shape ``size`` (None: any).
        """
        self._require(name in self._handles, f"tensor {name!r} is missing", COMPLETE)
        part = self._handles[name].get_slice(name)
        where = f"tensor {name!r} in {self._files[name]}"
        self._require(
            part.get_dtype() in FLOATS,
            f"{where} is stored as {part.get_dtype()}",
            "use the checkpoint that is not quantised",
        )
        found = tuple(part.get_shape())
        self._require(
            size is None or found == size,
            f"{where} has shape {list(found)} where config.json asks for {list(size or ())}",
            "use the config.json and weights of one and the same model",
        )
        try:
            tensor: Tensor = self._handles[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._error(f"{where} cannot be read ({error})", AGAIN) from error
        return tensor

    def names(self) -> set[str]:
        return set(self._handles)

    def dtypes(self) -> set[str]:
        """The precisions of all tensors in safetensors' names: ``{"BF16", "F32"}``."""
        return {handle.get_slice(name).get_dtype() for name, handle in self._handles.items()}

    def _error(self, rule: str, remedy: str) -> ValueError:
        return ValueError(f"{self._key} = {str(self._folder)!r}: {rule}; {remedy}")

    def _require(self, ok: bool, rule: str, remedy: str) -> None:
        require(ok, self._key, str(self._folder), rule, remedy)

    def _find(self) -> list[Path]:
        """The safetensors files; all that the index names must be among them."""
        try:
            present = sorted(self._folder.iterdir())
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror})", "correct the path") from error
        files = [file for file in present if file.suffix == ".safetensors"]
        named = self._indexed() - {file.name for file in files}
        self._require(not named, f"{min(named, default='')} is missing, which {INDEX} names", AGAIN)
        pickles = [file.name for file in present if file.suffix in WEIGHT_SUFFIXES]
        remedy = (
            f"convert {pickles[0]} to safetensors (save_pretrained of transformers does)"
            if pickles
            else COMPLETE
        )
        self._require(bool(files), "holds no *.safetensors file", remedy)
        return files

    def _indexed(self) -> set[str]:
        """The names of the files in the index; none if there is no index."""
        index = self._folder / INDEX
        if not index.is_file():
            return set()
        try:
            return set(map(str, json.loads(index.read_bytes())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            rule = "is a Git LFS pointer" if is_pointer(index) else f"is no index ({error})"
            raise self._error(f"{INDEX} {rule}", AGAIN) from error

    def _open(self, file: Path) -> Any:
        try:
            self._require(
                not is_pointer(file),
                f"{file.name} is a Git LFS pointer, not the weights",
                'run "git lfs pull" in that folder',
            )
            self._require(os.path.getsize(file) > 0, f"{file.name} is empty", AGAIN)
            return safe_open(file, framework="pt")
        except SafetensorError as error:
            rule = f"{file.name} is cut short or no safetensors file ({error})"
            raise self._error(rule, AGAIN) from error
        except OSError as error:
            rule = f"{file.name} cannot be read ({error.strerror or error})"
            raise self._error(rule, "correct the file or its permissions") from error


def is_pointer(file: Path) -> bool:
    """Whether ``file`` is what Git leaves in the place of a large file that was not fetched."""
    with file.open("rb") as opened:
        return opened.read(len(LFS)) == LFS


@contextmanager
def open_tensors(folder: str | Path, *, key: str = "model.path") -> Iterator[TensorReader]:
    """The tensors of HF folder ``folder``, which errors call ``key``. ValueError if it is not
    complete."""
    with ExitStack() as stack:
        yield TensorReader(Path(folder), stack, key=key)


def copy_companions(source: Path, target: Path, *, key: str = "model.path") -> None:
    """Copy what makes weights a usable model: configuration, tokenizer, templates.

    StorageError, which names the folder ``key``, if ``source`` cannot be read (any more).
    """
    target.mkdir(parents=True, exist_ok=True)
    for file in _companions(source, key):
        try:
            content = file.read_bytes()
        except OSError as error:
            raise _unreadable(source, key, f"{file.name}: {error.strerror}") from error
        (target / file.name).write_bytes(content)


def _companions(source: Path, key: str) -> list[Path]:
    try:
        files = [file for file in sorted(source.iterdir()) if file.is_file()]
    except OSError as error:
        raise _unreadable(source, key, str(error.strerror)) from error
    return [file for file in files if file.suffix not in WEIGHT_SUFFIXES and file.name != INDEX]


def _unreadable(source: Path, key: str, what: str) -> StorageError:
    return StorageError(
        f"{key} = {str(source)!r}: configuration and tokenizer cannot be copied from there "
        f"({what}); keep that folder until the run has ended"
    )


def write_hf(
    tensors: Iterable[tuple[str, Tensor]],
    target: Path,
    *,
    companions: Path,
    shard_bytes: int = SHARD_BYTES,
    replace: bool = True,
    key: str = "model.path",
) -> None:
    """Write an HF checkpoint from a stream of tensors, holding one shard in memory.

    The folder appears under its name when it is complete; an older one is replaced then, or without
    ``replace`` refused. If ``target`` is a link to a folder, the folder that it points to is
    written. Raises StorageError if the disk refuses; ``key`` names ``companions`` in errors.
    """
    target = target.resolve()
    with writing("HF checkpoint", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_of(target)
    try:
        with writing("HF checkpoint", target):
            copy_companions(companions, partial, key=key)
            shards: list[list[str]] = []
            total = 0
            for shard in _shards(tensors, shard_bytes):
                save_file(shard, partial / f"{len(shards)}.shard", metadata={"format": "pt"})
                shards.append(list(shard))
                total += sum(t.nbytes for t in shard.values())
            _name_shards(partial, shards, total)
            put_in_place(partial, target, replace=replace)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _shards(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        # A copy: the stream may hand out live parameters.
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
    if shard:
        yield shard


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """Give the shards HF's names, which need their number, and write the index if there are
    many."""
    if len(shards) == 1:
        (folder / "0.shard").replace(folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.shard").replace(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
