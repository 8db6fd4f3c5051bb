"""Softmax of attention in bfloat16, which is one kernel where the lengths allow it."""

from torch import Tensor

MASKED = -10000.0


def scaled_masked_softmax_forward(inputs: Tensor, mask: Tensor, scale: float, /) -> Tensor:
    """``[b, heads, queries, keys]`` of the scaled scores; 0 where the ``mask`` ``[b or 1, 1,
    queries, keys]`` is true of every key."""
    scores = (inputs.float() * float(scale)).masked_fill(mask.bool(), MASKED)
    found = scores.softmax(-1).masked_fill(mask.bool().all(-1, keepdim=True), 0)
    return found.to(inputs.dtype)


def scaled_masked_softmax_backward(grads: Tensor, results: Tensor, scale: float, /) -> Tensor:
    """Of the scores."""
    upper, probs = grads.float(), results.float()
    inner = upper * probs
    return (float(scale) * (inner - probs * inner.sum(-1, keepdim=True))).to(grads.dtype)
