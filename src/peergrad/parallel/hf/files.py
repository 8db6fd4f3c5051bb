"""Reading and writing HF checkpoint folders, one tensor at a time."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


class TensorReader:
    """Named tensors of an HF folder, read on demand."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"model.path = {str(folder)!r}: holds no *.safetensors file; "
                "point it at a complete HF checkpoint"
            )
        self._folder = folder
        self._handles = {}
        for file in files:
            handle = stack.enter_context(safe_open(file, framework="pt"))
            self._handles.update(dict.fromkeys(handle.keys(), handle))

    def get(self, name: str) -> Tensor:
        """Tensor ``name`` on the host, in the file's precision. ValueError if it is not there."""
        if name not in self._handles:
            raise ValueError(
                f"model.path = {str(self._folder)!r}: tensor {name!r} is missing; "
                "point it at a complete HF checkpoint"
            )
        tensor: Tensor = self._handles[name].get_tensor(name)
        return tensor

    def names(self) -> set[str]:
        return set(self._handles)


@contextmanager
def open_tensors(folder: str | Path) -> Iterator[TensorReader]:
    with ExitStack() as stack:
        yield TensorReader(Path(folder), stack)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what makes weights a usable model: configuration, tokenizer, templates."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix not in WEIGHT_SUFFIXES and file.name != INDEX:
            shutil.copy2(file, target / file.name)


def write_hf(
    tensors: Iterable[tuple[str, Tensor]],
    target: Path,
    *,
    companions: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write an HF checkpoint from a stream of tensors, holding one shard in memory.

    The folder appears under its name when it is complete; an older one is replaced then.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy_companions(companions, partial)
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, shard_bytes):
        save_file(shard, partial / f"{len(shards)}.shard", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(t.nbytes for t in shard.values())
    _name_shards(partial, shards, total)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.replace(old)
    partial.replace(target)
    shutil.rmtree(old, ignore_errors=True)


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
