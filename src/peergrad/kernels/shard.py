"""Where a rank's columns lie in the vocabulary, and the two collectives that follow from it."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
BLOCKS = 8
"""Equal parts of the vocabulary that are reduced on their own and merged in order. Every
tensor-parallel size that divides it adds up the same numbers in the same order: the same bits. At
128k columns of bfloat16 a part is 32 kB, enough for a GPU's memory to stream."""


@dataclass(frozen=True)
class Shard:
    """One rank's columns of the padded vocabulary.

    Example:
        Vocabulary 21, padded to 32, rank 1 of 2: ``Shard(width=16, valid=5, first=16, blocks=4)``.
    """

    width: int  # columns, padding included
    valid: int  # real ones, in front
    first: int  # place of column 0 in the vocabulary
    blocks: int  # of this rank, equal in width
    group: dist.ProcessGroup | None = None

    @staticmethod
    def of(group: dist.ProcessGroup | None, width: int, vocab_size: int) -> "Shard":
        """The shard of this rank of ``group`` (None: of the whole vocabulary), ranks in order."""
        rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
        first, blocks = rank * width, max(1, BLOCKS // ranks)
        if BLOCKS % ranks or width % blocks:
            blocks = 1
        return Shard(width, max(0, min(width, vocab_size - first)), first, blocks, group)

    @property
    def step(self) -> int:
        """Columns of a block."""
        return self.width // self.blocks

    @property
    def shape(self) -> tuple[int, int]:
        """Blocks and columns of one."""
        return self.blocks, self.step

    @property
    def all_columns(self) -> int:
        """Columns of all ranks, padding included."""
        return self.width * (1 if self.group is None else self.group.size())

    def gather(self, sums: Tensor) -> Tensor:
        """``[blocks, R, 4]`` of every rank as ``[all blocks, R, 4]``, in the vocabulary's order on
        every rank: 16 bytes per token and block."""
        if self.group is None or self.group.size() == 1 or not sums.shape[1]:
            return sums
        whole = sums.new_empty(self.group.size() * sums.shape[0], *sums.shape[1:])
        dist.all_gather_into_tensor(whole, sums, group=self.group)
        return whole

    def begin_sum(self, x: Tensor) -> dist.Work | None:
        """Begin to add up ``x`` over the ranks, in place: nobody may touch it until the work's
        ``wait()`` has returned. None: there is nobody else."""
        if self.group is None or self.group.size() == 1 or not x.numel():
            return None
        work: dist.Work | None = dist.all_reduce(x, group=self.group, async_op=True)
        return work
