"""Tensors on a disk, read a few rows at a time: of HF files, of a Megatron checkpoint, and either
made of the other.

``hf/mapping.py`` says how tensors are joined and divided; here it is asked with the numbers of the
rows in place of what is in them, and its answer says which rows to read. So neither direction holds
a tensor in two forms.
"""

from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from peergrad.config.rules import one_line
from peergrad.parallel.hf.config import Shape
from peergrad.parallel.hf.header import AGAIN, Stored
from peergrad.parallel.hf.mapping import hf_names, to_hf, to_megatron
from peergrad.parallel.mesh import Mesh
from peergrad.parallel.model import Stage
from peergrad.parallel.weights import local_parameters, mapped_parameters, sharded_dim

BLOCK_BYTES = 8 << 20
"""Read at a time."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
FIRST = 2
"""The number of the first row; 0 stands for padding, which no number then follows."""


class Rows(Protocol):
    """A tensor of at least one dimension."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``, on the host. ValueError, which names the file, if they cannot
        be read."""
        ...


class OfFile:
    """A tensor of an HF folder."""

    def __init__(self, stored: Stored) -> None:
        self._stored, self.shape, self.dtype = stored, stored.shape, DTYPES[stored.dtype]

    def read(self, start: int, stop: int) -> Tensor:
        size = self._stored.size // self.shape[0]
        data = torch.empty((stop - start) * size, dtype=torch.uint8)
        left = as_bytes(data)
        with self._stored.file.open("rb", buffering=0) as stream:
            stream.seek(self._stored.start + start * size)
            while left:
                got = stream.readinto(left)
                if not got:
                    raise ValueError(f"{self._stored.file} ends too early; {AGAIN}")
                left = left[got:]
        return data.view(self.dtype).view(stop - start, *self.shape[1:])


class OfCheckpoint:
    """A parameter of a Megatron checkpoint, put together from the boxes that its files hold."""

    def __init__(
        self, folder: Path, metadata: Metadata, parts: Sequence[ShardedTensor], size: torch.Size
    ) -> None:
        """``parts``: what Megatron saves of the whole parameter, in one piece or by rows."""
        self._folder, self._metadata, self._parts, self.shape = folder, metadata, parts, tuple(size)
        described: dict[str, Any] = {p.key: metadata.state_dict_metadata[p.key] for p in parts}
        self._described = described  # of tensors, which is not all that is described there
        self.dtype: torch.dtype = self._described[parts[0].key].properties.dtype

    def read(self, start: int, stop: int) -> Tensor:
        rows = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)
        missing = rows.numel()
        for begins, tensor in self._boxes:
            first, last = max(start, begins[0]), min(stop, begins[0] + len(tensor))
            if first < last:
                columns = [slice(at, at + n) for at, n in zip(begins, tensor.shape, strict=True)]
                found = tensor[first - begins[0] : last - begins[0]]
                rows[(slice(first - start, last - start), *columns[1:])] = found
                missing -= found.numel()
        if missing:
            raise ValueError(f"{self._folder} holds not all of {self._parts[0].key}")
        return rows

    def forget(self) -> None:
        """Give back what reading it has left in memory: all of it."""
        self.__dict__.pop("_boxes", None)

    @cached_property
    def _boxes(self) -> list[tuple[list[int], Tensor]]:
        """(where it begins, what is in it) of each."""
        found = []
        for part in self._parts:
            row = part.data.storage_offset() // part.data.stride(0)  # of the parameter
            for chunk in self._described[part.key].chunks:
                axes = len(chunk.sizes) - len(self.shape)  # of layers and the like, before its own
                size = (*[1] * axes, *part.local_shape)
                begins = [c - p for c, p in zip(chunk.offsets, part.global_offset, strict=True)]
                bounds = [
                    (max(at, 0), min(at + n, most))
                    for at, n, most in zip(begins, chunk.sizes, size, strict=True)
                ]
                if all(low < high for low, high in bounds):
                    inside = [
                        slice(a - at, b - at) for (a, b), at in zip(bounds, begins, strict=True)
                    ]
                    tensor = self._load(part.key, chunk)[tuple(inside)]
                    (first, *others) = [low for low, _ in bounds[axes:]]
                    found.append(([first + row, *others], tensor.flatten(0, axes)))
        return found

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        file = self._folder / place.relative_path
        try:
            with file.open("rb") as stream:
                view: Any = _create_file_view(stream, place.offset, place.length)
                tensor: Tensor = torch.load(view, map_location="cpu", weights_only=True)
        except Exception as error:  # of a damaged file, of any kind
            raise ValueError(f"{file} is damaged ({one_line(error, 60)})") from error
        return tensor


class Arranged:
    """Rows of others in an order of its own, as they are or rounded."""

    def __init__(
        self,
        order: Tensor,
        sources: Sequence[Rows],
        *,
        dtype: torch.dtype,
        columns: slice | None = None,
    ) -> None:
        """``order``: numbers as in ``_numbered(sources)``. ``columns``: which ones; default all."""
        self._order, self._sources, self._columns = order.flatten(), sources, columns
        wide = sources[0].shape[1:]
        if columns is not None:
            wide = (columns.stop - columns.start, *wide[1:])
        self.shape, self.dtype = (len(self._order), *wide), dtype
        self._starts = [int(numbers.flatten()[0]) for numbers in _numbered(sources)]

    def read(self, start: int, stop: int) -> Tensor:
        rows = torch.zeros(stop - start, *self.shape[1:], dtype=self.dtype)
        order = self._order[start:stop]
        breaks = (order.diff() != 1).nonzero().flatten() + 1
        for at, end in pairwise([0, *breaks.tolist(), len(order)]):
            number = int(order[at])
            if number < FIRST:
                continue
            index = bisect(self._starts, number) - 1
            source, first = self._sources[index], number - self._starts[index]
            for low, high in spans(source, end - at):
                block = source.read(first + low, first + high)
                rows[at + low : at + high] = (
                    block if self._columns is None else block[:, self._columns]
                )
        return rows


def spans(rows: Rows, count: int) -> Iterator[tuple[int, int]]:
    """0 to ``count`` in steps of about ``BLOCK_BYTES``."""
    step = max(1, BLOCK_BYTES // (prod(rows.shape[1:]) * rows.dtype.itemsize))
    return ((low, min(low + step, count)) for low in range(0, count, step))


def blocks(rows: Rows) -> Iterator[Tensor]:
    """All of it, a few rows at a time."""
    return (rows.read(low, high) for low, high in spans(rows, rows.shape[0]))


def _numbered(sources: Sequence[Rows]) -> list[Tensor]:
    """A number for each row of each, in its place: of as many dimensions, but one wide. Between two
    sources one is left out, so that numbers that follow each other lie in one."""
    found, first = [], FIRST
    for source in sources:
        count, *others = source.shape
        found.append(torch.arange(first, first + count).view(count, *[1] * len(others)))
        first += count + 1
    return found


def of_shards(
    model: Stage, tensors: Mapping[str, Rows], shape: Shape, mesh: Mesh
) -> Iterator[tuple[torch.nn.Parameter, Rows]]:
    """Every parameter of this rank, and the rows of HF ``tensors`` that it is: as
    ``weights.load_hf``, without reading."""
    for parameter, mapped, group in mapped_parameters(model, shape, mesh):
        sources, dim = [tensors[n] for n in mapped.names], sharded_dim(parameter)
        rank, ranks = group.rank(), group.size()
        by_rows = 0 if dim == 0 else None
        order = to_megatron(
            _numbered(sources), mapped.layout, shape, dim=by_rows, rank=rank, ranks=ranks
        )
        width = parameter.shape[-1]
        columns = slice(rank * width, (rank + 1) * width) if dim == 1 else None
        rows = Arranged(order, sources, dtype=parameter.dtype, columns=columns)
        assert rows.shape == parameter.shape, mapped
        yield parameter, rows


class CheckpointTensors:
    """The HF tensors of a Megatron checkpoint."""

    def __init__(self, path: Path, model: Stage, shape: Shape) -> None:
        """``model``: all of it on one rank, with or without weights. ValueError if there is no such
        checkpoint."""
        self._folder, self._model, self._shape = path / "model", model, shape
        try:
            self._metadata = FileSystemReader(self._folder).read_metadata()
        except Exception as error:  # of a damaged file, of any kind
            file = self._folder / ".metadata"
            raise ValueError(f"{file} cannot be read ({one_line(error)})") from error

    def parameters(self, rank: int, ranks: int) -> Iterator[dict[str, Rows | None]]:
        """The tensors by HF name, those of one Megatron parameter at a time, and of all parameters
        the part of one of ``ranks`` ranks; None for what is not there. What reading them leaves in
        memory is given back when the next are asked for."""
        known = self._metadata.state_dict_metadata
        for name, parameter in list(local_parameters(self._model))[rank::ranks]:
            mapped = hf_names(name, self._shape)
            parts = self._saved[parameter.untyped_storage()._cdata]
            if not all(part.key in known for part in parts):
                yield dict.fromkeys(mapped.names)
                continue
            source = OfCheckpoint(self._folder, self._metadata, parts, parameter.shape)
            orders = to_hf(
                _numbered([source]), mapped.layout, self._shape, dim=sharded_dim(parameter)
            )
            found = (Arranged(order, [source], dtype=source.dtype) for order in orders)
            yield dict(zip(mapped.names, found, strict=True))
            source.forget()

    def unknown(self) -> list[str]:
        """Megatron's names of tensors that are no part of the model, nor of an optimizer."""
        ours = {part.key for parts in self._saved.values() for part in parts}
        known = self._metadata.state_dict_metadata.items()
        tensors = [key for key, value in known if isinstance(value, TensorStorageMetadata)]
        return [key for key in tensors if key not in ours and "optimizer" not in key]

    @cached_property
    def _saved(self) -> dict[int, list[ShardedTensor]]:
        """What Megatron saves of each parameter, by the parameter's memory."""
        found: dict[int, list[ShardedTensor]] = {}
        for piece in self._model.pieces:
            state = piece.sharded_state_dict()
            apply_factories(state)
            for part in nested_values(state):
                if isinstance(part, ShardedTensor):
                    found.setdefault(part.data.untyped_storage()._cdata, []).append(part)
        return found


def fingerprint(rows: Rows, dtype: torch.dtype) -> tuple[str, str]:
    """XXH3-128 of the bytes of a tensor as it is, and as ``dtype``."""
    own, other = xxhash.xxh3_128(), xxhash.xxh3_128()
    for block in blocks(rows):
        own.update(as_bytes(block))
        if dtype != rows.dtype:
            other.update(as_bytes(block.to(dtype)))
    return own.hexdigest(), (own if dtype == rows.dtype else other).hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
