"""The output projection of a chunk of rows, and the gradients through it."""

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from peergrad.kernels.backend import stages
from peergrad.kernels.chunk import COLUMNS
from peergrad.kernels.gradient import ActiveRows, Scores
from peergrad.kernels.products import add_product, multiply
from peergrad.kernels.shard import Shard


@dataclass(frozen=True)
class Projection:
    """One rank's rows of the projection and how its logits are made. H hidden, w columns."""

    weight: Tensor  # [w, H]
    shard: Shard
    stages: ModuleType  # reference or triton_stages
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
    ) -> "Projection":
        shard = Shard.of(group, weight.shape[0], vocab_size)
        return Projection(weight.detach(), shard, stages(weight.device, plain=plain), dtype, chunk)

    def chunks(self, rows: int) -> list[slice]:
        """One empty chunk if there are no rows."""
        return [slice(i, min(i + self.chunk, rows)) for i in range(0, max(rows, 1), self.chunk)]

    def buffer(self, rows: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised ``[rows, w]``, each row on a multiple of 16 elements (``COLUMNS``): kernels
        then load 16 bytes at a time, whatever the vocabulary.

        What lies between the rows is 0: oneDNN's bfloat16 product reads it, and 0 times NaN is NaN.
        """
        width = self.shard.width
        whole = self.weight.new_empty(rows, -(-width // COLUMNS) * COLUMNS, dtype=dtype)
        whole[:, width:] = 0
        return whole[:, :width]


class Pass:
    """One way through all chunks of a projection, and the memory for a chunk.

    That is allocated once: sizes that depend on data would fragment the device's memory. A CPU has
    no products of bfloat16 worth the name: there the weight is widened once, and gradients of
    logits stay float32. ``chunk.row_bytes`` counts these buffers.
    """

    def __init__(self, projection: Projection, rows: int, *, gradient: bool) -> None:
        self.projection, self.active = projection, ActiveRows()
        self.sums: list[dist.Work] = []
        weight, rows = projection.weight, min(rows, projection.chunk)
        self.weight = weight if weight.is_cuda else weight.float()
        self.logits = projection.buffer(rows, projection.dtype)
        if gradient:
            same = projection.dtype == self.weight.dtype
            self.d_logits = self.logits if same else projection.buffer(rows, self.weight.dtype)
            self.states = weight.new_empty(rows, weight.shape[1])

    def project(self, hidden: Tensor) -> Tensor:
        """Logits of a chunk; the next chunk's take their place."""
        return multiply(hidden, self.weight.t(), self.logits[: len(hidden)])

    def backward(
        self,
        logits: Tensor,
        hidden: Tensor,
        scores: Scores,
        *,
        d_hidden: Tensor | None,
        d_weight: Tensor | None,
    ) -> None:
        """Gradients of a chunk: ``d_hidden`` ``[R, H]`` (zeros before) is written, and added up
        over the ranks by the time of ``finish``; float32 ``d_weight`` ``[w, H]`` is added to.

        ``logits`` are overwritten. Rows that nothing flows into take part in neither product.
        """
        source = self.active.of(scores.active())
        count = len(hidden) if source is None else source.numel()
        projection, out, states = self.projection, self.d_logits[:count], self.states[:count]
        projection.stages.dlogits(logits, scores, projection.shard, out=out, source=source)
        if d_hidden is not None:
            if source is None:
                multiply(out, self.weight, d_hidden)
            else:
                d_hidden.index_copy_(0, source, multiply(out, self.weight, states))
            # Also of no rows: every rank comes here. It travels while d_weight is computed.
            work = projection.shard.begin_sum(d_hidden)
            self.sums += [] if work is None else [work]
        if d_weight is not None and count:
            if source is not None:
                hidden = torch.index_select(hidden, 0, source, out=states)
            add_product(d_weight, out.t(), hidden)

    def finish(self) -> None:
        """Wait (on a GPU: have its stream wait) until every ``d_hidden`` is the sum over ranks."""
        for work in self.sums:
            work.wait()


class WeightGradient:
    """Where the head's gradient is added up in one pass, in float32: Megatron's ``main_grad`` of
    the parameter, where it has one, and autograd is then given none; a new buffer elsewhere."""

    def __init__(self, weight: Tensor, *, needed: bool) -> None:
        self.direct = needed and adds_directly(weight)
        self.dtype = weight.dtype
        self.total: Tensor | None = None  # [w, H] float32, if any is asked for
        if self.direct:
            self.total = weight.main_grad  # type: ignore[attr-defined]
        elif needed:
            self.total = torch.zeros_like(weight, dtype=torch.float32)

    def for_autograd(self) -> Tensor | None:
        """In the parameter's dtype; None if it went elsewhere or none is asked for."""
        return None if self.direct or self.total is None else self.total.to(self.dtype)


def adds_directly(weight: Tensor) -> bool:
    """Whether the weight has a ``main_grad`` that its gradient can be added to."""
    main: Tensor | None = getattr(weight, "main_grad", None)
    return weight.requires_grad and main is not None and main.dtype == torch.float32
