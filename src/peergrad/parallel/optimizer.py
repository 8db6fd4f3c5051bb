"""Megatron's optimizer from our configuration, and the learning rate of a step."""

import math

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from peergrad.config import Config, Dtype, OptimConfig, ParallelConfig, Schedule
from peergrad.parallel.model import Stage


def wrap_model(model: Stage, parallel: ParallelConfig) -> list[DistributedDataParallel]:
    """Megatron DDP of each piece, with float32 gradients that are summed, never averaged.

    The loss already carries its global denominators (``algo.aggregate``). Megatron would divide
    once more by the number of tokens that the schedule counted: handing None to
    ``finalize_model_grads`` is the one place where that averaging is undone.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    model.config.finalize_model_grads_func = lambda chunks, num_tokens, **kwargs: (
        finalize_model_grads(chunks, None, **kwargs)
    )
    return [DistributedDataParallel(model.config, config, piece) for piece in model.pieces]


def build_optimizer(
    ddp: list[DistributedDataParallel], optim: OptimConfig, parallel: ParallelConfig, dtype: Dtype
) -> MegatronOptimizer:
    """AdamW over float32 main parameters, sharded over the data ranks if so configured."""
    bf16 = dtype is Dtype.bfloat16
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        bf16=bf16,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(config, ddp)
    ddp[0].config.grad_scale_func = optimizer.scale_loss
    return optimizer


def schedule_updates(config: Config) -> int:
    """Optimizer steps until the schedule of the learning rate is at its end."""
    steps = config.optim.decay_steps or config.run.steps
    return steps * config.algo.epochs * config.algo.minibatches


def learning_rate(optim: OptimConfig, *, update: int, total: int) -> float:
    """Learning rate of optimizer step ``update`` (from 0) of ``total``.

    Linear warm-up that reaches ``lr`` after ``warmup_steps``, then the schedule, which reaches
    ``min_lr`` at the last of them and stays there.

    Example:
        lr 1, warm-up 2, linear to 0 over 6 steps: 0.5, 1, 1, .667, .333, 0.
    """
    if update < optim.warmup_steps:
        return optim.lr * (update + 1) / optim.warmup_steps
    if optim.schedule is Schedule.constant:
        return optim.lr
    span = max(1, total - 1 - optim.warmup_steps)
    progress = min(1.0, (update - optim.warmup_steps) / span)
    if optim.schedule is Schedule.cosine:
        progress = (1 - math.cos(math.pi * progress)) / 2
    return optim.lr + (optim.min_lr - optim.lr) * progress
