"""The loss of one micro-batch, put together from the pieces."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from peergrad.algo.kl import k3
from peergrad.algo.packing import MicroBatch
from peergrad.algo.surrogate import clipped_token_ratio

Metrics = dict[str, tuple[Tensor, int]]
"""Name -> (sum as a float64 scalar, count): both add up over micro-batches and ranks, and the mean
is taken at the end. Count 0 marks a quantity that is a sum itself. Left on the device: reading a
value here would stall the GPU once per micro-batch."""


@dataclass(frozen=True)
class Grpo:
    """GRPO (DeepSeekMath, arXiv:2402.03300, eq. 3): clipped token ratio plus ``kl_coef`` * k3.

    ``loss = sum_s weight_s * (surrogate_s + kl_coef * k3_s)``, ``weight`` from
    ``aggregate.token_weights``: a plain sum over everything an optimizer step sees.
    """

    clip_low: float
    clip_high: float
    kl_coef: float

    def __call__(
        self, logp: Float[Tensor, " S"], entropy: Float[Tensor, " S"], batch: MicroBatch
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """Loss (differentiable in ``logp``) and metrics of one micro-batch.

        Without ``batch.logp_old`` this is the only step on rollouts of the present weights: the old
        policy is the present one, its logprobs are this forward's own and the ratio is exactly 1.
        """
        logp_old = logp.detach() if batch.logp_old is None else batch.logp_old
        surrogate = clipped_token_ratio(
            logp, logp_old, batch.advantage, clip_low=self.clip_low, clip_high=self.clip_high
        )
        per_token = surrogate.loss
        count = per_token.numel()
        metrics: Metrics = {
            "loss/policy": (_total(per_token * batch.weight), 0),
            "policy/clip_low": (_total(surrogate.low), count),
            "policy/clip_high": (_total(surrogate.high), count),
            "policy/ratio": (_total((logp.detach() - logp_old).exp()), count),
            "policy/entropy": (_total(entropy), count),
        }
        if self.kl_coef > 0:
            assert batch.logp_ref is not None, "a KL coefficient needs reference logprobs"
            kl = k3(logp, batch.logp_ref)
            per_token = per_token + self.kl_coef * kl
            metrics["policy/kl"] = (_total(kl), count)
        loss = (per_token * batch.weight).sum()
        metrics["loss/total"] = (_total(loss), 0)
        return loss, metrics


def _total(values: Tensor) -> Tensor:
    return values.detach().sum(dtype=torch.float64)
