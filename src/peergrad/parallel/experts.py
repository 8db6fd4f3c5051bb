"""Layers of experts: Megatron's, with routers whose losses and choices know the samples.

Megatron weighs a router's losses by the tokens of a micro-batch on a rank, so that they depend on
how the work is divided, and multiplies them by a number that it expects to divide by in the end,
which is not done here (``optimizer.wrap_model``). Here the losses of an optimizer step are, summed
over layers,

- ``aux_loss_coef`` times the mean over samples of ``E sum_i f_i P_i``: f_i is the part of a
  sample's choices that fell on expert i of E, P_i the mean of its probability (the sequence-wise
  loss of DeepSeek-V3, https://arxiv.org/abs/2412.19437, eq. 17 to 20);
- ``z_loss_coef`` times the mean over tokens of ``logsumexp(logits)^2`` (ST-MoE,
  https://arxiv.org/abs/2202.08906, eq. 5).

Samples and tokens are those of the optimizer step. Padding has no part in either.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from peergrad.parallel.routing import Routed

if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # its router asks for it also where there is no engine


class Router(TopKRouter):
    """A softmax over all experts, of which the largest are taken; or those that are given."""

    routed: Routed | None = None  # of the micro-batch that is being computed

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(weights, whether it is chosen) ``[T, experts]`` of ``logits`` ``[T, 1, experts]``."""
        logits = logits.flatten(0, -2)
        told, learning = self.routed, self.training and torch.is_grad_enabled()
        if told is not None and learning:
            logits = self._with_z_loss(logits, told)
        weights, chosen = topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            router_replay=None if told is None else self._given(told),
        )
        if told is not None and learning:
            self._count(chosen, logits, told)
            weights = self._with_balance(weights, chosen, logits, told)
        return weights, chosen

    def _count(self, chosen: Tensor, logits: Tensor, told: Routed) -> None:
        layer, add = self.layer_number, told.tally.add
        add("load", layer, told.copies @ chosen.float())
        if told.chosen is not None:
            own = torch.zeros_like(chosen).scatter(1, logits.topk(self.topk).indices, True)
            add("given", layer, told.copies.sum())
            add("agreed", layer, told.copies @ ((own & chosen).sum(1) / self.topk))

    def _given(self, told: Routed) -> "Given | None":
        return None if told.chosen is None else Given(told.chosen[self.layer_number - 1].long())

    def _with_z_loss(self, logits: Tensor, told: Routed) -> Tensor:
        """The logits, whose gradient will have that of the loss."""
        if not told.coefficients.token:
            return logits
        loss = told.copies @ logits.float().logsumexp(-1).square()
        told.tally.add("z", self.layer_number, loss.detach())
        return _attach(logits, loss * told.coefficients.token)

    def _with_balance(
        self, weights: Tensor, chosen: Tensor, logits: Tensor, told: Routed
    ) -> Tensor:
        """The weights, whose gradient will have that of the loss. Each rank adds what its tokens
        bring to P; f is the same on all."""
        if not told.coefficients.sample:
            return weights
        counts = told.by_sample(chosen.float())
        if told.group.size() > 1:
            dist.all_reduce(counts, group=told.group)
        parts = counts / (told.lengths * self.topk).clamp(min=1)[:, None]
        means = told.by_sample(logits.float().softmax(-1)) / told.lengths.clamp(min=1)[:, None]
        loss = chosen.shape[1] * (parts * means).sum()
        told.tally.add("balance", self.layer_number, loss.detach())
        return _attach(weights, loss * told.coefficients.sample)


def _attach(carrier: Tensor, loss: Tensor) -> Tensor:
    carried: Tensor = MoEAuxLossAutoScaler.apply(carrier, loss)
    return carried


class Given:
    """Experts in place of the largest; in the form that Megatron asks for."""

    def __init__(self, chosen: Tensor) -> None:
        self.chosen = chosen  # [T, experts of a token] int64

    def get_replay_topk(self, scores: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return scores.gather(1, self.chosen), self.chosen


class ExpertLayer(MoELayer):
    """Megatron's, that is computed again with what its router was told at first."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.again = bool(self.moe_layer_recompute)  # type: ignore[has-type]
        self.moe_layer_recompute = False

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """``[T, 1, H]`` -> ``[T, 1, H]``, and no bias."""
        forward, router, told = super().forward, self.router, self.router.routed

        def compute(hidden: Tensor) -> Tensor:
            router.routed = told
            output: Tensor = forward(hidden)[0]
            return output

        if not self.again:
            return compute(hidden_states), None
        return tensor_parallel.checkpoint(compute, False, hidden_states), None


def use_experts(layer: ModuleSpec) -> None:
    """Have the layers of this spec of Megatron's, which is changed, choose experts as above."""
    parts = layer.submodules.mlp.submodules
    parts.router = Router

    class Experts(ExpertLayer):  # as a class: of a spec with another module Megatron warns
        def __init__(self, **options: Any) -> None:
            super().__init__(submodules=parts, **options)

    layer.submodules.mlp = Experts


def tell_router(
    layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A pre-hook of each layer: its router is told what the packed row says."""
    layer.mlp.router.routed = kwargs["packed_seq_params"].routed  # type: ignore[union-attr]
    return args, kwargs
