"""What the logprob kernels should reach on a card, beside the floor measured in the same run.

A target is a share of the floor (see ``logprob.py``), so that it holds on every card. Estimates are
from counted instructions and data sheets; they are said to be that wherever they stand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ESTIMATE = "from counted instructions and data sheets, not measured"


@dataclass(frozen=True)
class Target:
    """``share``: floor over time, to be reached or passed. ``floors`` and ``times``: estimates in
    milliseconds by card, the latter from and to.

    Example:
        ``Target("forward", "from logits", "peergrad", "forward", share=0.88)``
    """

    what: str
    section: str  # of ``logprob.lines``, like the two that follow
    method: str
    kind: str  # "forward" or "both"
    share: float
    floors: Mapping[str, float] = field(default_factory=dict)
    times: Mapping[str, tuple[float, float]] = field(default_factory=dict)


WHOLE = "from logits, with entropy"
EIGHTH = "from logits, an eighth of the vocabulary, with entropy"
TRAINING = "from hidden states, training"
TARGETS = (
    Target(
        *("from logits, forward", WHOLE, "peergrad", "forward"),
        share=0.88,
        floors={"H200": 0.58, "H100": 0.74},
        times={"H200": (0.61, 0.66)},
    ),
    Target(
        *("from logits, both", WHOLE, "peergrad", "both"),
        share=0.87,
        floors={"H200": 1.74, "H100": 2.23},
        times={"H200": (1.90, 2.00)},
    ),
    Target(
        *("from an eighth of the logits, both", EIGHTH, "peergrad", "both"),
        share=0.80,
        floors={"H200": 0.22, "H100": 0.28},
        times={"H200": (0.28, 0.31)},
    ),
    Target(
        *("from hidden states, both", TRAINING, "peergrad, chunk 8192, logits bfloat16", "both"),
        share=0.92,
        floors={"H200": 38.7},
        times={"H200": (41.0, 41.8)},
    ),
)


def compare(records: Sequence[Mapping[str, Any]], gpu: str | None) -> list[dict[str, Any]]:
    """Every target beside what ``records`` of ``logprob.py`` hold; ``measured_ms`` is None for what
    they do not."""
    return [_compared(target, records, gpu or "") for target in TARGETS]


def _compared(target: Target, records: Sequence[Mapping[str, Any]], gpu: str) -> dict[str, Any]:
    here = (target.section, target.method)
    found = next(
        (r for r in records if (r.get("section"), r.get("method")) == here and "seconds" in r), None
    )
    floor = 1e3 * found["floor"][target.kind] if found else None
    measured = 1e3 * found["seconds"][target.kind]["median"] if found else None
    return {
        "what": target.what,
        "sizes": found["text"] if found else None,
        "floor_ms": floor,
        "target_share": target.share,
        "target_ms": floor / target.share if floor else None,
        "measured_ms": measured,
        "share": floor / measured if floor and measured else None,
        "reached": measured <= floor / target.share if floor and measured else None,
        **_estimates(target, gpu),
    }


def _estimates(target: Target, gpu: str) -> dict[str, Any]:
    """What is expected of this card, if anything is."""
    card = next((name for name in ("H200", "H100") if name in gpu), "")
    said: dict[str, Any] = {}
    if card in target.floors:
        said["floor_ms"] = target.floors[card]
    if card in target.times:
        said["ms"] = list(target.times[card])
    return {"estimate": {**said, "basis": ESTIMATE}} if said else {}
