"""How exactly, and where, Megatron's optimizer keeps main parameters and moments."""

from typing import Any

import torch

from peergrad.config import OptimConfig, StateDtype, require
from peergrad.parallel import engine

DTYPES = {
    StateDtype.float32: torch.float32,
    StateDtype.bfloat16: torch.bfloat16,
    StateDtype.float16: torch.float16,
    StateDtype.fp8: torch.uint8,
}
"""Names to what Transformer Engine's FusedAdam takes for them."""


def state_fields(optim: OptimConfig) -> dict[str, Any]:
    """The fields of Megatron's OptimizerConfig that ``optim`` sets beyond Adam's own.

    Raises ValueError where what they need is not there.
    """
    require_states(optim)
    return {
        "use_precision_aware_optimizer": optim.use_precision_aware_optimizer,
        "main_params_dtype": DTYPES[optim.main_params_dtype],
        "exp_avg_dtype": DTYPES[optim.exp_avg_dtype],
        "exp_avg_sq_dtype": DTYPES[optim.exp_avg_sq_dtype],
        "optimizer_cpu_offload": optim.optimizer_cpu_offload,
        "optimizer_offload_fraction": optim.optimizer_offload_fraction,
        "overlap_cpu_optimizer_d2h_h2d": optim.overlap_cpu_optimizer_d2h_h2d,
    }


def require_states(optim: OptimConfig) -> None:
    """ValueError unless this machine can keep the optimizer's state as ``optim`` asks."""
    offload = optim.optimizer_cpu_offload
    if not optim.use_precision_aware_optimizer:  # which offloading needs, see OptimConfig
        return
    key = "optim.optimizer_cpu_offload" if offload else "optim.use_precision_aware_optimizer"
    rule = "is for the memory of a GPU, and PyTorch sees none"
    require(engine.has_gpu(), key, True, rule, "unset it and what belongs to it")
    if (absence := engine.absence()) is not None:
        what, remedy = absence
        rule = f"needs FusedAdam of the package transformer-engine, which {what}"
        require(False, key, True, rule, f"{remedy}, or unset it")
