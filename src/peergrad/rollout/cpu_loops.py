"""Loops of SGLang's over the requests of a step, in one operation each.

On GPUs these are Triton kernels; where there is no Triton SGLang goes through the requests one by
one, with a dozen small tensor operations for each: 45 us of a core for every request. Both do what
SGLang's own do, which contract tests hold them against.

Only SGLang imports this module.
"""

from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

POSITIONS = "sglang.srt.model_executor.forward_batch_info.compute_position_torch"
ROWS = "sglang.srt.mem_cache.allocation.write_cache_indices"


def replace_loops() -> None:
    """Through SGLang's own registry; in this process and those that it forks."""
    HookRegistry.register(POSITIONS, positions, HookType.REPLACE)
    HookRegistry.register(ROWS, write_rows, HookType.REPLACE)
    HookRegistry.apply_hooks()


def positions(
    extend_prefix_lens: torch.Tensor, extend_seq_lens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every new token in its request, int64 [tokens], and where in the step each request begins,
    [requests]; both arguments are int [requests]."""
    begins = extend_seq_lens.cumsum(0).to(extend_seq_lens.dtype) - extend_seq_lens
    shift = (extend_prefix_lens - begins).repeat_interleave(extend_seq_lens)
    return torch.arange(len(shift)) + shift, begins


def write_rows(
    out_cache_loc: torch.Tensor,
    req_pool_indices_tensor: torch.Tensor,
    req_pool_indices_cpu: torch.Tensor,
    prefix_lens_tensor: torch.Tensor,
    prefix_lens_cpu: torch.Tensor,
    seq_lens_tensor: torch.Tensor,
    seq_lens_cpu: torch.Tensor,
    extend_lens_tensor: torch.Tensor,
    extend_lens_cpu: torch.Tensor,
    prefix_tensors: list[torch.Tensor],
    req_to_token_pool: Any,
) -> None:
    """Into the table of requests: where in the cache their prefixes are, and their new tokens."""
    places, _ = positions(prefix_lens_cpu, extend_lens_cpu)
    rows = req_pool_indices_cpu.repeat_interleave(extend_lens_cpu)
    table = req_to_token_pool.req_to_token
    req_to_token_pool.write((rows, places), out_cache_loc.to(table.dtype))
    for request in prefix_lens_cpu.nonzero()[:, 0].tolist():
        row, prefix = int(req_pool_indices_cpu[request]), int(prefix_lens_cpu[request])
        req_to_token_pool.write((row, slice(0, prefix)), prefix_tensors[request])
