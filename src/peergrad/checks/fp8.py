"""Whether the model can be served as ``rollout.servers.fp8`` says, and whether a trainer with FP8
blocks of its own multiplies with the same weights."""

import os

from peergrad.config import Config, Dtype, Fp8, Fp8Scales, Fp8Serving, ServerMode, require
from peergrad.parallel.hf.config import Shape
from peergrad.parallel.hf.fp8 import check_blocks, differences

FLASH_RL = ("qwen2", "qwen3")
"""The families whose loaders SGLang's flash_rl takes."""
FLOAT32_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"  # Transformer Engine's own


def check_serving_form(config: Config, shape: Shape) -> None:
    """Raise ValueError if SGLang cannot hold this model so."""
    servers, key = config.rollout.servers, "rollout.servers.fp8"
    if servers.fp8 is Fp8Serving.off:
        return
    name, dtype = servers.fp8.name, config.model.dtype
    rule = f"is for a model in bfloat16, and model.dtype = {dtype.name}"
    require(dtype is Dtype.bfloat16, key, name, rule, "set model.dtype=bfloat16, or fp8=off")
    if servers.fp8 is Fp8Serving.block:
        managed = servers.mode is ServerMode.managed
        check_blocks(key, name, shape, servers.tensor if managed else 1)
        return
    rule = f"SGLang knows {' and '.join(FLASH_RL)} alone, and model.path is of {shape.family}"
    require(shape.family in FLASH_RL, key, name, rule, "serve it in bfloat16")


def both_in_blocks(config: Config) -> bool:
    """Whether trainer and servers multiply with weights in FP8 blocks."""
    blocks = config.rollout.servers.fp8 is Fp8Serving.block
    return blocks and config.parallel.fp8 is Fp8.blockwise


def other_weights(config: Config, shape: Shape) -> list[str]:
    """Why trainer and servers, which both have FP8 blocks, multiply with other weights; [] if these
    are the same, bit for bit."""
    parallel, servers = config.parallel, config.rollout.servers
    found = differences(
        shape,
        tensor=parallel.tensor,
        expert_tensor=parallel.expert_tensor or parallel.tensor,
        trainer=trainer_scales(),
        engine=servers.fp8_scales,
    )
    exact = parallel.fp8_first_layers_bf16 + parallel.fp8_last_layers_bf16
    return [*found, *([f"the trainer has {exact} layers in bfloat16"] if exact else [])]


def trainer_scales() -> Fp8Scales:
    """Those of Transformer Engine's blocks, by its environment."""
    free = os.environ.get(FLOAT32_SCALES, "0") == "1"
    return Fp8Scales.float32 if free else Fp8Scales.power_of_two
