"""The norm of the ``torch`` spec: it knows sequence parallel, which Megatron's torch norm refuses,
and takes few passes over memory on a CPU."""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMSNorm with Megatron's constructor and its mark for sequence parallelism."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # finalize_model_grads sums the gradients of marked weights over the tensor ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """``x / rms(x) * weight`` over the last dimension."""
        if x.is_cuda or x.dtype != self.weight.dtype or x.dtype not in EXACT:
            return super().forward(x)  # fused on a GPU, rounded in one place in bfloat16
        normed: Tensor = _Norm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return normed


EXACT = (torch.float32, torch.float64)


class _Norm(torch.autograd.Function):
    """With r = 1 / rms(x), n = x r and gradient g: y = n w, dx = r (g w - n mean(g w n)) and
    dw = sum(g n). On a CPU PyTorch composes its own of elementwise operations, whose gradient
    takes three times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        inverse = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, weight)
        scaled: Tensor = normed * weight
        return scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, inverse, weight = ctx.saved_tensors
        product = (grads[0] * normed).view(-1, weight.numel())
        mean = (product @ weight).div_(weight.numel()).view_as(inverse)
        d_x = (grads[0] * weight).addcmul_(normed, mean, value=-1).mul_(inverse)
        return d_x, product.sum(0), None
