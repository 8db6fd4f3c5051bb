"""The only place that adapts torch, and only on a machine without CUDA.

Megatron-core names CUDA literally: ``device="cuda"``, ``.cuda()``, ``torch.cuda.current_device()``,
type strings such as ``"torch.cuda.FloatTensor"``. On a machine without CUDA these spellings are
mapped to the host, by two functions and one public ``TorchFunctionMode``. Nothing of Megatron is
replaced, so CPU runs execute the very DDP, optimizer, schedules and checkpoints that GPU runs do.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class CudaLiteralsOnCpu(TorchFunctionMode):
    """Reads literal CUDA devices, ``.cuda()``, pinned memory and type strings as the host's."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs.get("dtype"):
            # Megatron's optimizer and gradient clipping compare these strings.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


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
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    CudaLiteralsOnCpu().__enter__()  # type: ignore[no-untyped-call]
    return torch.device("cpu")
