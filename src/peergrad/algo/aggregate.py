"""Aggregation: how per-token losses become one scalar.

All modes are linear, so each is a weight per token: ``loss = sum(weight * token_loss)``. The
weights are computed once per optimizer step from the lengths of *all* its rollouts. Whatever the
ranks and micro-batches, every token then counts the same, and a sum is all that is left to do.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from peergrad.config import Aggregation, Denominator


def token_weights(
    sampled: Int[Tensor, " B"],
    kept: Int[Tensor, " B"],
    group: Int[Tensor, " B"],
    *,
    mode: Aggregation,
    denominator: Denominator,
    max_tokens: int,
) -> Float[Tensor, " B"]:
    """Weight of every kept token of each rollout; float64.

    ``sampled[i]`` tokens were drawn, ``kept[i]`` of them take part in the loss; ``group[i]`` is the
    rollout's group. n_i is ``sampled[i]`` with ``denominator=all``, ``kept[i]`` with ``kept``. B
    and P count the rollouts and groups with any n_i > 0; N is the sum of all n_i, N_g of group g's.

    - ``seq_mean_token_mean``: ``1 / (B n_i)`` (DeepSeekMath, arXiv:2402.03300, eq. 3)
    - ``token_mean``: ``1 / N`` over the whole step (DAPO, arXiv:2503.14476, as released)
    - ``group_token_mean``: ``1 / (P N_g)`` (DAPO as printed)
    - ``seq_mean_token_sum``: ``1 / B``
    - ``token_sum_const``: ``1 / (B max_tokens)``, ``max_tokens`` the generation budget
      (Dr.GRPO, arXiv:2503.20783)

    A rollout of which nothing is kept has weight 0 and never divides by zero.
    """
    n = (sampled if denominator is Denominator.all else kept).double()
    counts = (n > 0).double()
    rollouts = counts.sum()
    if mode is Aggregation.seq_mean_token_mean:
        weights = 1 / (rollouts * n)
    elif mode is Aggregation.token_mean:
        weights = 1 / n.sum().expand_as(n)
    elif mode is Aggregation.group_token_mean:
        tokens = torch.bincount(group, n)
        groups = (torch.bincount(group, counts) > 0).sum()
        weights = 1 / (groups * tokens[group])
    elif mode is Aggregation.seq_mean_token_sum:
        weights = (1 / rollouts).expand_as(n)
    else:
        weights = (1 / (rollouts * max_tokens)).expand_as(n)
    return torch.where(kept > 0, weights, 0.0)
