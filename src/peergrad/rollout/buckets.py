"""A stream of tensors as a stream of flat byte buffers, SGLang's ``flattened_bucket`` format."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from peergrad.rollout.requests import Json

NamedTensors = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Bucket:
    """Tensors laid end to end, each aligned to its own element size."""

    flat: torch.Tensor  # [bytes] uint8
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]


def buckets(named: NamedTensors, limit: int) -> Iterator[tuple[Bucket, bool]]:
    """Yield (bucket, is it the last?), at most ``limit`` bytes each unless one tensor is larger.

    One buffer serves all buckets: a bucket is void once the next is asked for. A bucket also ends
    early where the next tensor would lie unaligned, which the server refuses.
    """
    flat: torch.Tensor | None = None
    entries: list[tuple[str, torch.dtype, list[int]]] = []
    offset = 0
    for name, tensor in named:
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
        if entries and (offset + len(raw) > limit or offset % tensor.element_size()):
            assert flat is not None
            yield _bucket(flat[:offset], entries), False
            entries, offset = [], 0
        if flat is None or len(raw) > len(flat):
            flat = torch.empty(max(limit, len(raw)), dtype=torch.uint8, device=tensor.device)
        flat[offset : offset + len(raw)] = raw
        offset += len(raw)
        entries.append((name, tensor.dtype, list(tensor.shape)))
    if flat is not None:
        yield _bucket(flat[:offset], entries), True


def _bucket(flat: torch.Tensor, entries: list[tuple[str, torch.dtype, list[int]]]) -> Bucket:
    names, dtypes, shapes = zip(*entries, strict=True)
    spelt = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return Bucket(flat, list(names), spelt, list(shapes))


def update_payload(bucket: Bucket, group_name: str, version: str | None) -> Json:
    """Body of /update_weights_from_distributed; ``version``, as the
    servers are to spell it, goes with the last bucket only."""
    return {
        "names": bucket.names,
        "dtypes": bucket.dtypes,
        "shapes": bucket.shapes,
        "group_name": group_name,
        "load_format": "flattened_bucket",
        "flush_cache": version is not None,
        "weight_version": version,
    }
