"""SGLang platform plugin: run the unmodified server on a machine without a GPU.

SGLang finds ``activate`` through the entry-point group ``sglang.srt.platforms``; beside a GPU it
answers None and SGLang stays as it is. Only SGLang imports this module. It leans on a few
internals, so the SGLang version is pinned; ``tests/engine`` fails when an upgrade breaks it.
"""

from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


def activate() -> str | None:
    """Full name of the platform class, or None where a GPU makes it unnecessary."""
    return None if torch.cuda.is_available() else f"{__name__}.CpuPlatform"


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Plain CPU: every layer takes its PyTorch-native forward."""

    # "Out of tree" is what selects the native forwards; "CPU" would ask for compiled operators that
    # no published wheel holds.
    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()  # neither Triton, nor graphs, nor pynccl

    def get_device(self, device_id: int = 0) -> str:
        return "cpu"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_compile_backend(self, mode: Any = None) -> str:
        return "eager"

    def init_backend(self) -> None:
        # Routed-experts capture keeps host buffers; the stock allocator would page-lock them
        # through CUDA.
        from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS

        ALLOC_MEMORY_FUNCS["cpu"] = _plain_buffer
        # Under SGLang's own name: its lists of what runs without Triton know no other.
        from sglang.srt.layers.attention.attention_registry import register_attention_backend
        from sglang.srt.mem_cache.registry import register_radix_cache_backend

        register_attention_backend("torch_native")(_attention)
        register_radix_cache_backend("peergrad", _prefix_cache)

        from peergrad.rollout.cpu_loops import replace_loops

        replace_loops()

    def post_load_model(self, model: torch.nn.Module) -> None:
        from peergrad.rollout.cpu_backend import share_prompts

        share_prompts(model)


def _attention(runner: Any) -> Any:
    from peergrad.rollout.cpu_backend import CpuAttentionBackend

    return CpuAttentionBackend(runner)


def _prefix_cache(context: Any) -> Any:
    from peergrad.rollout.cpu_cache import build

    return build(context)


def _plain_buffer(dims: Any, dtype: Any, device: Any, *_: Any, **__: Any) -> torch.Tensor:
    return torch.empty(dims, dtype=dtype, device=device)
