"""The output projection of a chunk of rows, and the gradients through it."""

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from peergrad.kernels.backend import stages
from peergrad.kernels.gradient import active_first
from peergrad.kernels.shard import Shard

Factors = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Head:
    """One rank's rows of the projection and how its logits are made. H hidden, w columns."""

    weight: Tensor  # [w, H]
    shard: Shard
    stages: ModuleType  # reference or triton
    dtype: torch.dtype  # of logits
    chunk: int  # rows whose logits exist at a time

    @staticmethod
    def of(
        weight: Tensor,
        group: dist.ProcessGroup | None,
        vocab_size: int,
        *,
        dtype: torch.dtype,
        chunk: int,
        plain: bool,
    ) -> "Head":
        shard = Shard.of(group, weight.shape[0], vocab_size)
        implementation = stages(weight.device, plain=plain)
        return Head(weight.detach(), shard, implementation, dtype, chunk)

    def parts(self, rows: int) -> list[slice]:
        """Chunks of the rows; one empty chunk if there are none."""
        return [slice(i, min(i + self.chunk, rows)) for i in range(0, max(rows, 1), self.chunk)]

    def buffer(self, rows: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised ``[rows, w]``, each row on a multiple of 16 elements: kernels then load 16
        bytes at a time, whatever the vocabulary.

        What lies between the rows is 0: oneDNN's bfloat16 product reads it, and 0 times NaN is NaN.
        """
        width = self.shard.width
        whole = self.weight.new_empty(rows, -(-width // 16) * 16, dtype=dtype)
        whole[:, width:] = 0
        return whole[:, :width]

    def project(self, hidden: Tensor, out: Tensor) -> Tensor:
        """``hidden @ weight.T`` into ``out``, accumulated in float32 and rounded to its dtype."""
        right = self.weight.t()
        if out.dtype == hidden.dtype:
            return torch.mm(hidden, right, out=out)
        if hidden.is_cuda:
            return torch.mm(hidden, right, out_dtype=out.dtype, out=out)
        return out.copy_(hidden.float() @ right.float())

    def backward(
        self,
        logits: Tensor,
        hidden: Tensor,
        rows: tuple[Tensor, Tensor, Tensor, Tensor],
        factors: Factors,
        *,
        entropy: bool,
        d_hidden: Tensor | None,
        d_weight: Tensor | None,
    ) -> None:
        """Gradients of a chunk: ``d_hidden`` ``[R, H]`` (zeros before) is written, float32
        ``d_weight`` ``[w, H]`` added to. ``rows`` is (targets, temperature, max, log2 d).

        ``logits`` are overwritten. Rows whose factors are all 0 take part in neither product.
        """
        active = torch.stack(factors).ne(0).any(0)
        source = active_first(active)
        count = source.numel()
        if not count:
            return
        if count < active.numel():
            rows = tuple(row[source] for row in rows)  # type: ignore[assignment]
            factors = tuple(factor[source] for factor in factors)  # type: ignore[assignment]
            hidden = hidden.index_select(0, source)
        same = logits.dtype == self.weight.dtype
        out = logits[:count] if same else self.buffer(count, self.weight.dtype)
        targets, temperature, peak, log2d = rows
        self.stages.dlogits(
            logits,
            targets,
            temperature,
            (peak, log2d),
            factors,
            self.shard,
            out=out,
            source=source if count < active.numel() else None,
            entropy=entropy,
        )
        if d_hidden is not None and count == active.numel():
            torch.mm(out, self.weight, out=d_hidden)
        elif d_hidden is not None:
            d_hidden.index_copy_(0, source, out @ self.weight)
        if d_weight is not None:
            add_outer(d_weight, out, hidden)


def add_outer(total: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """``total += d_logits.T @ hidden`` in one product; ``total`` ``[w, H]`` is float32."""
    left = d_logits.t()
    if total.is_cuda and left.dtype != torch.float32:
        torch.addmm(total, left, hidden, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, left.float(), hidden.float(), out=total)


class WeightGradient:
    """Where the head's gradient is added up in one pass, in float32: Megatron's ``main_grad`` of
    the parameter, where it has one, and autograd is then given none; a new buffer elsewhere."""

    def __init__(self, weight: Tensor, *, needed: bool) -> None:
        main: Tensor | None = getattr(weight, "main_grad", None)
        self.direct = needed and main is not None and main.dtype == torch.float32
        self.dtype = weight.dtype
        self.total: Tensor | None = None  # [w, H] float32, if any is asked for
        if needed:
            self.total = main if self.direct else torch.zeros_like(weight, dtype=torch.float32)

    def for_autograd(self) -> Tensor | None:
        """In the parameter's dtype; None if it went elsewhere or none is asked for."""
        return None if self.direct or self.total is None else self.total.to(self.dtype)
