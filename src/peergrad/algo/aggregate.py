"""Aggregation: how per-token losses become one scalar.

All four modes are linear, so each is a weight per token: ``loss = sum(weight * token_loss)``. The
weights are computed once per optimizer step from the lengths of *all* its rollouts. Whatever the
ranks and micro-batches, every token then counts the same, and a sum is all that is left to do.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from peergrad.config import Aggregation


def token_weights(
    lengths: Int[Tensor, " B"], *, mode: Aggregation, max_tokens: int
) -> Float[Tensor, " B"]:
    """Weight of every scored token of each rollout; float64.

    ``lengths[i]`` is the number of scored tokens n_i of rollout i, ``B`` the number of rollouts of
    the step (those without scored tokens included), N the sum of all n_i:

    - ``seq_mean_token_mean``: ``1 / (B n_i)`` (DeepSeekMath, arXiv:2402.03300, eq. 3)
    - ``token_mean``: ``1 / N`` over the whole step (DAPO, arXiv:2503.14476, as released)
    - ``seq_mean_token_sum``: ``1 / B``
    - ``token_sum_const``: ``1 / (B max_tokens)``, ``max_tokens`` the generation budget
      (Dr.GRPO, arXiv:2503.20783)

    A rollout without scored tokens has weight 0 and never divides by zero.
    """
    rollouts = lengths.numel()
    n = lengths.to(torch.float64)
    if mode is Aggregation.seq_mean_token_mean:
        weights = 1.0 / (rollouts * n)
    elif mode is Aggregation.token_mean:
        weights = 1.0 / n.sum().expand_as(n)
    elif mode is Aggregation.seq_mean_token_sum:
        weights = torch.full_like(n, 1.0 / rollouts)
    else:
        weights = torch.full_like(n, 1.0 / (rollouts * max_tokens))
    return torch.where(lengths > 0, weights, 0.0)
