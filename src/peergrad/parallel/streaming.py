"""Checkpoints from other checkpoints, without a model in memory: one tensor at a time."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from peergrad.config import Dtype, ParallelConfig
from peergrad.parallel.hf.companions import Companions
from peergrad.parallel.hf.config import Shape
from peergrad.parallel.hf.files import SHARD_BYTES
from peergrad.parallel.hf.folder import INDEX, WEIGHTS, Folder
from peergrad.parallel.hf.header import FLOATS, Stored
from peergrad.parallel.hf.tensors import tensor_shapes
from peergrad.parallel.mesh import Mesh
from peergrad.parallel.model import Stage, build_model
from peergrad.parallel.rows import (
    DTYPES,
    CheckpointTensors,
    OfFile,
    Rows,
    as_bytes,
    of_shards,
    spans,
)
from peergrad.parallel.saving import placeholders
from peergrad.parallel.snapshot import filling, on_every_rank, save_weights
from peergrad.storage import partial_of, put_in_place, writing

Tick = Callable[[int], object]
"""Told how many bytes have been written, or compared, since the last time."""


def outline(shape: Shape, parallel: ParallelConfig, dtype: Dtype, mesh: Mesh) -> Stage:
    """This rank's part of the model without weights, on the meta device: what is where."""
    meta = torch.device("meta")
    with meta:
        return build_model(shape, parallel, dtype, replace(mesh, device=meta))


def of_folder(folder: Folder, shape: Shape) -> dict[str, Rows]:
    """The model's tensors that are there, by name, those alone that are floating-point numbers."""
    found = {name: folder.tensors.get(name) for name in tensor_shapes(shape)}
    return {n: OfFile(s) for n, s in found.items() if s is not None and s.dtype in DTYPES}


def write_megatron_from(
    tensors: Mapping[str, Rows],
    path: Path,
    model: Stage,
    shape: Shape,
    mesh: Mesh,
    *,
    companions: Companions,
    tick: Tick,
) -> None:
    """Write HF ``tensors`` as the weights of a checkpoint, which may be laid out as ``model``, an
    ``outline``, says. Collective. Raises as ``save_weights``."""
    rows = {p.untyped_storage()._cdata: r for p, r in of_shards(model, tensors, shape, mesh)}

    def read(placeholder: Tensor) -> Tensor:
        of, size = rows[placeholder.untyped_storage()._cdata], tuple(placeholder.shape)
        axes = len(size) - len(of.shape)  # of layers, of which it is one
        first = placeholder.storage_offset() // prod(of.shape[1:])
        count = size[axes]
        found = torch.empty(size, dtype=of.dtype)
        for low, high in spans(of, count):
            block = of.read(first + low, first + high)
            found.view(count, *of.shape[1:])[low:high] = block
            tick(block.nbytes)
        return found

    with placeholders(read):
        save_weights(path, model, shape, mesh, companions=companions)


def write_hf_from(
    checkpoint: CheckpointTensors,
    path: Path,
    shape: Shape,
    mesh: Mesh,
    *,
    dtype: Dtype,
    companions: Companions,
    tick: Tick,
) -> None:
    """Write the weights of a Megatron checkpoint as the new HF folder ``path``, each rank its
    share. Collective. Raises StorageError if the disk refuses."""
    with writing("HF checkpoint", path):
        partial = mesh.share(lambda: _new_folder(path))
    with filling("HF checkpoint", path, partial, mesh):
        places = mesh.share(lambda: _reserve(partial, shape, dtype))

        def fill() -> None:
            for tensors in checkpoint.parameters(mesh.rank, mesh.world):
                for name, rows in tensors.items():
                    assert rows is not None, name
                    _put(rows, places[name], DTYPES[places[name].dtype], tick)

        on_every_rank(mesh, fill)
        mesh.share(lambda: companions.write(partial, dtype=dtype.name))
        mesh.share(lambda: put_in_place(partial, path, replace=False))


def _new_folder(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    partial.mkdir()
    return partial


def _put(rows: Rows, place: Stored, dtype: torch.dtype, tick: Tick) -> None:
    with place.file.open("r+b", buffering=0) as stream:
        stream.seek(place.start)
        for low, high in spans(rows, rows.shape[0]):
            data = as_bytes(rows.read(low, high).to(dtype))
            tick(len(data))
            while data:
                data = data[stream.write(data) :]
        os.fsync(stream.fileno())


def _reserve(folder: Path, shape: Shape, dtype: Dtype) -> dict[str, Stored]:
    """Make the files of all tensors, headers and index included; where each tensor is to lie."""
    kind = {"float32": "F32", "bfloat16": "BF16"}[dtype.name]
    sizes = {n: (s, prod(s) * FLOATS[kind]) for n, s in tensor_shapes(shape).items()}
    shards: list[dict[str, tuple[int, int]]] = [{}]  # name -> where it begins and ends
    end = 0
    for name, (_, size) in sizes.items():
        if end and end + size > SHARD_BYTES:
            shards.append({})
            end = 0
        shards[-1][name] = (end, end := end + size)
    many, found = len(shards) > 1, {}
    for i, shard in enumerate(shards):
        file = folder / (f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if many else WEIGHTS)
        header = {
            name: {"dtype": kind, "shape": sizes[name][0], "data_offsets": place}
            for name, place in shard.items()
        }
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(file, start + next(reversed(shard.values()))[1])
        for name, (begin, finish) in shard.items():
            found[name] = Stored(file, kind, sizes[name][0], start + begin, finish - begin)
    if many:
        total = {"total_size": sum(size for _, size in sizes.values())}
        index = {"metadata": total, "weight_map": {n: s.file.name for n, s in found.items()}}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    return found
