"""Log probability and entropy of given tokens under a vocabulary-parallel head.

Logits exist for one chunk of rows at a time and are never gathered: each tensor rank reduces its
shard to four numbers per row and two small all-reduces merge them. The backward pass computes the
chunk's logits again, so nothing of size ``[S, V]`` is kept.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _LinearLogprob(torch.autograd.Function):
    """S rows, H hidden, V this rank's real vocabulary columns.

    With x = logits / temperature, Z = sum exp x, p = exp(x - log Z), target y:
      logp = x_y - log Z,                 d logp / dx_j = [j = y] - p_j
      H = log Z - sum_j p_j x_j,          d H / dx_j = -p_j (x_j - log Z + H)
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        group: dist.ProcessGroup,
        first: int,
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.first, ctx.temperature, ctx.chunk = first, temperature, chunk
        rows = hidden.shape[0]
        logp, log_z, entropy = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(3))
        for part in _parts(rows, chunk):
            x = _logits(hidden[part], weight, temperature)
            logp[part], log_z[part], entropy[part] = _reduce(x, targets[part] - first, group)
        ctx.save_for_backward(hidden, weight, targets, log_z, entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        d_logp, d_entropy = grads
        hidden, weight, targets, log_z, entropy = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        for part in _parts(hidden.shape[0], ctx.chunk):
            log_p = _logits(hidden[part], weight, ctx.temperature) - log_z[part, None]
            p = log_p.exp()
            dx = torch.zeros_like(p)
            if d_entropy is not None:
                dx -= d_entropy[part, None] * p * (log_p + entropy[part, None])
            if d_logp is not None:
                dx -= d_logp[part, None] * p
                column, mine = _local(targets[part] - ctx.first, weight.shape[0])
                if weight.shape[0]:
                    dx.scatter_add_(1, column[:, None], (d_logp[part] * mine)[:, None])
            dx = (dx / ctx.temperature).to(weight.dtype)
            d_hidden[part] = dx @ weight
            d_weight += _matmul(dx.t(), hidden[part])
        return d_hidden, d_weight.to(weight.dtype), None, None, None, None, None


def _parts(rows: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, rows, chunk)]


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product with a float32 result: bfloat16 logits alone would put 2 % noise on ratios."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return _matmul(hidden, weight.t()) / temperature


def _local(column: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Column clamped into this shard, and whether it lies in it."""
    return column.clamp(0, max(width - 1, 0)), (column >= 0) & (column < width)


def _reduce(x: Tensor, column: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, log Z, entropy) of one chunk from this rank's shard ``x`` of the scaled logits."""
    width = x.shape[1]
    # A shard may hold nothing but padding columns.
    peak = x.amax(1) if width else x.new_full((x.shape[0],), -torch.inf)
    if group.size() > 1:
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    x = x - peak[:, None]
    e = x.exp()
    column, mine = _local(column, width)
    target = x.gather(1, column[:, None])[:, 0] if width else torch.zeros_like(peak)
    # 0 * -inf is NaN: a column of probability 0 adds nothing to sum p x.
    sums = torch.stack(
        [e.sum(1), torch.where(e > 0, e * x, 0.0).sum(1), torch.where(mine, target, 0.0)]
    )
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    z, weighted, target = sums
    log_z = z.log()
    return target - log_z, peak + log_z, log_z - weighted / z


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup,
    vocab_size: int,
    temperature: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Log probability of ``targets`` and entropy under ``softmax(hidden @ weight.T /
    temperature)``.

    Args:
        hidden: ``[S, H]``, the same on every rank of ``group``; its gradient here is this shard's
            part and must be summed over the group (Megatron's copy-to-region does).
        weight: ``[Vp / ranks, H]``, this rank's rows of the head, padding rows included.
        targets: ``[S]`` int64 token ids, all below ``vocab_size``.
        vocab_size: real vocabulary; rows of the head beyond it are left out.
        temperature: divides the logits, as the rollout engine does.
        chunk: rows whose logits exist at a time.

    Returns:
        ``(logp [S], entropy [S])``, float32, differentiable both, equal on every rank of the group.
    """
    first = group.rank() * weight.shape[0]
    width = max(0, min(weight.shape[0], vocab_size - first))
    real = weight if width == weight.shape[0] else weight[:width]  # a slice's backward copies
    result: tuple[Tensor, Tensor] = _LinearLogprob.apply(  # type: ignore[no-untyped-call]
        hidden, real, targets, group, first, temperature, chunk
    )
    return result
