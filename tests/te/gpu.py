"""What Transformer Engine's Python asks of a GPU, answered for it alone: tensors on one, a device
of Hopper's kind, streams that are nothing. Everybody else is told what is so."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

HOPPER = SimpleNamespace(
    name="emulated", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30
)


class Stream:
    """Of a GPU, or an event in one: all has happened."""

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., "Stream"]:
        return lambda *args, **options: self


def pretend() -> None:
    """For the rest of the process."""
    usual, on_gpu = torch.cuda.is_available, torch._C.TensorBase.is_cuda
    torch.cuda.is_available = lambda: _asked_by_engine() or usual()
    torch.Tensor.is_cuda = property(lambda self: _asked_by_engine() or on_gpu.__get__(self))
    torch.version.cuda = "13.0"
    cuda: dict[str, Any] = {
        "Stream": Stream,
        "Event": Stream,
        "current_stream": lambda *_: Stream(),
        "default_stream": lambda *_: Stream(),
        "stream": lambda _: nullcontext(),
        "device": lambda _: nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: HOPPER,
        "get_device_capability": lambda *_: (HOPPER.major, HOPPER.minor),
        "get_device_name": lambda *_: HOPPER.name,
    }
    for name, value in cuda.items():
        setattr(torch.cuda, name, value)
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: 0
    _gather_one_by_one()


def _asked_by_engine() -> bool:
    """Whether what is replaced here was called from Transformer Engine's own code."""
    frame = sys._getframe(2)
    return str(frame.f_globals.get("__name__")).startswith("transformer_engine.")


def _gather_one_by_one() -> None:
    """gloo gathers tensors of several types, all at once, wrongly and without an error."""

    class Done:
        def wait(self) -> None: ...

    @contextmanager
    def apart(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[Done]:
        group = group or dist.group.WORLD
        kept = distributed_c10d._world.pg_coalesce_state
        kept[group] = []
        try:
            yield Done()
        finally:
            operations = kept.pop(group)
        for one in operations:
            if one.redop is None:
                one.op(one.dst_tensor, one.tensor, group=group)
            elif one.dst_tensor is None:
                one.op(one.tensor, op=one.redop, group=group)
            else:
                one.op(one.dst_tensor, one.tensor, op=one.redop, group=group)

    distributed_c10d._coalescing_manager = dist._coalescing_manager = apart
