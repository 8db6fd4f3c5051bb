"""From the last stage's hidden states to logprobs and the loss, by the kernels chosen."""

import logging
from typing import Any, Protocol

import torch
from torch import Tensor

from peergrad.algo.objective import Metrics
from peergrad.algo.packing import MicroBatch
from peergrad.config import Config, Dtype, Logprob
from peergrad.kernels import (
    fused_linear_loss,
    linear_logits,
    linear_logprob,
    rows_that_fit,
    triton_runs,
    vocab_parallel_logprob,
)
from peergrad.parallel.context import whole
from peergrad.parallel.model import PolicyModel

log = logging.getLogger(__name__)


class Objective(Protocol):
    """Loss and metrics of a micro-batch from its logprobs and entropies."""

    @property
    def per_token(self) -> bool:
        """Whether a micro-batch may be given in parts, whose losses and metrics add up."""
        ...

    def __call__(
        self, logp: Tensor, entropy: Tensor, batch: MicroBatch, /
    ) -> tuple[Tensor, Metrics]: ...

    def refusal(self, metrics: dict[str, float], /) -> str | None:
        """Why the optimizer must not take this step, or None."""
        ...


def choose_logprob(wanted: Logprob, device: torch.device) -> Logprob:
    """Resolve ``auto``. Raises ValueError if a GPU lacks the Triton that the choice needs."""
    fast = triton_runs(device)
    if device.type == "cuda" and not fast and wanted not in (Logprob.auto, Logprob.reference):
        raise ValueError(
            f"kernels.logprob = {wanted.name!r}: needs the package triton on a GPU; install it or "
            "set kernels.logprob=reference"
        )
    chosen = wanted
    if wanted is Logprob.auto:
        chosen = Logprob.fused_linear if fast else Logprob.reference
    stages = "Triton" if fast and chosen is not Logprob.reference else "PyTorch"
    log.info("logprob kernels: %s (%s)", chosen.name, stages)
    return chosen


class Head:
    """The projection to the vocabulary of one model; meant for the last stage only."""

    def __init__(self, model: PolicyModel, config: Config, *, vocab: int, kind: Logprob) -> None:
        self.model, self.kind, self.vocab = model, kind, vocab
        self.temperature = config.rollout.temperature
        self.dtype = torch.float32 if config.kernels.logits is Dtype.float32 else torch.bfloat16
        self.chunk, self.chunk_mb = config.kernels.chunk, config.kernels.chunk_mb

    def logprobs(
        self,
        hidden: Tensor,
        batch: MicroBatch,
        *,
        with_entropy: bool,
        temperature: float | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(logp, entropy if asked for) ``[S]`` of the batch's scored tokens, float32, on every
        context rank. ``temperature`` defaults to the rollouts'. Collective."""
        tau = self.temperature if temperature is None else temperature
        found = self._logprobs(hidden, batch.here, tau, with_entropy)
        logp, entropy = (None if x is None else self._whole(x, batch) for x in found)
        assert logp is not None
        return logp, entropy

    def _logprobs(
        self, hidden: Tensor, batch: MicroBatch, tau: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Of the tokens that this rank predicts."""
        rows, weight, group = self._rows(hidden, batch), self.model.head_weight(), self._group
        if self.kind is Logprob.from_logits:
            return vocab_parallel_logprob(
                linear_logits(rows, weight, dtype=self.dtype),
                batch.targets,
                group=group,
                temperature=tau,
                valid_vocab=self.vocab,
                with_entropy=with_entropy,
                inplace=True,
            )
        return linear_logprob(
            rows,
            weight,
            batch.targets,
            group=group,
            vocab_size=self.vocab,
            temperature=tau,
            chunk=self._chunk(weight),
            with_entropy=with_entropy,
            logits=self.dtype,
            plain=self.kind is Logprob.reference,
        )

    def loss(
        self, hidden: Tensor, batch: MicroBatch, objective: Objective
    ) -> tuple[Tensor, list[Metrics], Tensor, Tensor]:
        """Loss, its metrics (to be added up, over context ranks too), and detached (logp, entropy)
        ``[S]``.

        An objective whose tokens depend on each other needs all logprobs before any gradient. Every
        context rank then computes all of the loss, and one of them reports it. Collective.
        """
        if self.kind is not Logprob.fused_linear or not objective.per_token:
            logp, entropy = self.logprobs(hidden, batch, with_entropy=True)
            assert entropy is not None
            loss, metrics = objective(logp, entropy, batch)
            first = self.model.pg_collection.cp.rank() == 0
            return loss, [metrics] if first else [], logp.detach(), entropy.detach()
        found: list[Metrics] = []
        here = batch.here

        def derivative(logp: Tensor, entropy: Tensor, rows: Tensor | slice) -> Any:
            leaves = logp.detach().requires_grad_(), entropy.detach().requires_grad_()
            with torch.enable_grad():
                loss, metrics = objective(leaves[0], leaves[1], here.part(rows))
                d_logp, d_entropy = torch.autograd.grad(loss, leaves, allow_unused=True)
            found.append(metrics)
            return loss.detach(), torch.zeros_like(logp) if d_logp is None else d_logp, d_entropy

        rows, weight = self._rows(hidden, here), self.model.head_weight()
        loss, logp, entropy = fused_linear_loss(
            rows,
            weight,
            here.targets,
            derivative,
            group=self._group,
            vocab_size=self.vocab,
            temperature=self.temperature,
            chunk=self._chunk(weight),
            logits=self.dtype,
        )
        return loss, found, self._whole(logp, batch), self._whole(entropy, batch)

    def _whole(self, values: Tensor, batch: MicroBatch) -> Tensor:
        return whole(values, batch, self.model.pg_collection.cp)

    @property
    def _group(self) -> Any:
        return self.model.pg_collection.tp

    def _chunk(self, weight: Tensor) -> int:
        if self.chunk is not None:
            return self.chunk
        return rows_that_fit(weight, self.dtype, megabytes=self.chunk_mb)

    def _rows(self, hidden: Tensor, batch: MicroBatch) -> Tensor:
        # Only from_logits leaves the sum of their gradient over the tensor ranks to Megatron.
        summed = self.kind is not Logprob.from_logits
        return self.model.head_input(hidden, summed=summed).index_select(0, batch.rows)
