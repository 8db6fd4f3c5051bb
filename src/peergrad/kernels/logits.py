"""A: log probability and entropy from logits that exist, gradient over the logits themselves."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from peergrad.kernels.backend import stages
from peergrad.kernels.gradient import Scores
from peergrad.kernels.inputs import check_logits, check_projection, check_rows
from peergrad.kernels.products import add_product, multiply
from peergrad.kernels.projection import Projection, WeightGradient
from peergrad.kernels.shard import Shard


class _VocabParallelLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperature: Tensor,
        shard: Shard,
        entropy: bool,
        inplace: bool,
        plain: bool,
    ) -> tuple[Tensor, Tensor | None]:
        run = ctx.stages = stages(logits.device, plain=plain)
        sums = run.partials(logits, targets, temperature, shard, entropy=entropy)
        logp, h, saved = run.merge(shard.gather(sums), targets, temperature)
        ctx.set_materialize_grads(False)
        ctx.shard, ctx.inplace, ctx.spent = shard, inplace, False
        ctx.save_for_backward(logits, targets, temperature, h, *saved)
        return logp, h if entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        d_logp, d_entropy = grads
        if ctx.spent:
            raise RuntimeError(
                "vocab_parallel_logprob(inplace=True): the logits were overwritten by the first "
                "backward pass; pass inplace=False to differentiate twice"
            )
        logits, targets, temperature, entropy, m, log2d = ctx.saved_tensors
        ctx.spent = ctx.inplace
        d_logp = torch.zeros_like(entropy) if d_logp is None else d_logp.contiguous()
        d_entropy = None if d_entropy is None else d_entropy.contiguous()
        scores = Scores(targets, temperature, m, log2d, entropy, d_logp, d_entropy)
        out = logits.detach() if ctx.inplace else torch.empty_like(logits)
        ctx.stages.dlogits(logits.detach(), scores, ctx.shard, out=out)
        if ctx.inplace:  # whoever else saved the logits is to be told: a kernel does not
            increment_version(logits)
        return out, None, None, None, None, None, None


class _LinearLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, projection: Projection) -> Tensor:
        ctx.projection, ctx.weight = projection, weight
        ctx.save_for_backward(hidden)
        out = projection.buffer(hidden.shape[0], projection.dtype)
        return multiply(hidden, projection.weight.t(), out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logits: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,), weight = ctx.saved_tensors, ctx.projection.weight
        gradient = WeightGradient(ctx.weight, needed=ctx.needs_input_grad[1])
        d_logits = d_logits.to(weight.dtype)
        if gradient.total is not None:
            add_product(gradient.total, d_logits.t(), hidden)
        d_hidden = None
        if ctx.needs_input_grad[0]:
            d_hidden = multiply(d_logits, weight, torch.empty_like(hidden))
        return d_hidden, gradient.for_autograd(), None


def linear_logits(hidden: Tensor, weight: Tensor, *, dtype: torch.dtype) -> Tensor:
    """``hidden @ weight.T`` ``[R, w]``, accumulated in float32 and rounded to ``dtype`` (float32 or
    that of the weight).

    Differentiable; the weight's gradient is added to its ``main_grad`` if there is one.
    """
    check_projection(hidden, weight, dtype, 1)
    made = Projection.of(weight, None, weight.shape[0], dtype=dtype, chunk=1, plain=True)
    found: Tensor = _LinearLogits.apply(hidden, weight, made)  # type: ignore[no-untyped-call]
    return found


def vocab_parallel_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None,
    temperature: float | Tensor,
    valid_vocab: int,
    with_entropy: bool,
    inplace: bool = False,
    plain: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log probability of ``targets`` and entropy under ``softmax(logits / temperature)``.

    Reads the logits once forward, once backward, and keeps 16 bytes per row.

    Args:
        logits: ``[R, w]`` float32, bfloat16 or float16, this rank's columns of a vocabulary padded
            to ``w`` times the ranks.
        targets: ``[R]`` int64 ids, the same on every rank; negative: the row is ignored.
        group: ranks that share the vocabulary, in its order; None: all of it is here.
        temperature: positive; one for all, or ``[R]``.
        valid_vocab: real columns of the whole vocabulary; those behind are padding.
        with_entropy: whether to compute it.
        inplace: overwrite ``logits`` with their gradient in the backward pass, once; whatever made
            them must not need them then (a product does not, a soft cap does).
        plain: PyTorch where Triton would run.

    Returns:
        ``(logp [R], entropy [R] or None)``, float32, 0 for ignored rows; differentiable both,
        together or alone. Bit-equal on every rank, and for every number of ranks that divides 8 if
        64 divides the padded vocabulary.

    Raises:
        ValueError: for other shapes, dtypes and layouts, and for targets beyond the vocabulary;
            on a GPU these last fail an assertion there.
    """
    check_logits(logits, inplace=inplace)
    shard = Shard.of(group, logits.shape[1], valid_vocab)
    targets, rows = check_rows(
        targets, temperature, logits, vocab=valid_vocab, columns=shard.all_columns
    )
    found: tuple[Tensor, Tensor | None] = _VocabParallelLogprob.apply(  # type: ignore[no-untyped-call]
        logits, targets, rows, shard, with_entropy, inplace, plain
    )
    return found
