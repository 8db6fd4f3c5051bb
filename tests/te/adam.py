"""What an optimizer does to many tensors at once. ``chunk`` and ``noop`` are a GPU's."""

from collections.abc import Sequence

import torch
from torch import Tensor

Lists = Sequence[Sequence[Tensor]]


def multi_tensor_adam(
    chunk: int,
    noop: Tensor,
    lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    /,
) -> None:
    """AdamW (mode 1) or Adam (0) on (gradients, parameters, first, second moments)."""
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for grad, parameter, mean, square in zip(*lists, strict=True):
        grad, value = grad.float(), parameter.float()
        if not mode:
            grad = grad + weight_decay * value
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        move = (mean / first) / ((square / second).sqrt() + eps)
        if mode:
            move = move + weight_decay * value
        parameter.copy_(value - lr * move)


def multi_tensor_l2norm(
    chunk: int, noop: Tensor, lists: Lists, per_tensor: bool | None, /
) -> tuple[Tensor, Tensor]:
    """(norm of all ``[1]``, of each if so asked)."""
    norms = torch.stack([x.float().norm() for x in lists[0]])
    return norms.norm().view(1), norms if per_tensor else torch.empty(0)


def multi_tensor_scale(chunk: int, noop: Tensor, lists: Lists, scale: float, /) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)
