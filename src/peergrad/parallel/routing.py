"""Mixtures of experts: what routers are told of a micro-batch, and what they tell of it.

Megatron's routers see hidden states alone. Whose tokens these are travels beside them, in the
description of the packed row, so that layers which are computed again find what they found before.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from peergrad.algo.packing import MicroBatch
from peergrad.config import MoeConfig


@dataclass(frozen=True)
class Coefficients:
    """Of the losses that a router adds in each layer, over the samples of a whole optimizer step.

    Example:
        of 64 samples with 640 tokens, and ``moe.aux_loss_coef=0.001``:
        ``Coefficients(sample=0.001 / 64, token=0.0)``
    """

    sample: float = 0.0  # of each sample's balance
    token: float = 0.0  # of each token's squared logsumexp

    @classmethod
    def of(cls, moe: MoeConfig, contexts: Iterable[int]) -> "Coefficients":
        """``contexts``: how many tokens of each sample are computed. Samples without any do not
        count."""
        lengths = [n for n in contexts if n]
        return cls(moe.aux_loss_coef / max(1, len(lengths)), moe.z_loss_coef / max(1, sum(lengths)))


NONE = Coefficients()


@dataclass
class Tally:
    """What the routers of a rank have counted since the last optimizer step, each layer by itself.
    A token counts once for every sample that it belongs to, though it is computed once."""

    load: dict[int, Tensor] = field(default_factory=dict)  # of a layer: [experts] tokens
    balance: dict[int, Tensor] = field(default_factory=dict)  # sum over samples, 1 is even
    z: dict[int, Tensor] = field(default_factory=dict)  # sum over tokens
    given: dict[int, Tensor] = field(default_factory=dict)  # tokens whose experts were given
    agreed: dict[int, Tensor] = field(default_factory=dict)  # of these, the part that it would take

    def add(self, kind: str, layer: int, value: Tensor) -> None:
        found = getattr(self, kind)
        found[layer] = found[layer] + value if layer in found else value

    def take(self) -> dict[str, dict[int, np.ndarray]]:
        """What there is, on the host; and begin anew."""
        found = {kind.name: getattr(self, kind.name) for kind in fields(self)}
        taken = {
            kind: {layer: x.double().cpu().numpy() for layer, x in of.items()}
            for kind, of in found.items()
        }
        for of in found.values():
            of.clear()
        return taken


@dataclass(frozen=True)
class Routed:
    """A micro-batch as the routers of one rank see it: the T tokens that the rank holds.

    Example:
        two answers of 2 tokens, the last of which is not computed, that share a prompt of 2 whose
        second token lies on another rank:
        ``Routed(rows=[0, 1, 0, 2], samples=[0, 0, 1, 1], lengths=[3, 3], copies=[2, 1, 1], ...)``
    """

    rows: Tensor  # [C] int64, of every token of every sample that lies here
    samples: Tensor  # [C] int64, whose token it is
    lengths: Tensor  # [samples] float32, tokens on all ranks
    copies: Tensor  # [T] float32, of how many samples each token is; 0 for padding
    group: dist.ProcessGroup  # the ranks that hold the other parts
    coefficients: Coefficients
    tally: Tally
    chosen: Tensor | None = None  # [layers, T, experts of a token] uint8 or int16, to take again

    def by_sample(self, values: Tensor) -> Tensor:
        """``[samples, n]``: the sum of ``values`` ``[T, n]`` over the tokens that lie here."""
        found = values.new_zeros(self.lengths.numel(), values.shape[1])
        return found.index_add(0, self.samples, values.index_select(0, self.rows))


def routed(
    batch: MicroBatch,
    *,
    tensor: dist.ProcessGroup,
    group: dist.ProcessGroup,
    sequence: bool,
    replay: bool,
    **told: Any,
) -> Routed:
    """``batch`` for the routers of this rank. ``group``: all ranks that hold parts of it; with
    ``sequence`` those of ``tensor`` do. ``replay``: the engine's choices are taken again."""
    place = torch.arange(batch.tokens.numel(), device=batch.tokens.device)
    if batch.held is not None:
        place = place[batch.held.tokens]
    if sequence:
        place = place.chunk(tensor.size())[tensor.rank()]
    here = torch.full_like(batch.tokens, -1)
    here[place] = torch.arange(place.numel(), device=place.device)
    members = batch.members
    assert members is not None
    rows = here[members.rows]
    kept = rows >= 0
    rows, samples = rows[kept], members.samples[kept]
    lengths = _counted(members.samples, batch.sequences)
    given = members.experts if replay else None
    chosen = None if given is None else given[:, place]
    copies = _counted(rows, place.numel())
    return Routed(rows, samples, lengths, copies, group, chosen=chosen, **told)


def _counted(numbers: Tensor, size: int) -> Tensor:
    """``[size]`` float32: how often each number is there. The host need not wait for it, as for
    ``bincount`` on a GPU."""
    ones = torch.ones(numbers.shape, device=numbers.device)
    return torch.zeros(size, device=numbers.device).index_add_(0, numbers, ones)


def router_metrics(
    tallies: Sequence[dict[str, dict[int, np.ndarray]]], contexts: Iterable[int]
) -> dict[str, float]:
    """What all ranks have counted in one optimizer step, over samples of these ``contexts``."""
    lengths = [n for n in contexts if n]
    whole: dict[str, dict[int, np.ndarray]] = {kind.name: {} for kind in fields(Tally)}
    for tally in tallies:
        for kind, layers in tally.items():
            for layer, value in layers.items():
                whole[kind][layer] = whole[kind].get(layer, 0) + value
    load = np.stack([whole["load"][layer] for layer in sorted(whole["load"])])
    busiest = load.max(1) / load.mean(1).clip(1e-9)
    found = {
        "moe/imbalance": float(busiest.mean()),
        "moe/imbalance_worst": float(busiest.max()),
        "moe/idle": float((load == 0).mean()),
    }
    counts = {"aux_loss": ("balance", len(lengths)), "z_loss": ("z", sum(lengths))}
    for name, (kind, count) in counts.items():
        if whole[kind]:
            found[f"moe/{name}"] = float(np.mean(list(whole[kind].values()))) / max(1, count)
    if given := float(sum(whole["given"].values())):
        found["moe/replayed"] = given / (len(whole["load"]) * sum(lengths))
        found["moe/agreement"] = float(sum(whole["agreed"].values())) / given
    return found
