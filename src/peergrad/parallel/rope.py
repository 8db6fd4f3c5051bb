"""How fast the pairs of a head turn with the position."""

import math

import torch
from torch import Tensor

from peergrad.parallel.hf.rope import Rope


def frequencies(rope: Rope, width: int) -> Tensor:
    """``[width / 2]`` float32 on the host, radians a position: what transformers computes for heads
    of ``width`` numbers."""
    plain = 1.0 / rope.theta ** (torch.arange(0, width, 2).float() / width)
    if rope.kind in ("default", "linear"):
        return plain / rope.factor
    kept = _kept_by_turns(rope, plain) if rope.kind == "llama3" else _kept_by_pairs(rope, width)
    return (1 - kept) * plain / rope.factor + kept * plain


def _kept_by_turns(rope: Rope, plain: Tensor) -> Tensor:
    """Llama 3.1: 0 is slowed down, 1 is as ever, linear in the turns over the original length."""
    turns = rope.original / (2 * math.pi / plain)
    return ((turns - rope.slow) / (rope.fast - rope.slow)).clamp(0, 1)


def _kept_by_pairs(rope: Rope, width: int) -> Tensor:
    """YaRN (https://arxiv.org/abs/2309.00071): the same, linear in the number of the pair."""
    first, last = (
        width * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        for turns in (rope.fast, rope.slow)
    )
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    last += 0.001 if first == last else 0  # as transformers and SGLang do
    return 1 - ((torch.arange(width // 2).float() - first) / (last - first)).clamp(0, 1)
