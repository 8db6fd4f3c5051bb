"""The logits of a Megatron checkpoint against those that transformers computes from an HF folder.

Equal bytes in the right places say nothing of what is computed from them: a configuration that is
read otherwise, a rotary embedding, a norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from peergrad.algo.packing import MicroBatch
from peergrad.algo.samples import Sample
from peergrad.config import Config, Dtype, ModelConfig, ParallelConfig
from peergrad.config.rules import one_line
from peergrad.kernels import linear_logits
from peergrad.parallel.mesh import Mesh
from peergrad.parallel.policy import Scorer

LENGTHS = (3, 11, 24)
SEED = 0
LIMITS = {"float32": (1e-4, 1e-5), "bfloat16": (2**-2, 2**-5)}
"""Largest and mean difference that may be, as parts of the largest logit. Rounding, which adds up
over layers, was seen to make 0.08 and 0.012 of it in bfloat16 (48 random layers), 5e-6 and 4e-7 in
float32; two matrices swapped, of two layers, 1.2 and 0.2."""
ROUTED = (1.0, 2**-5)
"""Of a mixture of experts in bfloat16, where rounding may send a token to another expert."""


@dataclass(frozen=True)
class Gap:
    """How far two models' logits are apart.

    Example:
        ``Gap(dtype="float32", largest=2e-6, mean=3e-7, scale=11.2, limits=(1e-4, 1e-5))``
    """

    dtype: str
    largest: float
    mean: float
    scale: float  # the largest logit
    limits: tuple[float, float]  # of largest and mean, as parts of it

    @property
    def fits(self) -> bool:
        limit, mean = self.limits
        return self.largest <= limit * self.scale and self.mean <= mean * self.scale  # no NaN

    def __str__(self) -> str:
        limit, mean = (part * self.scale for part in self.limits)
        return (
            f"logits of {len(LENGTHS)} random prompts, against transformers, in {self.dtype}: at "
            f"most {self.largest:.1e} apart (limit {limit:.1e}), in the mean {self.mean:.1e} "
            f"(limit {mean:.1e})"
        )


def logits_gap(
    hf: Path, checkpoint: Path, parallel: ParallelConfig, dtype: Dtype, mesh: Mesh
) -> Gap | str:
    """Compute both in ``dtype``, of the same random prompts; or why transformers cannot. Each model
    is in memory as a whole, one after the other. Collective; equal on every rank."""
    config = Config(model=ModelConfig(path=str(hf), dtype=dtype), parallel=parallel)
    theirs = mesh.share(lambda: _of_transformers(hf, dtype))
    if isinstance(theirs, str):
        return theirs
    model = _Prompted(config, mesh, path=str(hf), weights=str(checkpoint))
    ours = model.logits(_prompts(model.shape.vocab))

    def compare() -> Gap:
        assert ours is not None
        apart = (torch.cat(ours) - torch.cat(theirs)).abs()
        scale = float(torch.cat(theirs).abs().max())
        routed = model.shape.experts is not None and dtype is Dtype.bfloat16
        limits = ROUTED if routed else LIMITS[dtype.name]
        return Gap(dtype.name, float(apart.max()), float(apart.mean()), scale, limits)

    return mesh.share(compare)


def _prompts(vocab: int) -> list[np.ndarray]:
    draw = np.random.default_rng(SEED)
    return [draw.integers(0, vocab, n).astype(np.int32) for n in LENGTHS]


def _of_transformers(path: Path, dtype: Dtype) -> list[Tensor] | str:
    """Logits of each prompt, float32; or why they cannot be had."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        return f"transformers cannot be imported ({one_line(error)})"
    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype.name))
        tokens = [torch.from_numpy(p).long()[None] for p in _prompts(model.config.vocab_size)]
        with torch.no_grad():
            return [model(row).logits[0].float() for row in tokens]
    except Exception as error:  # code of others, on any model
        return f"transformers cannot load or run {path} ({one_line(error)})"


class _Prompted(Scorer):
    """A model that gives whole logits."""

    def logits(self, prompts: Sequence[np.ndarray]) -> list[Tensor] | None:
        """``[n, V]`` float32 for each prompt of n tokens, on rank 0; None elsewhere. Collective."""
        alone = [[i] for i in range(len(prompts))]  # on every data rank
        batches = self._pack([_sample(p) for p in prompts], [alone] * self.mesh.data.size())

        def finish(batch: MicroBatch, hidden: Tensor, **_: Any) -> Tensor:
            rows = self.head.model.head_input(hidden, summed=False)[: len(batch.rows)]
            part = linear_logits(rows, self.head.model.head_weight(), dtype=self.head.dtype).float()
            parts = [torch.empty_like(part) for _ in range(self.mesh.tensor.size())]
            dist.all_gather(parts, part, group=self.mesh.tensor)
            return torch.cat(parts, dim=1)[:, : self.shape.vocab].cpu()

        with torch.no_grad():
            found = self._schedule(self.model.pieces, batches, finish, True)
        speaks = self.mesh.reports and self.mesh.data.rank() == 0
        gathered = [
            part for part in self.mesh.gather(found if speaks else None) if part is not None
        ]
        return gathered[0] if self.mesh.rank == 0 else None


def _sample(prompt: np.ndarray) -> Sample:
    """All of its tokens predict one: another follows, which nothing is predicted from."""
    zero = np.zeros(prompt.size, np.float32)
    tokens = np.append(prompt, np.int32(0))
    return Sample(tokens, 1, zero, zero, zero + 1, zero.astype(np.int32))
