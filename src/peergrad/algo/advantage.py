"""From rewards to advantages: each answer graded against its peers.

Groups, batches and tokens are told apart by an index per element, never by position: ``of[i]`` is
the set that element i belongs to. All results are float64.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from peergrad.algo.shaping import Moments
from peergrad.grades import ROUNDING, tolerance


def group_mean(value: Float[Tensor, " N"], of: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Mean of the set of each element."""
    count = torch.bincount(of).double()
    total = torch.zeros_like(count).index_add_(0, of, value.double())
    return (total / count)[of]


def leave_one_out_mean(value: Float[Tensor, " N"], of: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Mean of the *others* in the set of each element; its own value if there are none.

    Subtracted, it is the baseline of RLOO (Kool et al. 2019; arXiv:2402.14740).

    Example:
        (1, 0, 0) in one set: (0, .5, .5).
    """
    count = torch.bincount(of).double()[of]
    others = (group_mean(value, of) * count - value.double()) / (count - 1).clamp(min=1)
    return torch.where(count > 1, others, value.double())


def group_std(
    value: Float[Tensor, " N"], of: Int[Tensor, " N"], *, unbiased: bool
) -> Float[Tensor, " N"]:
    """Standard deviation of the set of each element, over n - 1 if ``unbiased``; 0 for one."""
    count = torch.bincount(of).double()[of]
    mean_square = group_mean((value.double() - group_mean(value, of)) ** 2, of)
    return (mean_square * count / (count - int(unbiased)).clamp(min=1)).sqrt()


def is_flat(value: Float[Tensor, " N"], of: Int[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """Whether all values of the set of each element are equal, but for rounding: the noise in sums
    of rewards, divided by its own standard deviation, would be an advantage of 1."""
    sets = int(of.max()) + 1 if of.numel() else 0
    wide = value.double()
    least = wide.new_full((sets,), torch.inf).scatter_reduce_(0, of, wide, "amin")
    most = wide.new_full((sets,), -torch.inf).scatter_reduce_(0, of, wide, "amax")
    size = torch.maximum(least.abs(), most.abs()).clamp(min=1)
    return (most - least <= ROUNDING * size)[of]


def centre(
    value: Float[Tensor, " N"], of: Int[Tensor, " N"], *, leave_one_out: bool = False
) -> Float[Tensor, " N"]:
    """``x - mean`` over the set of each element (Dr.GRPO's advantage, arXiv:2503.20783, if the set
    is the group), or over the others in it; exactly 0 where all are equal."""
    mean = leave_one_out_mean(value, of) if leave_one_out else group_mean(value, of)
    return torch.where(is_flat(value, of), 0.0, value.double() - mean)


def divide_by_std(
    centred: Float[Tensor, " N"],
    value: Float[Tensor, " N"],
    of: Int[Tensor, " N"],
    *,
    unbiased: bool,
    eps: float,
) -> Float[Tensor, " N"]:
    """``centred / (std(value) + eps)`` with the standard deviation over the set of each element.

    After ``centre`` over the same set it is DeepSeekMath's advantage (arXiv:2402.03300, section
    4.1.2). A set of equal values has nothing to teach: exactly 0, not noise divided by ``eps``.

    Example:
        rewards (1, 0, 0, 1): mean .5, std .57735, advantages (.866, -.866, -.866, .866).
    """
    std = group_std(value, of, unbiased=unbiased)
    return torch.where(is_flat(value, of), 0.0, centred / (std + eps))


def running_centre(value: Float[Tensor, " N"], moments: Moments) -> Float[Tensor, " N"]:
    """``x - mean`` with the mean of all rewards of the run so far, these included."""
    return value.double() - moments.mean


def running_divide(
    centred: Float[Tensor, " N"], moments: Moments, *, unbiased: bool, eps: float
) -> Float[Tensor, " N"]:
    """``centred / (std + eps)`` with the standard deviation of the run so far; 0 if that is 0, but
    for rounding."""
    std = moments.std(unbiased=unbiased)
    return centred / (std + eps) if std > tolerance(moments.mean) else torch.zeros_like(centred)


def clip_advantage(advantage: Float[Tensor, " N"], bound: float) -> Float[Tensor, " N"]:
    """Held within plus and minus ``bound``."""
    return advantage.clamp(-bound, bound)
