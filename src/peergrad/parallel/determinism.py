"""``parallel.deterministic_mode``: equal rollouts give equal weights, bit for bit."""

import os

import torch

from peergrad.config import require

KEY = "parallel.deterministic_mode"
NCCL_ALGORITHMS = ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS")
"""What ``NCCL_ALGO`` may say: these add up in one order (Megatron's list)."""
CUBLAS_WORKSPACES = (":4096:8", ":16:8")
"""What ``CUBLAS_WORKSPACE_CONFIG`` may say: workspaces that cuBLAS does not choose as it runs."""


def require_determinism() -> None:
    """ValueError unless the environment lets a GPU here add up in one order only."""
    if not torch.cuda.is_available():
        return
    algorithm = os.environ.get("NCCL_ALGO")
    rule = f"needs NCCL_ALGO, which is {algorithm}, to be one of {', '.join(NCCL_ALGORITHMS)}"
    remedy = "set NCCL_ALGO=Ring for every process, or unset this"
    require(algorithm in NCCL_ALGORITHMS, KEY, True, rule, remedy)
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])
    choices = " or ".join(CUBLAS_WORKSPACES)
    rule, remedy = (
        f"needs CUBLAS_WORKSPACE_CONFIG, which is {workspace}, to be {choices}",
        "unset it",
    )
    require(workspace in CUBLAS_WORKSPACES, KEY, True, rule, remedy)


def be_deterministic() -> None:
    """Have this process take the deterministic form of every operation, or fail where there is
    none. Before its first matrix product, and before layers of Transformer Engine are made. Raises
    as ``require_determinism``."""
    require_determinism()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # which Transformer Engine asks for
    torch.use_deterministic_algorithms(True)
