"""Weights in and out of a distributed Megatron model, under HF names."""

import logging
import re
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from peergrad.parallel.fp8 import keep_exact, whole_numbers
from peergrad.parallel.hf.config import Shape
from peergrad.parallel.hf.files import open_tensors
from peergrad.parallel.hf.fit import check_weights
from peergrad.parallel.hf.mapping import Mapped, hf_names, to_hf, to_megatron
from peergrad.parallel.mesh import Mesh
from peergrad.parallel.model import Stage

log = logging.getLogger(__name__)


EXPERT = re.compile(
    r"(?P<before>.*\.mlp\.experts\.)(local_experts\.(?P<one>\d+)\.)?"
    r"(?P<linear>linear_fc[12])\.weight(?P<grouped>\d+)?"
)
"""An expert's matrix: of experts one by one, or together with the others of a rank (te)."""


def local_parameters(model: Stage) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters under layer numbers that count over all pipeline stages, and numbers
    of experts that count over all of a layer's."""
    for piece in model.pieces:
        for name, parameter in piece.named_parameters():
            match = re.match(r"decoder\.layers\.(\d+)\.", name)
            if match is not None:
                layer = piece.decoder.layers[int(match[1])]
                name = f"decoder.layers.{layer.layer_number - 1}.{name[match.end() :]}"
                if (expert := EXPERT.fullmatch(name)) is not None:
                    number = layer.mlp.local_expert_indices[int(expert["one"] or expert["grouped"])]
                    name = f"{expert['before']}{number}.{expert['linear']}.weight"
            yield name, parameter


def is_expert(name: str) -> bool:
    return ".mlp.experts." in name


def sharded_dim(parameter: torch.nn.Parameter) -> int | None:
    """The dimension that is divided over the tensor ranks; None if every rank holds it whole."""
    if getattr(parameter, "tensor_model_parallel", False):
        return int(parameter.partition_dim)  # type: ignore[attr-defined]
    return None


@torch.no_grad()
def load_hf(model: Stage, path: str, shape: Shape, mesh: Mesh, *, key: str = "model.path") -> None:
    """Fill this rank's parameters from the HF folder ``path``, reading only what it needs.

    Raises ValueError, which names the folder ``key``, unless it holds exactly the tensors of
    ``shape``; rank 0 alone tells of files that were not read.
    """
    folder = check_weights(path, key, shape, values=mesh.rank == 0)
    if mesh.rank == 0 and folder.unread:
        log.warning("%s", folder.unread_line())
    with open_tensors(folder) as reader:
        for parameter, mapped, ranks in mapped_parameters(model, shape, mesh):
            shard = to_megatron(
                [reader.get(n) for n in mapped.names],
                mapped.layout,
                shape,
                dim=sharded_dim(parameter),
                rank=ranks.rank(),
                ranks=ranks.size(),
            )
            assert shard.shape == parameter.shape, mapped
            parameter.copy_(shard.to(parameter.dtype))
            keep_exact(parameter, shard)


def mapped_parameters(
    model: Stage, shape: Shape, mesh: Mesh
) -> Iterator[tuple[torch.nn.Parameter, Mapped, dist.ProcessGroup]]:
    """Every parameter of this rank, the HF tensors that it is of, and the ranks that share it."""
    for name, parameter in local_parameters(model):
        if shape.tied and name == "output_layer.weight":  # last stage's copy of the embedding
            name = "embedding.word_embeddings.weight"
        ranks = mesh.expert_tensor if is_expert(name) else mesh.tensor
        yield parameter, hf_names(name, shape), ranks


@torch.no_grad()
def export_hf(model: Stage, shape: Shape, mesh: Mesh) -> Iterator[tuple[str, Tensor]]:
    """Stream ``(HF name, full tensor)`` in a fixed order, on every first data and context rank;
    the others, which hold the same weights, get nothing.

    Collective: every rank must drain it. One parameter at a time is gathered over the tensor ranks
    of the stage that owns it, of experts one from each rank that holds others, and broadcast over
    the pipeline, so that is the extra memory. Tensors stay valid until the generator advances.
    """
    if not mesh.exports:
        if mesh.lends_experts:
            for name, parameter in local_parameters(model):
                if is_expert(name):
                    _gather(parameter, sharded_dim(parameter), mesh.experts)
        return
    mine = dict(local_parameters(model))
    described = [(n, p.shape, p.dtype, sharded_dim(p)) for n, p in mine.items()]
    stages: list[list[tuple[str, torch.Size, torch.dtype, int | None]]]
    stages = [described] * mesh.pipeline.size()
    if mesh.pipeline.size() > 1:
        dist.all_gather_object(stages, described, group=mesh.pipeline)
    for stage, parameters in enumerate(stages):
        for name, size, dtype, dim in parameters:
            if shape.tied and name == "output_layer.weight":
                continue
            group = mesh.experts if is_expert(name) else mesh.tensor
            if stage == mesh.pipeline.rank():
                shards = _gather(mine[name], dim, group)
            else:
                parts = 1 if dim is None else group.size()
                shards = [torch.empty(size, dtype=dtype, device=mesh.device) for _ in range(parts)]
            if mesh.pipeline.size() > 1:
                source = dist.get_global_rank(mesh.pipeline, stage)
                for shard in shards:
                    dist.broadcast(shard, src=source, group=mesh.pipeline)
            each = mesh.expert_tensor.size() if is_expert(name) else len(shards)
            for i, same in enumerate(_every(name, shape, mesh)):
                mapped, own = hf_names(same, shape), shards[i * each : (i + 1) * each]
                whole = to_hf(own, mapped.layout, shape, dim=dim)
                yield from zip(mapped.names, whole, strict=True)


def _every(name: str, shape: Shape, mesh: Mesh) -> list[str]:
    """The parameter of that name, and those that the other ranks of its experts have in its place,
    in their order."""
    match = re.fullmatch(r"(.*\.mlp\.experts\.)(\d+)(\..*)", name)
    if match is None or shape.experts is None:
        return [name]
    held = shape.experts.number // mesh.expert_ranks
    first = int(match[2]) % held
    return [f"{match[1]}{first + i * held}{match[3]}" for i in range(mesh.expert_ranks)]


def _gather(tensor: Tensor, dim: int | None, group: dist.ProcessGroup) -> list[Tensor]:
    # gloo broadcasts wrong data from a non-contiguous tensor, without an error
    tensor = whole_numbers(tensor.detach()).contiguous()
    if dim is None or group.size() == 1:
        return [tensor]
    shards = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(shards, tensor, group=group)
    return shards
