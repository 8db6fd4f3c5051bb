"""How the model and a batch are divided over the processes."""

from peergrad.config import Config, require
from peergrad.parallel.hf.config import VOCAB_MULTIPLE, Shape


def data_ranks(config: Config, world: int) -> int:
    """The data-parallel size that ``world`` processes leave."""
    return world // (config.parallel.tensor * config.parallel.pipeline)


def check_layout(config: Config, shape: Shape, world: int) -> None:
    """Raise ValueError unless TP x PP x DP divides the model and fits the processes."""
    parallel = config.parallel
    tensor, pipeline = parallel.tensor, parallel.pipeline
    divided = {
        "attention heads": shape.heads,
        "key-value heads": shape.kv_heads,
        "MLP columns": shape.ffn,
        "padded vocabulary rows": VOCAB_MULTIPLE,
    }
    for what, number in divided.items():
        require(
            number % tensor == 0,
            "parallel.tensor",
            tensor,
            f"must divide the model's {number} {what}",
            f"use a divisor of {number}",
        )
    require(
        shape.layers % pipeline == 0,
        "parallel.pipeline",
        pipeline,
        f"must divide the model's {shape.layers} layers",
        f"use a divisor of {shape.layers}",
    )
    wanted = tensor * pipeline * (parallel.data or 1)
    ok = world == wanted if parallel.data else world % wanted == 0
    require(
        ok,
        "parallel",
        f"tensor {tensor} x pipeline {pipeline} x data {parallel.data or 'any'}",
        f"must fit the {world} processes of this job",
        f"start {wanted if parallel.data else f'a multiple of {wanted}'} processes "
        "(torchrun --nproc-per-node), or change the layout",
    )


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
