"""Reading tensors of HF folders on demand, and writing such folders one shard at a time."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peergrad.config import require
from peergrad.config.rules import one_line
from peergrad.parallel.hf.companions import Companions
from peergrad.parallel.hf.folder import INDEX, WEIGHTS, Folder
from peergrad.parallel.hf.header import AGAIN
from peergrad.storage import partial_of, put_in_place, writing

SHARD_BYTES = 4 << 30


class TensorReader:
    """The tensors of an HF folder, whose headers have been read, by name."""

    def __init__(self, folder: Folder, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._opened: dict[Path, Any] = {}

    def get(self, name: str) -> Tensor:
        """Tensor ``name`` on the host, in the file's precision; ValueError if it cannot be read."""
        stored = self._folder.tensors[name]
        try:
            tensor: Tensor = self._open(stored.file).get_tensor(name)
        except (SafetensorError, OSError) as error:
            what = f"tensor {name} in {stored.file.name} cannot be read ({one_line(error)})"
            raise ValueError(
                f"{self._folder.key} = {str(self._folder.path)!r}: {what}; {AGAIN}"
            ) from error
        return tensor

    def names(self) -> set[str]:
        return set(self._folder.tensors)

    def _open(self, file: Path) -> Any:
        if file not in self._opened:
            self._opened[file] = self._stack.enter_context(safe_open(file, framework="pt"))
        return self._opened[file]


@contextmanager
def open_tensors(folder: Folder) -> Iterator[TensorReader]:
    """Give access to the tensors of ``folder``; its files are open as long as the body runs."""
    with ExitStack() as stack:
        yield TensorReader(folder, stack)


def write_hf(
    tensors: Iterable[tuple[str, Tensor]],
    target: Path,
    *,
    companions: Companions,
    shard_bytes: int = SHARD_BYTES,
    replace: bool = True,
) -> None:
    """Write an HF checkpoint from a stream of tensors, holding one shard in memory.

    Its config.json names the precision of the tensors, if they all have one. The folder appears
    under its name when it is complete; an older one is replaced then, or without ``replace``
    refused. If ``target`` is a link to a folder, the folder that it points to is written.

    Raises StorageError if the disk refuses, ValueError if the companions are from ``target``: the
    model that they belong to would be lost.
    """
    target = target.resolve()
    require(
        target != companions.source.resolve(),
        "HF checkpoint",
        str(target),
        "is the folder of the model that was read",
        "write to another folder",
    )
    with writing("HF checkpoint", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_of(target)
    try:
        with writing("HF checkpoint", target):
            partial.mkdir()
            shards: list[list[str]] = []
            total, dtypes = 0, set()
            for shard in _shards(tensors, shard_bytes):
                save_file(shard, partial / f"{len(shards)}.shard", metadata={"format": "pt"})
                shards.append(list(shard))
                total += sum(t.nbytes for t in shard.values())
                dtypes |= {str(t.dtype).removeprefix("torch.") for t in shard.values()}
            _name_shards(partial, shards, total)
            companions.write(partial, dtype=dtypes.pop() if len(dtypes) == 1 else None)
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
        (folder / "0.shard").replace(folder / WEIGHTS)
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.shard").replace(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
