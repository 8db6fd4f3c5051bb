"""What the benchmarks report of repeated measurements: a median and its spread, never a mean.

A mean hides a step that a neighbour on the machine made slow; a median does not move, and the
distance from the 10th to the 90th percentile says how far to trust it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Spread:
    """Median and percentiles (linear between neighbours) of ``count`` measurements.

    Example:
        of 1, 2, 3, 4, 10: ``Spread(median=3.0, p10=1.4, p90=7.6, count=5)``
    """

    median: float
    p10: float
    p90: float
    count: int

    def text(self, form: str = ".3f") -> str:
        return f"{self.median:{form}} ({self.p10:{form}}-{self.p90:{form}})"


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError for no measurements at all."""
    if not values:
        raise ValueError("there is nothing to summarise: no measured step is left")
    p10, median, p90 = (
        float(x) for x in np.quantile(np.array(values, np.float64), (0.1, 0.5, 0.9))
    )
    return Spread(median, p10, p90, len(values))


def phase_seconds(row: Row) -> dict[str, float]:
    """Seconds per phase of one training row of ``metrics.jsonl``, in the order they were taken.

    ``rest`` is what no phase covers (statistics, logging, the loop itself); ``step`` comes last.

    Example:
        ``{"time/rollout": 2.0, "time/update": 0.5, "time/step": 2.75}`` gives
        ``{"rollout": 2.0, "update": 0.5, "rest": 0.25, "step": 2.75}``
    """
    times = {key.removeprefix("time/"): row[key] for key in row if key.startswith("time/")}
    step = times.pop("step")
    return {**times, "rest": step - sum(times.values()), "step": step}


def summarise(rows: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """The spread of every quantity over rows that all hold the same quantities."""
    return {key: spread([row[key] for row in rows]) for key in (rows[0] if rows else ())}


def as_json(spreads: Mapping[str, Spread]) -> dict[str, dict[str, Any]]:
    return {key: asdict(value) for key, value in spreads.items()}


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")
