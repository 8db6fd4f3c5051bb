"""How the model and a batch are divided over the processes."""

from collections.abc import Mapping
from dataclasses import fields

from peergrad.config import (
    Config,
    Fp8,
    MoeConfig,
    ParallelConfig,
    Recompute,
    RecomputeMethod,
    Replay,
    require,
)
from peergrad.config.fp8 import FP8_BLOCK, FP8_MULTIPLE
from peergrad.parallel.hf.config import VOCAB_MULTIPLE, Experts, Shape


def data_ranks(config: Config, world: int) -> int:
    """The data-parallel size that ``world`` processes leave."""
    parallel = config.parallel
    return world // (parallel.tensor * parallel.pipeline * parallel.context)


def check_layout(config: Config, shape: Shape, world: int, *, learns: bool = True) -> None:
    """Raise ValueError unless TP x PP x CP x DP divides the model and fits the processes.
    ``learns``: it is the policy, which all that is set must be for."""
    parallel = config.parallel
    tensor, pipeline = parallel.tensor, parallel.pipeline
    require_divisor("parallel.tensor", tensor, divided_by_tensor(shape))
    require_key_value_heads("parallel.tensor", tensor, shape)
    _check_stages(parallel, shape.layers)
    _check_recompute(parallel, shape.layers)
    if parallel.fp8 is not Fp8.off:
        _check_fp8(parallel, shape)
    if shape.experts is not None:
        _check_experts(parallel, shape, shape.experts, world)
    elif learns:
        _require_no_experts(config, shape)
    wanted = tensor * pipeline * parallel.context * (parallel.data or 1)
    grid = f"tensor {tensor} x pipeline {pipeline}"
    grid += f" x context {parallel.context}" if parallel.context > 1 else ""
    ok = world == wanted if parallel.data else world % wanted == 0
    require(
        ok,
        "parallel",
        f"{grid} x data {parallel.data or 'any'}",
        f"must fit the {world} processes of this job",
        f"start {wanted if parallel.data else f'a multiple of {wanted}'} processes "
        "(torchrun --nproc-per-node), or change the layout",
    )


def divided_by_tensor(shape: Shape) -> dict[str, int]:
    """What tensor ranks share, each as much as another; of experts see ``_check_experts``."""
    divided = {"attention heads": shape.heads, "padded vocabulary rows": VOCAB_MULTIPLE}
    return divided if shape.experts else {**divided, "MLP columns": shape.ffn}


def require_key_value_heads(key: str, tensor: int, shape: Shape) -> None:
    """ValueError, which names ``key``, unless each of ``tensor`` ranks has as many key-value heads
    as another, or shares one with as many, and as many rows of their matrices."""
    heads = shape.kv_heads
    rule = f"must divide the model's {heads} key-value heads, or be a multiple of them"
    fit = (heads % tensor == 0 or tensor % heads == 0) and 2 * heads * shape.head_dim % tensor == 0
    require(fit, key, tensor, rule, f"use a divisor of {heads}")


def require_divisor(key: str, size: int, of: Mapping[str, int]) -> None:
    """ValueError, which names ``key``, unless ``size`` divides each of these numbers."""
    for what, number in of.items():
        rule, remedy = f"must divide the model's {number} {what}", f"use a divisor of {number}"
        require(number % size == 0, key, size, rule, remedy)


def _check_stages(parallel: ParallelConfig, layers: int) -> None:
    """Every piece of a pipeline rank has layers, as many as each other of its rank."""
    pieces, given = parallel.virtual_pipeline, _ends(parallel)
    for name, number in given.items():
        rule = f"must be a multiple of parallel.virtual_pipeline = {pieces}"
        require(number % pieces == 0, f"parallel.{name}", number, rule, "change one of the two")
    if not given:
        times = f"times parallel.virtual_pipeline = {pieces} " if pieces > 1 else ""
        rule = f"{times}must divide the model's {layers} layers"
        remedy = "lower one of the two" if pieces > 1 else f"use a divisor of {layers}"
        fit = layers % (parallel.pipeline * pieces) == 0
        require(fit, "parallel.pipeline", parallel.pipeline, rule, remedy)
        return
    ranks, rest = parallel.pipeline - len(given), layers - sum(given.values())
    times = f" times parallel.virtual_pipeline = {pieces}" if pieces > 1 else ""
    (key, value), *other = given.items()
    beside = "".join(f", with parallel.{name} = {number}," for name, number in other)
    rule = f"leaves{beside} {rest} of {layers} layers to the {ranks} other pipeline ranks{times}"
    fit = rest == 0 if ranks == 0 else rest > 0 and rest % (ranks * pieces) == 0
    require(fit, f"parallel.{key}", value, f"{rule}, which must divide them", "change one of them")
    # Megatron counts the layers of the ranks in between, and divides by their number.
    rule = "is what parallel.first_stage_layers leaves; of two ranks in pieces one alone is said"
    last = parallel.last_stage_layers
    require(ranks > 0 or pieces == 1, "parallel.last_stage_layers", last, rule, "unset it")


def _ends(parallel: ParallelConfig) -> dict[str, int]:
    """The stages whose number of layers is said."""
    ends = ("first_stage_layers", "last_stage_layers")
    return {name: number for name in ends if (number := getattr(parallel, name)) is not None}


def _check_recompute(parallel: ParallelConfig, layers: int) -> None:
    """Megatron takes ``recompute_layers`` at a time, also where fewer are left."""
    uniform = parallel.recompute_method is RecomputeMethod.uniform
    if parallel.recompute is not Recompute.full or not uniform:
        return
    numbers = list(_ends(parallel).values())
    if between := parallel.pipeline - len(numbers):
        numbers.append((layers - sum(numbers)) // between)
    for number in numbers:
        held = number // parallel.virtual_pipeline
        rule = f"must divide the {held} layers that lie one behind the other on a pipeline rank"
        remedy = f"use a divisor of {held}, or parallel.recompute_method=block"
        fit, value = held % parallel.recompute_layers == 0, parallel.recompute_layers
        require(fit, "parallel.recompute_layers", value, rule, remedy)


def _check_fp8(parallel: ParallelConfig, shape: Shape) -> None:
    """Raise ValueError unless a tensor rank's matrices are such as are multiplied in 8 bits, and
    each pipeline rank has the layers that are left in bfloat16."""
    tensor = parallel.tensor
    shared = (parallel.expert_tensor or tensor) if shape.experts else tensor
    blocks = parallel.sequence and parallel.fp8 is Fp8.blockwise
    parts = {
        f"a hidden size of {shape.hidden}": (shape.hidden, FP8_BLOCK if blocks else FP8_MULTIPLE),
        "rows of the attention's output": (shape.heads * shape.head_dim // tensor, FP8_MULTIPLE),
        "rows of queries, keys and values": (
            (shape.heads + 2 * shape.kv_heads) * shape.head_dim // tensor,
            FP8_MULTIPLE,
        ),
        "columns of the MLP": (shape.ffn // shared, FP8_MULTIPLE),
    }
    for what, (number, of) in parts.items():
        rule = f"needs multiples of {of}, and a tensor rank has {what}, {number}"
        fit = number % of == 0
        require(fit, "parallel.fp8", parallel.fp8.name, rule, "use fewer tensor ranks, or fp8=off")
    for name in ("fp8_first_layers_bf16", "fp8_last_layers_bf16"):
        most, value = shape.layers // parallel.pipeline, getattr(parallel, name)
        rule = f"must be at most {most}, the layers of a pipeline rank"
        require(value <= most, f"parallel.{name}", value, rule, "lower it")
    left = parallel.fp8_first_layers_bf16 + parallel.fp8_last_layers_bf16
    rule = f"leaves none of the {shape.layers} layers in 8 bits"
    key = "parallel.fp8_last_layers_bf16"
    require(left < shape.layers, key, parallel.fp8_last_layers_bf16, rule, "lower it")


def _require_no_experts(config: Config, shape: Shape) -> None:
    parallel, rule = config.parallel, f"model.path is no mixture of experts ({shape.family})"
    for one in fields(MoeConfig):
        value = getattr(config.moe, one.name)
        unset = value == one.default or value is Replay.off
        said = value.name if isinstance(value, Replay) else value
        require(unset, f"moe.{one.name}", said, rule, "unset it")
    require(parallel.expert == 1, "parallel.expert", parallel.expert, rule, "unset it")
    shared = parallel.expert_tensor
    require(shared is None, "parallel.expert_tensor", shared, rule, "unset it")
    modules = _recomputed(parallel)
    require("moe" not in modules, "parallel.recompute_modules", modules, rule, "leave it out")


def _recomputed(parallel: ParallelConfig) -> list[str]:
    return parallel.recompute_modules if parallel.recompute is Recompute.selective else []


def _check_experts(parallel: ParallelConfig, shape: Shape, experts: Experts, world: int) -> None:
    """Raise ValueError unless the experts divide as they are to."""
    modules = _recomputed(parallel)
    rule = "has no effect in a mixture of experts, whose layers have no other MLP"
    require("mlp" not in modules, "parallel.recompute_modules", modules, rule, "say moe")
    rule, remedy = f"must divide the model's {experts.number} experts", "use a divisor of it"
    require(experts.number % parallel.expert == 0, "parallel.expert", parallel.expert, rule, remedy)
    shared = parallel.expert_tensor or parallel.tensor
    key = "parallel.expert_tensor" if parallel.expert_tensor else "parallel.tensor"
    rule = f"must divide the {shape.ffn} columns of an expert"
    require(shape.ffn % shared == 0, key, shared, rule, f"use a divisor of {shape.ffn}")
    rule = "must be true with experts: each tensor rank sends its own tokens to them"
    apart = parallel.tensor == 1 or parallel.sequence
    require(apart, "parallel.sequence", parallel.sequence, rule, "set it, or parallel.tensor=1")
    stage = world // parallel.pipeline
    rule = f"times parallel.expert_tensor = {shared} must divide the {stage} ranks of a stage"
    fit, remedy = stage % (parallel.expert * shared) == 0, "lower one of the two"
    require(fit, "parallel.expert", parallel.expert, rule, remedy)


def check_batch(config: Config, world: int) -> None:
    """Raise ValueError unless every mini-batch divides evenly over the data-parallel ranks."""
    rollout, parts = config.rollout, config.algo.minibatches
    ranks = data_ranks(config, world)
    require(
        rollout.prompts_per_step % parts == 0,
        "algo.minibatches",
        parts,
        f"must divide the {rollout.prompts_per_step} groups of a step "
        f"(rollout.batch_size {rollout.batch_size} / rollout.group_size {rollout.group_size})",
        "change one of the three",
    )
    require(
        rollout.batch_size // parts % ranks == 0,
        "rollout.batch_size",
        rollout.batch_size,
        f"each of the {parts} mini-batches must divide evenly over the {ranks} data-parallel ranks",
        f"use a multiple of {ranks * parts * rollout.group_size}",
    )
