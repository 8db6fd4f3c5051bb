"""Megatron's optimizer from our configuration, and the learning rate of a step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig

from peergrad.config import Config, Dtype, Fp8, OptimConfig, ParallelConfig, Schedule
from peergrad.parallel.fp8 import gathered
from peergrad.parallel.model import PolicyModel, Stage
from peergrad.parallel.states import state_fields


class Wrapped(DistributedDataParallel):
    """Megatron's DDP of a piece whose head does without autograd and without a forward pass of its
    projection.

    The gradient of the head's weight is in ``main_grad`` when autograd comes to it, which then has
    none to add; with ``overlap_grad_reduce`` Megatron takes that for a mistake, and here it counts
    as ready. With ``overlap_param_gather`` the forward pass of a module waits for its parameters;
    the head's are waited for at the end of the piece's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        ddp_config: DistributedDataParallelConfig,
        piece: PolicyModel,
    ) -> None:
        super().__init__(config, ddp_config, piece)
        if self.use_forward_hook and piece.post_process:
            wait = self._make_forward_pre_hook()
            piece.register_forward_hook(lambda *_: wait(piece.output_layer))

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable[..., None]:
        usual: Callable[..., None] = super()._make_backward_post_hook(param)
        head = self.module.head_weight() if self.module.post_process else None
        if param is not head or not self.ddp_config.overlap_grad_reduce:
            return usual

        def hook(*unused: Any) -> None:
            if param.grad is not None:  # of a tied embedding
                return usual()
            group = self.param_to_bucket_group[param]
            group.register_grad_ready(param, self.force_all_reduce)

        return hook


def wrap_model(model: Stage, parallel: ParallelConfig) -> list[Wrapped]:
    """Megatron DDP of each piece, with float32 gradients that are summed, never averaged.

    The loss already carries its global denominators (``algo.aggregate``). Megatron would divide
    once more by the number of tokens that the schedule counted: handing None to
    ``finalize_model_grads`` is the one place where that averaging is undone.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.ddp_bucket_size,
        use_distributed_optimizer=parallel.distributed_optimizer,
        fp8_param_gather=parallel.fp8_params,
    )
    model.config.finalize_model_grads_func = lambda chunks, num_tokens, **kwargs: (
        finalize_model_grads(chunks, None, **kwargs)
    )
    ddp = [Wrapped(model.config, config, piece) for piece in model.pieces]
    for buffer in (x for piece in ddp for x in piece.buffers + piece.expert_parallel_buffers):
        _count_padding(buffer)
    if parallel.overlap_grad_reduce:  # gradients are sent in the last micro-batch's backward pass
        syncs = [piece.no_sync for piece in ddp]
        model.config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    return ddp


def _count_padding(buffer: Any) -> None:
    """What is between two buckets belongs to the first. Megatron 0.16 saves an optimizer's state
    without it, and looks for every parameter where it is with it: the checkpoint of a rank with
    several buckets then holds, without an error, other parameters' values."""
    for bucket in buffer.buckets:
        bucket.numel_unpadded = bucket.grad_data.numel()
    buffer.numel_unpadded = buffer.numel


def gather_parameters(ddp: list[Wrapped]) -> None:
    """Have the last step's parameters whole on this rank, which ``overlap_param_gather`` leaves to
    the next forward pass. Collective over the ranks that share the optimizer's state."""
    for piece in ddp if ddp[0].use_forward_hook else []:
        for group in piece.bucket_groups + piece.expert_parallel_bucket_groups:
            if not group.param_gather_dispatched or group.param_gather_handle is not None:
                group.start_param_sync(force_sync=True)
                # Else left to what waits for a gather in the next forward pass, and none goes on.
                gathered(group)


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
        fp8_recipe=None if parallel.fp8 is Fp8.off else parallel.fp8.name,
        **state_fields(optim),
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
