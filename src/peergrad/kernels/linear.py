"""B: log probability, entropy and the loss's gradient from hidden states, head included.

``[R, V]`` never exists beyond a chunk of rows. ``fused_linear_grpo`` needs three matrix products:
the derivative of a GRPO loss is known as soon as the log probability is, so both gradients are
taken while the chunk's logits are still there. ``linear_logprob`` computes them a second time in
its backward pass (four products): for losses that need every token of a sequence first.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from peergrad.kernels.gradient import row_factors
from peergrad.kernels.head import Head, WeightGradient
from peergrad.kernels.shard import per_row

Derivative = Callable[[Tensor, Tensor, Tensor | slice], tuple[Tensor, Tensor, Tensor | None]]
"""(logp [r], entropy [r], their rows) -> (loss, dL/dlogp [r], dL/dentropy [r] or None), of a loss
that is a sum over rows."""


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, head: Head
    ) -> tuple[Tensor, Tensor]:
        rows, found = hidden.shape[0], []
        buffer = head.buffer(min(rows, head.chunk), head.dtype)
        for part in head.parts(rows):
            logits = head.project(hidden[part], buffer[: part.stop - part.start])
            found.append(
                head.stages.partials(
                    logits, targets[part], temperature[part], head.shard, entropy=True
                )
            )
        whole = head.shard.gather(torch.cat(found, 1))
        logp, entropy, saved = head.stages.merge(whole, targets, temperature)
        ctx.set_materialize_grads(False)
        ctx.head, ctx.weight = head, weight
        ctx.save_for_backward(hidden, targets, temperature, entropy, *saved)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, targets, temperature, entropy, *saved = ctx.saved_tensors
        head: Head = ctx.head
        gradient = WeightGradient(ctx.weight, needed=ctx.needs_input_grad[1])
        factors = row_factors(grads[0], grads[1], entropy, temperature, targets)
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        rows = (targets, temperature, *saved)
        buffer = head.buffer(min(hidden.shape[0], head.chunk), head.dtype)
        for part in head.parts(hidden.shape[0]):
            head.backward(
                head.project(hidden[part], buffer[: part.stop - part.start]),
                hidden[part],
                tuple(row[part] for row in rows),
                tuple(factor[part] for factor in factors),  # type: ignore[arg-type]
                entropy=grads[1] is not None,
                d_hidden=None if d_hidden is None else d_hidden[part],
                d_weight=gradient.total,
            )
        return d_hidden, gradient.for_autograd(), None, None, None


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: Tensor,
        head: Head,
        derivative: Derivative,
        wanted: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = hidden.shape[0]
        gradient = WeightGradient(weight, needed=wanted and ctx.needs_input_grad[1])
        d_hidden = torch.zeros_like(hidden) if wanted and ctx.needs_input_grad[0] else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        logp, entropy = hidden.new_empty(2, rows, dtype=torch.float32)
        buffer = head.buffer(min(rows, head.chunk), head.dtype)
        for part in head.parts(rows):
            y, tau = targets[part], temperature[part]
            logits = head.project(hidden[part], buffer[: part.stop - part.start])
            parts = head.stages.partials(logits, y, tau, head.shard, entropy=True)
            found = head.stages.merge(head.shard.gather(parts), y, tau)
            logp[part], entropy[part], saved = found
            chunk_loss, d_logp, d_entropy = derivative(logp[part], entropy[part], part)
            loss += chunk_loss
            if wanted:
                head.backward(
                    logits,
                    hidden[part],
                    (y, tau, *saved),
                    row_factors(d_logp, d_entropy, entropy[part], tau, y),
                    entropy=d_entropy is not None,
                    d_hidden=None if d_hidden is None else d_hidden[part],
                    d_weight=gradient.total,
                )
        ctx.mark_non_differentiable(logp, entropy)
        ctx.set_materialize_grads(False)
        ctx.d_hidden, ctx.d_weight, ctx.direct = d_hidden, gradient.for_autograd(), gradient.direct
        return loss, logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 7
        if ctx.direct:  # it is in main_grad already, as if the loss were what is minimised
            torch._assert_async(
                upstream == 1,
                "fused_linear_grpo: the loss must reach backward() unscaled; scale it in the "
                "derivative, or give the weight no main_grad",
            )
        scaled = [
            None if x is None else x * upstream.to(x.dtype) for x in (ctx.d_hidden, ctx.d_weight)
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
    logits: torch.dtype = torch.float32,
    plain: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log probability of ``targets`` and entropy under softmax(hidden @ weight.T / temperature).

    Under ``torch.no_grad`` this is the pass that scores with the old or the reference policy.

    Args:
        hidden: ``[R, H]``, the same on every rank of ``group``; its gradient here is this shard's
            part and must be summed over the group (Megatron's copy-to-region does).
        weight: ``[w, H]``, this rank's rows of the head, padding rows included. Its gradient is
            added to ``weight.main_grad`` if there is one.
        targets: ``[R]`` int64 ids below ``vocab_size``, the same on every rank; negative: ignored.
        group: ranks that share the vocabulary, in its order; None: all of it is here.
        vocab_size: real vocabulary; what lies behind is padding.
        temperature: positive; one for all, or ``[R]``. Divides the logits, as the engine does.
        chunk: rows whose logits exist at a time.
        logits: float32, or bfloat16 to round them as an engine with such a head does.
        plain: PyTorch where Triton would run.

    Returns:
        ``(logp [R], entropy [R])``, float32, differentiable both, equal on every rank of the group.
    """
    head = Head.of(weight, group, vocab_size, dtype=logits, chunk=chunk, plain=plain)
    rows = per_row(temperature, hidden)
    found: tuple[Tensor, Tensor] = _LinearLogprob.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets.contiguous(), rows, head
    )
    return found


def fused_linear_grpo(
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
    must be what ``backward()`` starts from; else both gradients are scaled by what flows in.

    Returns:
        ``(loss [], logp [R], entropy [R])``, float32; only the loss is differentiable, by
        ``hidden`` and ``weight``.
    """
    rows, kept = targets.numel(), (targets >= 0).nonzero()[:, 0]
    tau = per_row(temperature, hidden)
    whole = kept.numel() == rows
    if not whole:
        hidden, targets, tau = hidden.index_select(0, kept), targets[kept], tau[kept]

    def of_kept(logp: Tensor, entropy: Tensor, part: Tensor | slice) -> Any:
        return derivative(logp, entropy, kept[part])

    head = Head.of(weight, group, vocab_size, dtype=logits, chunk=chunk, plain=plain)
    given = derivative if whole else of_kept
    # Asked here: inside, gradients are always off.
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss, *scores = _FusedLinear.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets.contiguous(), tau, head, given, wanted
    )
    if not whole:
        scores = [x.new_zeros(rows).index_copy(0, kept, x) for x in scores]
    return loss, scores[0], scores[1]
