"""What Transformer Engine asks the libraries of a GPU: versions, and what they can do."""

from typing import Any

from tests.te.enums import TYPES


def get_cudnn_version() -> int:
    return 91300


def get_cublasLt_version() -> int:
    return 130100


def get_num_cublas_streams() -> int:
    return 4


def device_supports_multicast(device_id: int = -1) -> bool:
    return False


def ubuf_built_with_mpi() -> bool:
    return False


def get_fused_attn_backend(
    is_training: bool,
    q_type: Any,
    kv_type: Any,
    layout: Any,
    bias_type: Any,
    mask_type: Any,
    softmax_type: Any,
    dropout: float,
    heads: int,
    kv_heads: int,
    longest_q: int,
    longest_kv: int,
    head_dim_qk: int,
    head_dim_v: int,
    window_left: int,
    window_right: int,
    return_max_logit: bool,
    cuda_graph: bool,
    /,
) -> Any:
    """None: Transformer Engine's own attention in PyTorch is left."""
    return TYPES["NVTE_Fused_Attn_Backend"].NVTE_No_Backend
