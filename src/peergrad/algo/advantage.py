"""From rewards to advantages: each answer graded against its peers."""

import torch
from jaxtyping import Float
from torch import Tensor


def group_advantage(
    reward: Float[Tensor, " G"], *, scale_by_std: bool, eps: float
) -> Float[Tensor, " G"]:
    """Advantage of each rollout of one group, the same for all of its tokens.

    ``A_i = (r_i - mean(r)) / (std(r) + eps)`` with the unbiased (n - 1) standard deviation
    (DeepSeekMath, arXiv:2402.03300, section 4.1.2), or ``r_i - mean(r)`` without ``scale_by_std``
    (Dr.GRPO, arXiv:2503.20783). A group of equal rewards has nothing to teach: its advantages are
    exactly 0, not rounding noise divided by ``eps``.

    Example:
        rewards (1, 0, 0, 1): mean .5, std .57735, advantages (.866, -.866, -.866, .866).
    """
    if bool((reward == reward[0]).all()):
        return torch.zeros_like(reward)
    centred = reward - reward.mean()
    return centred / (reward.std(correction=1) + eps) if scale_by_std else centred
