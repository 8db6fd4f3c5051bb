"""The only place that adapts torch, and only on a machine without CUDA.

Megatron-core names CUDA literally: ``device="cuda"``, ``.cuda()``, ``torch.cuda.current_device()``,
type strings such as ``"torch.cuda.FloatTensor"``. On a machine without CUDA these spellings are
mapped to the host, by a few functions and one public ``TorchFunctionMode``. Of Megatron nothing is
replaced but what sets the state of a GPU's generator and what brings counts from a GPU to the host,
so CPU runs execute the very DDP, optimizer, schedules and checkpoints that GPU runs do.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, autograd
from torch.overrides import TorchFunctionMode

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class CudaLiteralsOnCpu(TorchFunctionMode):
    """Reads literal CUDA devices, ``.cuda()``, pinned memory and type strings as the host's."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not (kwargs or {}).get("dtype"):
            # Megatron's optimizer and gradient clipping compare these strings.
            return "torch.cuda." + func(*args).removeprefix("torch.").removeprefix("cuda.")
        if not kwargs:  # nearly every call comes through here
            return func(*args)
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


def keep_freed_memory() -> None:
    """Let glibc keep what activations leave behind for those of the next layer.

    It would give memory back to the kernel as soon as 128 kB at the end are free, or a block of its
    own is, and get it again page by page: a tenth of an optimizer step of a small model.
    """
    with suppress(OSError, AttributeError):  # another C library has its own ways
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


@contextmanager
def without_compiler() -> Iterator[None]:
    """For the import of Megatron, which hands small functions to ``torch.compile`` then and so
    loads a compiler: two seconds of a core for every rank. Without CUDA they stay as they are."""
    compiler = torch.compile
    if not torch.cuda.is_available():
        torch.compile = lambda function=None, **_: function or (lambda same: same)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


@contextmanager
def without_wandb() -> Iterator[None]:
    """For the import of Megatron, whose inference engine, of no use here, loads it if it can: more
    than a second of a core for every rank. What asks for it later gets it."""
    if "wandb" in sys.modules:
        yield
        return
    sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["wandb"]


@cache  # a second mode on top of the first would translate twice
def set_up_device() -> torch.device:
    """Choose this process's device, once, before any model exists.

    With CUDA: the GPU of ``LOCAL_RANK``. Without: the host, adapted for the rest of the process's
    life. The mode is thread-local: Megatron must be driven from the thread that called this.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    keep_freed_memory()
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    _forget_generators()
    _forget_streams()
    _gather_uneven_parts()
    _translate_in_backward()
    CudaLiteralsOnCpu().__enter__()  # type: ignore[no-untyped-call]
    return torch.device("cpu")


def _translate_in_backward() -> None:
    """A mode is off inside whatever it handles, and that is all of a backward pass."""
    run_backward = autograd.graph._engine_run_backward

    def run(*args: Any, **options: Any) -> Any:
        with CudaLiteralsOnCpu():
            return run_backward(*args, **options)

    # Two modules call it by a name of their own.
    autograd.graph._engine_run_backward = autograd._engine_run_backward = run  # type: ignore[attr-defined]


def _forget_generators() -> None:
    """Activations that are computed again are so from the same random numbers, of a GPU's generator
    too; there is none, and no dropout. torch would refuse to read its state, and keep what is to
    set it until CUDA starts."""
    from megatron.core.tensor_parallel import random

    torch.cuda.random.get_rng_state = lambda *args, **kwargs: torch.empty(0)
    random._set_cuda_rng_state = lambda *args, **kwargs: None


class _Stream:
    """Of a GPU, without one: what is asked for is done."""

    def wait_stream(self, other: object) -> None: ...

    def record_event(self, event: object = None) -> "_Stream":
        return self

    def synchronize(self) -> None: ...


def _forget_streams() -> None:
    """Experts' dispatchers copy counts to the host on a stream of their own. Those that are there
    already they would leave as tensors, which no collective takes for sizes."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def as_asked(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = as_asked
    token_dispatcher.maybe_move_tensor_to_cpu = as_asked
    stream = _Stream()
    torch.cuda.Stream = torch.cuda.current_stream = lambda *_: stream  # type: ignore[misc,assignment]
    torch.cuda.stream = lambda _: nullcontext()  # type: ignore[assignment,return-value]


def _gather_uneven_parts() -> None:
    """Tensor ranks of one expert bring together as many tokens as each has. NCCL takes lists of any
    sizes; gloo takes equal ones, and a sum for what it cannot scatter."""
    gather, scatter = dist.all_gather, dist.reduce_scatter

    def all_gather(found: list[Tensor], own: Tensor, group: Any = None, **options: Any) -> Any:
        sizes = [part.shape[0] if part.dim() else 1 for part in found]
        if len(set(sizes)) == 1:
            return gather(found, own, group=group, **options)
        longest = max(sizes)
        padded = own.new_zeros(longest, *own.shape[1:])
        padded[: own.shape[0]] = own
        every = [torch.empty_like(padded) for _ in found]
        gather(every, padded, group=group)
        for part, whole, size in zip(found, every, sizes, strict=True):
            part.copy_(whole[:size])

    def reduce_scatter(own: Tensor, parts: list[Tensor], *args: Any, **options: Any) -> Any:
        if len({part.shape for part in parts}) == 1:
            return scatter(own, parts, *args, **options)
        whole = torch.cat(parts)
        dist.all_reduce(whole, group=options.get("group"))
        sizes, rank = [part.shape[0] for part in parts], dist.get_rank(options.get("group"))
        own.copy_(torch.split(whole, sizes)[rank])

    dist.all_gather, dist.reduce_scatter = all_gather, reduce_scatter  # type: ignore[assignment]
