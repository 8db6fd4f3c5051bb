"""The models of a run behind four verbs: pack, logprobs, update, weights."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from peergrad.algo.objective import Metrics
from peergrad.algo.packing import MicroBatch, Sample, micro_batches
from peergrad.config import Config
from peergrad.data import Group
from peergrad.parallel.groups import Groups
from peergrad.parallel.hf.config import read_shape
from peergrad.parallel.hf.files import write_hf
from peergrad.parallel.model import build_model, run
from peergrad.parallel.optimizer import build_optimizer, learning_rate, wrap_model
from peergrad.parallel.snapshot import load_weights
from peergrad.parallel.weights import export_hf, load_hf

Objective = Callable[[Tensor, Tensor, MicroBatch], tuple[Tensor, Metrics]]


@dataclass(frozen=True)
class Update:
    """What one optimizer step did; equal on every rank.

    Example:
        ``Update(metrics={"loss/total": -.01, "optim/grad_norm": .7}, gap=array([1e-6, ...]),
        applied=True)``
    """

    metrics: dict[str, float]
    gap: np.ndarray  # trainer logprob - engine logprob of every scored token of the step, float32
    applied: bool  # False if the loss or the gradient was not finite: the weights are unchanged


class Scorer:
    """A model that gives logprobs: the frozen reference, and the base of the policy."""

    def __init__(
        self, config: Config, groups: Groups, *, path: str, weights: str | None = None
    ) -> None:
        self.config, self.groups = config, groups
        self.hf_config, self.shape = read_shape(path)
        self.model = build_model(self.shape, config.parallel, config.model.dtype, groups)
        if weights is None:
            load_hf(self.model, path, self.shape, groups)
        else:
            load_weights(Path(weights), self.model, self.shape)

    def pack(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        """This rank's micro-batches of a step's samples, on its device."""
        parallel = self.config.parallel
        batches = micro_batches(
            samples,
            rank=self.groups.data.rank(),
            ranks=self.groups.data.size(),
            budget=parallel.micro_batch_tokens,
            multiple=parallel.tensor if parallel.sequence else 1,
        )
        return [_to_device(batch, self.groups.device) for batch in batches]

    @torch.no_grad()
    def logprobs(
        self, batches: Sequence[MicroBatch], *, temperature: float | None = None
    ) -> list[Tensor | None]:
        """float32 logp ``[S]`` of each micro-batch on the last pipeline stage, None on the others.

        ``temperature`` defaults to the rollouts'. Collective over the model-parallel ranks.
        """

        def forward(batch: MicroBatch, hidden: Tensor, **_: Any) -> Tensor:
            return self._head(hidden, batch, temperature)[0]

        found = self._schedule(self.model, batches, forward, forward_only=True)
        return found if self.groups.is_last_stage else [None] * len(batches)

    def canary_gap(self, group: Group) -> float:
        """Largest ``|own logp - engine logp|`` in nats on a text that the engines scored at
        temperature 1 (one rollout per server). Collective; equal on every rank."""
        size = group.prompt.tokens.size
        samples = [
            Sample(np.concatenate([group.prompt.tokens, r.tokens]), size, r.logprobs, 0.0, 0.0)
            for r in group.rollouts
        ]
        batches = self.pack(samples)
        gaps = [
            float((logp - batch.logp_engine).abs().max())
            for logp, batch in zip(self.logprobs(batches, temperature=1.0), batches, strict=True)
            if logp is not None and logp.numel()
        ]
        return float(
            np.max([gap for part in self.groups.gather(gaps) for gap in part])
        )  # keeps NaN

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """``(HF name, full tensor)`` on the ranks of the first data-parallel replica, nothing on
        the others; collective, must be drained by every rank."""
        return export_hf(self.model, self.shape, self.groups)

    def export(self, folder: Path, *, companions: Path) -> None:
        """Write the weights as an HF checkpoint, with configuration and tokenizer copied from
        ``companions``. Collective; rank 0 writes."""
        stream = self.weights()
        failure: list[Exception] = []
        if self.groups.rank == 0:
            try:
                write_hf(stream, folder, companions=companions)
            except Exception as error:
                failure.append(error)
        deque(stream, maxlen=0)  # every rank drains it, rank 0 also after a failure

        def finish() -> None:
            for error in failure:
                raise error

        self.groups.share(finish)

    def _head(
        self, hidden: Tensor, batch: MicroBatch, temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.model.logprobs(
            hidden,
            batch,
            vocab=self.shape.vocab,
            temperature=temperature or self.config.rollout.temperature,
            chunk=self.config.parallel.logprob_chunk,
        )

    def _schedule(
        self,
        model: torch.nn.Module,
        batches: Sequence[MicroBatch],
        finish: Callable[..., Any],
        *,
        forward_only: bool,
    ) -> list[Any]:
        """Run Megatron's schedule; ``finish(batch, hidden)`` is called on the last stage. Its
        results (of a training step: the third one) come back in order, there only."""

        def step(iterator: Iterator[MicroBatch], _: object) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(iterator)
            return run(model, batch), partial(finish, batch)

        results: list[Any] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=model,
            num_microbatches=len(batches),
            seq_length=1,  # real lengths travel with the activations
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        return results


class Policy(Scorer):
    """The model that learns."""

    def __init__(self, config: Config, groups: Groups) -> None:
        super().__init__(config, groups, path=config.model.path, weights=config.model.weights)
        self.ddp = wrap_model(self.model, config.parallel)
        self.optimizer = build_optimizer(
            self.ddp, config.optim, config.parallel, config.model.dtype
        )
        self.updates = 0

    def update(self, batches: Sequence[MicroBatch], objective: Objective) -> Update:
        """One optimizer step on ``batches``. Collective over all ranks.

        A loss or gradient norm that is not finite leaves the weights as they were.
        """
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

        def finish(batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
            logp, entropy = self._head(hidden, batch)
            loss, metrics = objective(logp, entropy, batch)
            gap = logp.detach() - batch.logp_engine
            return loss, torch.zeros((), dtype=torch.int), (metrics, gap)

        reports = self._schedule(self.ddp, batches, finish, forward_only=False)
        metrics, gap = self._merge(reports)
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        rate = self._set_learning_rate()
        metrics |= {"optim/grad_norm": norm, "optim/lr": rate}
        applied = math.isfinite(norm) and math.isfinite(metrics["loss/total"])
        if applied:
            self.optimizer.step()
        self.updates += 1
        return Update(metrics, gap, applied)

    def _set_learning_rate(self) -> float:
        total = self.config.run.steps * self.config.algo.minibatches
        rate = learning_rate(self.config.optim, update=self.updates, total=total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)
        return rate

    def _merge(self, reports: list[tuple[Metrics, Tensor]]) -> tuple[dict[str, float], np.ndarray]:
        """Add the micro-batches' reports up over all ranks that hold different tokens."""
        mine: dict[str, tuple[float, int]] = {}
        gaps: list[np.ndarray] = []
        if self.groups.reports:
            for metrics, gap in reports:
                gaps.append(gap.cpu().numpy())
                for key, (total, count) in metrics.items():
                    old = mine.get(key, (0.0, 0))
                    mine[key] = (old[0] + float(total), old[1] + count)
        gathered = self.groups.gather((mine, gaps))
        keys = {key: None for part, _ in gathered for key in part}
        merged = {}
        for key in keys:
            total, count = np.sum([part[key] for part, _ in gathered if key in part], axis=0)
            merged[key] = float(total / count) if count else float(total)
        return merged, np.concatenate([gap for _, part in gathered for gap in part])


def _to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    moved = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
    return replace(batch, **moved)  # type: ignore[arg-type]
