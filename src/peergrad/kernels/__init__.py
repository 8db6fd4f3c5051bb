"""Log probability and entropy of given tokens, forward and backward, in as few passes as it takes.

``vocab_parallel_logprob`` starts from logits, ``linear_logprob`` from hidden states, and
``fused_linear_loss`` takes the gradient of the loss on the way. README.md: derivation, counts, when
to use which.
"""

from peergrad.kernels.backend import triton_runs
from peergrad.kernels.chunk import rows_that_fit
from peergrad.kernels.linear import Derivative, fused_linear_loss, linear_logprob
from peergrad.kernels.logits import linear_logits, vocab_parallel_logprob

__all__ = [
    "Derivative",
    "fused_linear_loss",
    "linear_logits",
    "linear_logprob",
    "rows_that_fit",
    "triton_runs",
    "vocab_parallel_logprob",
]
