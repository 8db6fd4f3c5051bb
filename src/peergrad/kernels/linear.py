"""B: log probability, entropy and the loss's gradient from hidden states, head included.

``[R, V]`` never exists beyond a chunk of rows. ``fused_linear_loss`` needs three matrix products:
the derivative of a loss whose rows do not depend on each other is known as soon as the log
probability is, so both gradients are taken while the chunk's logits are still there.
``linear_logprob`` computes them a second time in its backward pass (four products): for losses that
need every token of a sequence first.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import disable_saved_tensors_hooks

from peergrad.kernels.gradient import Scores
from peergrad.kernels.inputs import check_derivative, check_projection, check_rows
from peergrad.kernels.projection import Pass, Projection, WeightGradient, adds_directly

Derivative = Callable[[Tensor, Tensor, Tensor | slice], tuple[Tensor, Tensor, Tensor | None]]
"""(logp [r], entropy [r], their rows) -> (loss, dL/dlogp [r], dL/dentropy [r] or None), of a loss
that is a sum over rows."""


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: Tensor,
        projection: Projection,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        stages, shard = projection.stages, projection.shard
        run = Pass(projection, len(hidden), gradient=False)
        sums = []
        for chunk in projection.chunks(len(hidden)):
            rows = run.project(hidden[chunk]), targets[chunk], temperature[chunk]
            sums.append(stages.partials(*rows, shard, entropy=with_entropy))
        whole = shard.gather(torch.cat(sums, 1))
        logp, entropy, saved = stages.merge(whole, targets, temperature)
        ctx.set_materialize_grads(False)
        ctx.projection, ctx.weight = projection, weight
        ctx.save_for_backward(hidden, targets, temperature, entropy, *saved)
        return logp, entropy if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, targets, temperature, entropy, m, log2d = ctx.saved_tensors
        gradient = WeightGradient(ctx.weight, needed=ctx.needs_input_grad[1])
        d_logp = torch.zeros_like(entropy) if grads[0] is None else grads[0].contiguous()
        d_entropy = None if grads[1] is None else grads[1].contiguous()
        scores = Scores(targets, temperature, m, log2d, entropy, d_logp, d_entropy)
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        run = Pass(ctx.projection, len(hidden), gradient=True)
        for chunk in ctx.projection.chunks(len(hidden)):
            run.backward(
                run.project(hidden[chunk]),
                hidden[chunk],
                scores.at(chunk),
                d_hidden=None if d_hidden is None else d_hidden[chunk],
                d_weight=gradient.total,
            )
        run.finish()
        return d_hidden, gradient.for_autograd(), None, None, None, None


class _FusedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: Tensor,
        projection: Projection,
        derivative: Derivative,
        wanted: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        stages, shard, rows = projection.stages, projection.shard, hidden.shape[0]
        gradient = WeightGradient(weight, needed=wanted and ctx.needs_input_grad[1])
        d_hidden = torch.zeros_like(hidden) if wanted and ctx.needs_input_grad[0] else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        logp, entropy = hidden.new_empty(2, rows, dtype=torch.float32)
        run = Pass(projection, rows, gradient=wanted)
        for chunk in projection.chunks(rows):
            y, tau = targets[chunk], temperature[chunk]
            logits = run.project(hidden[chunk])
            sums = shard.gather(stages.partials(logits, y, tau, shard, entropy=True))
            logp[chunk], entropy[chunk], (m, log2d) = stages.merge(sums, y, tau)
            found = derivative(logp[chunk], entropy[chunk], chunk)
            chunk_loss, d_logp, d_entropy = check_derivative(found, len(y))
            loss += chunk_loss
            if wanted:
                run.backward(
                    logits,
                    hidden[chunk],
                    Scores(y, tau, m, log2d, entropy[chunk], d_logp, d_entropy),
                    d_hidden=None if d_hidden is None else d_hidden[chunk],
                    d_weight=gradient.total,
                )
        run.finish()
        ctx.mark_non_differentiable(logp, entropy)
        ctx.set_materialize_grads(False)
        ctx.d_hidden, ctx.d_weight, ctx.direct = d_hidden, gradient.for_autograd(), gradient.direct
        ctx.spent = False
        return loss, logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 7
        if ctx.direct:  # it is in main_grad already, as if the loss were what is minimised
            if ctx.spent:
                raise RuntimeError(
                    "fused_linear_loss: main_grad holds the gradient of one backward pass; call it "
                    "again, or give the weight no main_grad, to differentiate twice"
                )
            ctx.spent = True
            torch._assert_async(
                upstream == 1,
                "fused_linear_loss: the loss must reach backward() unscaled; scale it in the "
                "derivative, or give the weight no main_grad",
            )
        scaled = [
            # in float32: a scale of 1000.5 is none in bfloat16
            None if x is None else (x.float() * upstream).to(x.dtype)
            for x in (ctx.d_hidden, ctx.d_weight)
        ]
        return *scaled, None, None, None, None, None


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float | Tensor,
    chunk: int,
    with_entropy: bool,
    logits: torch.dtype = torch.float32,
    plain: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log probability of ``targets`` and entropy under softmax(hidden @ weight.T / temperature).

    Under ``torch.no_grad`` this is the pass that scores with the old or the reference policy.

    Args:
        hidden: ``[R, H]``, the same on every rank of ``group``; so is its gradient, which is added
            up over the ranks in the backward pass, while that of the head is computed.
        weight: ``[w, H]``, this rank's rows of the head, padding rows included. Its gradient is
            added to ``weight.main_grad`` if there is one.
        targets: ``[R]`` int64 ids below ``vocab_size``, the same on every rank; negative: ignored.
        group: ranks that share the vocabulary, in its order; None: all of it is here.
        vocab_size: real vocabulary; what lies behind is padding.
        temperature: positive; one for all, or ``[R]``. Divides the logits, as the engine does.
        chunk: rows whose logits exist at a time, see ``rows_that_fit``.
        with_entropy: whether to compute it.
        logits: float32, or bfloat16 to round them as an engine with such a head does.
        plain: PyTorch where Triton would run.

    Returns:
        ``(logp [R], entropy [R] or None)``, float32, differentiable both, equal on every rank of
        the group. The bits of logp do not depend on ``with_entropy``.
    """
    projection = _projection(hidden, weight, group, vocab_size, logits, chunk, plain=plain)
    targets, tau = check_rows(
        targets, temperature, hidden, vocab=vocab_size, columns=projection.shard.all_columns
    )
    found: tuple[Tensor, Tensor | None] = _LinearLogprob.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, tau, projection, with_entropy
    )
    return found


def fused_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    derivative: Derivative,
    *,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float | Tensor,
    chunk: int,
    logits: torch.dtype = torch.float32,
    plain: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, log probability and entropy, with the gradient of the loss already taken.

    Arguments as for ``linear_logprob``. ``derivative`` is called once per chunk, in order, and
    gives the chunk's part of the loss with its derivatives by logp and entropy. Ignored rows are
    never projected; rows whose derivatives are 0 take part in the first of the three products only.

    If the weight has a ``main_grad``, its gradient is added there during this call, so the loss
    must be what ``backward()`` starts from, once, and no checkpoint may repeat the call; else both
    gradients are scaled by what flows in.

    Returns:
        ``(loss [], logp [R], entropy [R])``, float32; only the loss is differentiable, by
        ``hidden`` and ``weight``.
    """
    projection = _projection(hidden, weight, group, vocab_size, logits, chunk, plain=plain)
    targets, tau = check_rows(
        targets, temperature, hidden, vocab=vocab_size, columns=projection.shard.all_columns
    )
    # Asked here: inside, gradients are always off.
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if wanted and adds_directly(weight):
        _refuse_recomputation()
    rows, kept = targets.numel(), (targets >= 0).nonzero()[:, 0]
    whole = kept.numel() == rows
    if not whole:
        hidden, targets, tau = hidden.index_select(0, kept), targets[kept], tau[kept]

    def of_kept(logp: Tensor, entropy: Tensor, part: Tensor | slice) -> Any:
        return derivative(logp, entropy, kept[part])

    loss, *scores = _FusedLinearLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, tau, projection, derivative if whole else of_kept, wanted
    )
    if not whole:
        scores = [x.new_zeros(rows).index_copy(0, kept, x) for x in scores]
    return loss, scores[0], scores[1]


def _projection(
    hidden: Tensor,
    weight: Tensor,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    logits: torch.dtype,
    chunk: int,
    *,
    plain: bool,
) -> Projection:
    check_projection(hidden, weight, logits, chunk)
    return Projection.of(weight, group, vocab_size, dtype=logits, chunk=chunk, plain=plain)


def _refuse_recomputation() -> None:
    """ValueError where what is saved is not kept but made again, by a second call of the forward
    pass: a checkpoint that is not reentrant. It would add to ``main_grad`` twice.

    One that is reentrant takes no gradient in its first call, and none is refused.
    """
    message = (
        "fused_linear_loss inside torch.utils.checkpoint(use_reentrant=False), or saved_tensors_"
        "hooks: the weight's gradient is added to its main_grad in the forward pass, which would "
        "run twice; call it outside, or use linear_logprob"
    )
    try:
        with disable_saved_tensors_hooks(message):
            pass
    except RuntimeError as error:
        raise ValueError(message) from error
