"""The models of a run behind three verbs: score, update, weights."""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from peergrad.algo.division import Cost, Division, divide
from peergrad.algo.objective import Metrics
from peergrad.algo.packing import MicroBatch, pack, ranges
from peergrad.algo.samples import Sample, contexts, make_samples, pieces
from peergrad.config import Config
from peergrad.data import Group
from peergrad.parallel.context import hold
from peergrad.parallel.determinism import be_deterministic
from peergrad.parallel.fp8 import forget_exact, products_in_8_bits, row_multiple
from peergrad.parallel.fused import describe, fuse_weight_gradients
from peergrad.parallel.head import Head, Objective, choose_logprob
from peergrad.parallel.hf.companions import Companions
from peergrad.parallel.hf.config import Shape, read_shape
from peergrad.parallel.hf.files import write_hf
from peergrad.parallel.hf.tensors import layer_weights
from peergrad.parallel.mesh import Mesh
from peergrad.parallel.model import build_model, run
from peergrad.parallel.optimizer import (
    build_optimizer,
    gather_parameters,
    learning_rate,
    schedule_updates,
    wrap_model,
)
from peergrad.parallel.routing import NONE, Coefficients, Routed, Tally, routed, router_metrics
from peergrad.parallel.snapshot import load_weights
from peergrad.parallel.weights import export_hf, load_hf

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """What a model says of the answer tokens of samples; equal on every rank. NaN: not scored.

    Example:
        ``Scores(samples=[...], logp=[array([-.1, -.2])], entropy=[array([.3, .1])])``
    """

    samples: Sequence[Sample]
    logp: list[np.ndarray]  # [R] float32 of each sample
    entropy: list[np.ndarray]  # [R] float32 of each sample; all NaN if it was not asked for


@dataclass(frozen=True)
class Update:
    """What one optimizer step did; equal on every rank.

    Example:
        ``Update(metrics={"loss/total": -.01, "optim/grad_norm": .7}, scores=..., finite=True,
        refusal=None)``
    """

    metrics: dict[str, float]
    scores: Scores  # of its own forward pass, before the step
    finite: bool  # False: loss or gradient was not; the weights are unchanged
    refusal: str | None  # the objective's or the batch's reason against the step, if any


class Scorer:
    """A model that gives logprobs: the frozen reference, and the base of the policy."""

    replays = False
    """Whether tokens go to the experts that the engine chose: its weights are this model's."""
    learns = False

    def __init__(
        self, config: Config, mesh: Mesh, *, path: str, weights: str | None = None
    ) -> None:
        self.config, self.mesh = config, mesh
        if config.parallel.deterministic_mode:
            be_deterministic()
        self.in_8_bits = config.parallel.fp8_reference
        key = "model.path" if path == config.model.path else "model.reference"
        self.shape = read_shape(path, key)
        self.model = build_model(self.shape, config.parallel, config.model.dtype, mesh)
        self.tally = Tally()
        kind = choose_logprob(config.kernels.logprob, mesh.device)
        self.head = Head(self.model.pieces[-1], config, vocab=self.shape.vocab, kind=kind)
        if weights is None:
            load_hf(self.model, path, self.shape, mesh, key=key)
        else:
            load_weights(Path(weights), self.model, self.shape, mesh)
        if not self.learns:
            forget_exact(self.model)

    def score(
        self,
        samples: Sequence[Sample],
        *,
        temperature: float | None = None,
        with_entropy: bool = False,
        in_8_bits: bool | None = None,
    ) -> Scores:
        """Score the samples' answer tokens that have a weight.

        ``temperature`` defaults to the rollouts'. The entropy costs a pass over the logits; ask for
        it where something reads it. ``in_8_bits`` of a model for ``parallel.fp8``, by default as
        configured for it. Collective over all ranks.
        """
        bins = self._divide(samples).bins

        def forward(batch: MicroBatch, hidden: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
            logp, entropy = self.head.logprobs(
                hidden, batch, with_entropy=with_entropy, temperature=temperature
            )
            return logp, torch.full_like(logp, torch.nan) if entropy is None else entropy

        wanted = self.in_8_bits if in_8_bits is None else in_8_bits
        with torch.no_grad(), products_in_8_bits(self.model.config, wanted):
            found = self._schedule(self.model.pieces, self._pack(samples, bins), forward, True)
        return self._collect(samples, bins, found)[0]

    def canary_gap(self, group: Group) -> float:
        """Largest ``|own logp - engine logp|`` in nats on a text that the engines scored at
        temperature 1: one rollout per server, all of the same tokens, scored here once for all
        servers that sent these to the same experts, with products that show the weights (never in
        8 bits). Collective; equal on every rank."""
        alone = [replace(group, rollouts=(rollout,)) for rollout in group.rollouts]
        samples = [sample for one in alone for sample in make_samples([one])]
        assert all(np.array_equal(s.tokens, samples[0].tokens) for s in samples)
        own: dict[bytes, np.ndarray] = {}
        gaps = []
        for sample in samples:
            experts = b"" if sample.experts is None else sample.experts.tobytes()
            if experts not in own:
                own[experts] = self.score([sample], temperature=1.0, in_8_bits=False).logp[0]
            gaps.append(np.abs(own[experts] - sample.logp_engine))
        return float(np.max(gaps))  # keeps NaN

    @torch.no_grad()
    def become(self, other: "Scorer") -> None:
        """Take over the weights of another model of the same shape and layout. Collective."""
        other.gather()
        for mine, theirs in zip(self.model.parameters(), other.model.parameters(), strict=True):
            mine.copy_(theirs)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """``(HF name, full tensor)`` on the first data and context ranks, nothing on the others;
        collective, must be drained by every rank."""
        self.gather()
        yield from export_hf(self.model, self.shape, self.mesh)

    def gather(self) -> None:
        """Have every parameter whole on this rank, for what reads it outside of a forward pass.
        Collective."""

    def _divide(self, samples: Sequence[Sample]) -> Division:
        budget = self.config.parallel.micro_batch_tokens * self.mesh.context.size()
        share = self.model.shares_prompts
        # Of micro-batches the interleaved schedule takes one for each pipeline rank at a time.
        multiple = self.mesh.pipeline.size() if len(self.model) > 1 else 1
        ranks = self.mesh.data.size()
        options: dict[str, Any] = {"share": share, "multiple": multiple, "cost": cost(self.shape)}
        return divide(samples, ranks=ranks, budget=budget, each=self._each, **options)

    @property
    def _each(self) -> int:
        """Of what number of tokens every sequence is a multiple: a context rank holds two pieces
        of it."""
        context = self.mesh.context.size()
        return 2 * context if context > 1 else 1

    def _pack(self, samples: Sequence[Sample], bins: Sequence[list[list[int]]]) -> list[MicroBatch]:
        """This rank's micro-batches, on its device."""
        parallel, context = self.config.parallel, self.mesh.context
        multiple = math.lcm(self._each, context.size() * row_multiple(parallel))
        options: dict[str, Any] = {"share": self.model.shares_prompts, "each": self._each}
        options |= {"multiple": multiple, "routed": self.shape.experts is not None}
        mine = bins[self.mesh.data.rank()]
        packed = [pack([samples[i] for i in part], **options) for part in mine]
        held = [hold(batch, context.rank(), context.size()) for batch in packed]
        return [_to_device(batch, self.mesh.device) for batch in held]

    def _collect(
        self,
        samples: Sequence[Sample],
        bins: Sequence[list[list[int]]],
        found: Sequence[tuple[Tensor, ...]],
        extra: Any = None,
    ) -> tuple[Scores, list[Any]]:
        """Bring (logp, entropy) of every micro-batch to every rank and back into the order of the
        samples; with it ``extra`` of each rank that reports."""
        mine = None
        if self.mesh.reports:
            columns = [torch.cat(parts).float().cpu().numpy() for parts in zip(*found, strict=True)]
            first = self.mesh.context.rank() == 0  # the others have the same
            mine = (self.mesh.data.rank(), columns if first else None, extra)
        gathered = [part for part in self.mesh.gather(mine) if part is not None]
        sizes = [s.logp_engine.size for s in samples]
        starts = np.cumsum([0, *sizes])
        scored = np.flatnonzero(np.concatenate([np.zeros(0), *(s.weight for s in samples)]))
        begins = np.searchsorted(scored, starts)  # of each sample's among them
        whole = np.full((2, starts[-1]), np.nan, np.float32)
        for rank, columns in ((rank, columns) for rank, columns, _ in gathered if columns):
            order = np.array([i for part in bins[rank] for i in part], np.int64)
            counts = begins[order + 1] - begins[order]
            whole[:, scored[np.repeat(begins[order], counts) + ranges(counts)]] = columns
        logp, entropy = (pieces(row, sizes) for row in whole)
        return Scores(samples, logp, entropy), [part[2] for part in gathered]

    def _schedule(
        self,
        models: Sequence[torch.nn.Module],
        batches: Sequence[MicroBatch],
        finish: Callable[..., Any],
        forward_only: bool,
        coefficients: Coefficients = NONE,
    ) -> list[Any]:
        """Run Megatron's schedule on this rank's pieces of the model; ``finish(batch, hidden)`` is
        called with what the last of all gives. Its results (of a training step: the third one) come
        back in order, on the last stage only. ``coefficients``: of the losses that routers add."""

        def step(
            iterator: Iterator[MicroBatch], piece: torch.nn.Module
        ) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(iterator)
            told = self._routed(batch, coefficients)
            return run(piece, batch, self.mesh.context, told), partial(finish, batch)

        results: list[Any] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(batches) for _ in models],
            model=list(models),
            num_microbatches=len(batches),
            seq_length=1,  # real lengths travel with the activations
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        return results

    def _routed(self, batch: MicroBatch, coefficients: Coefficients) -> Routed | None:
        if self.shape.experts is None:
            return None
        return routed(
            batch,
            tensor=self.mesh.tensor,
            group=self.mesh.tensor_context,
            sequence=self.config.parallel.sequence,
            replay=self.replays and self.config.moe.replays,
            coefficients=coefficients,
            tally=self.tally,
        )


class Policy(Scorer):
    """The model that learns."""

    replays = learns = True

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.companions = Companions.read(Path(config.model.path))
        super().__init__(config, mesh, path=config.model.path, weights=config.model.weights)
        self.in_8_bits = config.parallel.fp8_score
        self.ddp = wrap_model(self.model, config.parallel)
        log.info(describe(fuse_weight_gradients(self.model)))
        self.optimizer = build_optimizer(
            self.ddp, config.optim, config.parallel, config.model.dtype
        )
        forget_exact(self.model)
        self.updates = 0

    def gather(self) -> None:
        gather_parameters(self.ddp)

    def update(self, samples: Sequence[Sample], objective: Objective) -> Update:
        """One optimizer step on ``samples``. Collective over all ranks.

        A loss or gradient norm that is not finite, an objection of the objective or a batch without
        a token to learn from leaves the weights as they were.
        """
        for piece in self.ddp:
            piece.zero_grad_buffer()
        self.optimizer.zero_grad()
        division = self._divide(samples)
        bins = division.bins

        def finish(batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
            loss, *report = self.head.loss(hidden, batch, objective)
            return loss, torch.zeros((), dtype=torch.int), report

        computed = contexts(samples).tolist() if self.shape.experts is not None else []
        told = Coefficients.of(self.config.moe, computed)
        reports = self._schedule(self.ddp, self._pack(samples, bins), finish, False, told)
        found = [report[1:] for report in reports]
        mine = _add_up([metrics for report in reports for metrics in report[0]])
        scores, parts = self._collect(samples, bins, found, mine)
        metrics = {
            key: total / count if count else total for key, (total, count) in _merge(parts).items()
        }
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        metrics |= {"optim/grad_norm": norm, "optim/lr": self._set_learning_rate()}
        metrics["tokens/imbalance"] = division.imbalance
        if self.shape.experts is not None:
            metrics |= router_metrics(self.mesh.gather(self.tally.take()), computed)
        finite = math.isfinite(norm) and math.isfinite(metrics["loss/total"])
        refusal = objective.refusal(metrics)
        if not any(part for rank in bins for part in rank):
            refusal = "no token to learn from"
        if finite and refusal is None:
            self.optimizer.step()
        self.updates += 1
        return Update(metrics, scores, finite, refusal)

    def export(self, folder: Path) -> None:
        """Write the weights as an HF checkpoint, with the companions of ``model.path`` as they were
        when the run started. Collective; rank 0 writes."""
        stream = self.weights()
        failure: list[Exception] = []
        if self.mesh.rank == 0:
            try:
                write_hf(stream, folder, companions=self.companions)
            except Exception as error:
                failure.append(error)
        deque(stream, maxlen=0)  # every rank drains it, rank 0 also after a failure

        def finish() -> None:
            for error in failure:
                raise error

        self.mesh.share(finish)

    def _set_learning_rate(self) -> float:
        total = schedule_updates(self.config)
        rate = learning_rate(self.config.optim, update=self.updates, total=total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)
        return rate


def cost(shape: Shape) -> Cost:
    """What a pair of query and key, and a token's logits, take beside a token's way through the
    layers' matrices, in multiplications; forward and backward alike."""
    layer, head = layer_weights(shape), shape.hidden * shape.vocab
    return Cost(pair=2 * shape.heads * shape.head_dim / layer, scored=head / (layer * shape.layers))


def _add_up(reports: Sequence[Metrics]) -> dict[str, tuple[float, float]]:
    """Sums and counts over micro-batches, added on the device and brought to the host at once."""
    total: dict[str, tuple[Tensor, Tensor | int]] = {}
    for report in reports:
        for key, (value, count) in report.items():
            old = total.get(key)
            total[key] = (value, count) if old is None else (old[0] + value, old[1] + count)
    if not total:
        return {}  # not on the last stage, or another context rank says it all
    sums = torch.stack([value for value, _ in total.values()])
    counts = [torch.as_tensor(count).to(sums) for _, count in total.values()]
    both = zip(sums.tolist(), torch.stack(counts).tolist(), strict=True)
    return dict(zip(total, both, strict=True))


def _merge(parts: Sequence[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """Sums and counts over ranks."""
    keys = {key: None for part in parts for key in part}
    return {
        key: tuple(np.sum([part[key] for part in parts if key in part], axis=0).tolist())
        for key in keys
    }


def _to_device(of: Any, device: torch.device) -> Any:
    """A dataclass with its tensors, and those of dataclasses in it, on the device."""
    values = {f.name: getattr(of, f.name) for f in fields(of)}
    moved = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
    moved |= {k: _to_device(v, device) for k, v in values.items() if is_dataclass(v)}
    return replace(of, **moved)
