"""Enumerations and bare classes of the compiled module, under its own names."""

import enum

import torch


class DType(enum.IntEnum):
    kByte, kInt16, kInt32, kInt64, kFloat32, kFloat16, kBFloat16 = range(7)
    kFloat8E4M3, kFloat8E5M2, kFloat8E8M0, kFloat4E2M1 = range(7, 11)


TORCH = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kInt64: torch.int64,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}

Float8BlockScaleTensorFormat = enum.Enum("Float8BlockScaleTensorFormat", "GEMM_READY COMPACT")

_OTHERS = {
    "FP8FwdTensors": "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT "
    "GEMM3_INPUT GEMM3_WEIGHT GEMM3_OUTPUT",
    "FP8BwdTensors": "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3",
    "CommOverlapType": "RS AG",
    "NVTE_QKV_Format": "NVTE_SBHD NVTE_BSHD NVTE_THD NVTE_BSHD_2SBHD NVTE_SBHD_2BSHD "
    "NVTE_THD_2BSHD NVTE_THD_2SBHD",
    "NVTE_QKV_Layout": "NVTE_SB3HD NVTE_SBH3D NVTE_SBHD_SB2HD NVTE_SBHD_SBH2D NVTE_SBHD_SBHD_SBHD "
    "NVTE_BS3HD NVTE_BSH3D NVTE_BSHD_BS2HD NVTE_BSHD_BSH2D NVTE_BSHD_BSHD_BSHD NVTE_T3HD "
    "NVTE_TH3D NVTE_THD_T2HD NVTE_THD_TH2D NVTE_THD_THD_THD NVTE_SBHD_BSHD_BSHD "
    "NVTE_BSHD_SBHD_SBHD NVTE_THD_BSHD_BSHD NVTE_THD_SBHD_SBHD NVTE_Paged_KV_BSHD_BSHD_BSHD "
    "NVTE_Paged_KV_BSHD_SBHD_SBHD NVTE_Paged_KV_SBHD_BSHD_BSHD NVTE_Paged_KV_SBHD_SBHD_SBHD "
    "NVTE_Paged_KV_THD_BSHD_BSHD NVTE_Paged_KV_THD_SBHD_SBHD",
    "NVTE_Bias_Type": "NVTE_NO_BIAS NVTE_PRE_SCALE_BIAS NVTE_POST_SCALE_BIAS NVTE_ALIBI",
    "NVTE_Mask_Type": "NVTE_NO_MASK NVTE_PADDING_MASK NVTE_CAUSAL_MASK NVTE_PADDING_CAUSAL_MASK "
    "NVTE_CAUSAL_BOTTOM_RIGHT_MASK NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
    "NVTE_Softmax_Type": "NVTE_VANILLA_SOFTMAX NVTE_OFF_BY_ONE_SOFTMAX NVTE_LEARNABLE_SOFTMAX",
    "NVTE_Fused_Attn_Backend": "NVTE_No_Backend NVTE_F16_max512_seqlen NVTE_F16_arbitrary_seqlen "
    "NVTE_FP8",
}


class FP8TensorMeta:
    """What a delayed recipe keeps of a module's tensors."""

    def __init__(self) -> None:
        self.scale = self.scale_inv = self.amax_history = torch.empty(0)


_CLASSES = ("CommOverlapHelper", "CommOverlap", "CommOverlapP2P")

TYPES = {
    **{name: enum.IntEnum(name, members, start=0) for name, members in _OTHERS.items()},
    **{name: type(name, (), {}) for name in _CLASSES},
    **{kind.__name__: kind for kind in (DType, Float8BlockScaleTensorFormat, FP8TensorMeta)},
}
"""Everything that the module has beside functions."""
