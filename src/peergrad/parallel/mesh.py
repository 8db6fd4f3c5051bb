"""Process groups: who shares what with whom, and the few object collectives of the loop."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from peergrad.config import ParallelConfig
from peergrad.echo import OtherRankFailed
from peergrad.parallel.device import set_up_device
from peergrad.parallel.fp8 import forget_scales
from peergrad.parallel.job import Job

Result = TypeVar("Result")


@dataclass(frozen=True)
class Mesh:
    """This process's place in the TP x CP x DP x PP grid, and for experts in ETP x EP x EDP x PP.

    ``control`` spans all ranks over gloo whatever the device: it carries objects and small numbers.
    """

    job: Job
    device: torch.device
    rank: int
    world: int
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    data: dist.ProcessGroup
    context: dist.ProcessGroup
    tensor_context: dist.ProcessGroup  # the ranks of both
    expert_tensor: dist.ProcessGroup  # that share every expert's matrices
    experts: dist.ProcessGroup  # that hold all experts, those of expert_tensor next to each other
    expert_data: dist.ProcessGroup  # that hold the same ones
    control: dist.ProcessGroup

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline.rank() == self.pipeline.size() - 1

    @property
    def expert_ranks(self) -> int:
        """Into how many parts the experts are divided."""
        return self.experts.size() // self.expert_tensor.size()

    @property
    def exports(self) -> bool:
        """Whether weights are brought together here: on the first data and context ranks."""
        return self.data.rank() == 0 and self.context.rank() == 0

    @property
    def lends_experts(self) -> bool:
        """Whether this rank's experts are among those that are brought to ``exports``' ranks."""
        return self.expert_data.rank() <= (self.tensor.size() - 1) // self.experts.size()

    @property
    def reports(self) -> bool:
        """Whether this rank's results stand for its part of the micro-batches: exactly one of the
        ranks that hold the same part says so."""
        return self.is_last_stage and self.tensor.rank() == 0

    def share(self, function: Callable[[], Result]) -> Result:
        """Run ``function`` on rank 0, however long it takes, and return its result on every rank.

        If it raises, rank 0 raises the error itself and every other rank OtherRankFailed, so that
        no rank waits for a broadcast that never comes.
        """
        box: list[Any] = [None, None]
        error: BaseException | None = None
        if self.rank == 0:
            try:
                box[0] = function()
            except BaseException as caught:
                error, box[1] = caught, f"{type(caught).__name__}: {caught}"
            self.job.done()
        else:
            self.job.await_zero()
        try:
            dist.broadcast_object_list(box, src=0, group=self.control)
        finally:
            if error is not None:
                raise error  # even if the others are gone, perhaps for the same reason
        if box[1] is not None:
            raise OtherRankFailed(f"rank 0 failed: {box[1]}")
        result: Result = box[0]
        return result

    def gather(self, value: Result) -> list[Result]:
        """Every rank's value, in rank order, on every rank."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        dist.barrier(group=self.control)


def init_mesh(config: ParallelConfig, *, seed: int, job: Job | None = None) -> Mesh:
    """Build Megatron's groups over the ranks of ``job`` (default: join it) and seed its generators.
    Order of ranks: tensor, context, data, pipeline."""
    device = set_up_device()
    timeout = timedelta(minutes=config.timeout_minutes)
    backend = "nccl" if device.type == "cuda" else "gloo"
    job = job or _joined(config.timeout_minutes)
    if not dist.is_initialized():  # a job may change its layout: see leave_layout
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("groups", job.store),  # type: ignore[attr-defined]
            rank=job.rank,
            world_size=job.world,
            timeout=timeout,
        )
    control = dist.new_group(backend="gloo", timeout=timeout)
    parallel_state.initialize_model_parallel(
        config.tensor,
        config.pipeline,
        config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=config.expert_tensor,
        distributed_timeout_minutes=max(1, round(config.timeout_minutes)),
    )
    # On a CPU the tracker is a no-op, which dropout 0 and host-side initialisation allow.
    model_parallel_cuda_manual_seed(
        seed, inference_rng_tracker=device.type == "cpu", force_reset_rng=True
    )
    torch.manual_seed(seed)
    return Mesh(
        job=job,
        device=device,
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        tensor_context=parallel_state.get_tensor_and_context_parallel_group(),
        expert_tensor=parallel_state.get_expert_tensor_parallel_group(),
        experts=parallel_state.get_expert_tensor_and_model_parallel_group(),
        expert_data=parallel_state.get_expert_data_parallel_group(),
        control=control,
    )


@cache
def _joined(minutes: float) -> Job:
    """The job of a program that has not joined one itself, once: nobody arrives twice."""
    return Job.join(minutes=minutes)


def leave_layout() -> None:
    """Forget the grid but stay in the job; ``init_mesh`` may lay it out anew."""
    parallel_state.destroy_model_parallel()
    forget_scales()


def close_mesh() -> None:
    """Leave the job; safe to call twice."""
    if dist.is_initialized():
        leave_layout()
        dist.destroy_process_group()
    _joined.cache_clear()
