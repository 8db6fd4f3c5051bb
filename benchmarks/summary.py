"""What the benchmarks report of repeated measurements: median and spread, never a mean of all.

A mean hides a step that a neighbour on the machine made slow; a median does not move, and the
distance from the 10th to the 90th percentile says how far to trust it. Medians do not add up; where
parts must, ``middle`` gives means that a slow step does not move either.
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
    A phase that was timed in parts (``time/<phase>/<part>``) is followed by these, and by
    ``<phase>/other`` for what no part covers; so is a part that has parts of its own.

    Example:
        ``{"time/rollout": 2.0, "time/sync/pause": 0.1, "time/sync": 0.5, "time/step": 2.75}`` gives
        ``{"rollout": 2.0, "sync": 0.5, "sync/pause": 0.1, "sync/other": 0.4, "rest": 0.25,
        "step": 2.75}``
    """
    times = {key.removeprefix("time/"): row[key] for key in row if key.startswith("time/")}
    step = times.pop("step")
    phases = dict.fromkeys(name.partition("/")[0] for name in times)
    found: dict[str, float] = {}
    for phase in phases:
        found |= _with_parts(phase, times)
    rest = step - sum(found[phase] for phase in phases)
    return {**found, "rest": rest, "step": step}


def _with_parts(name: str, times: Mapping[str, float]) -> dict[str, float]:
    """``name``, its parts and what is left of it; without a time of its own it is its parts."""
    below = [key[len(name) + 1 :] for key in times if key.startswith(f"{name}/")]
    parts = dict.fromkeys(part.partition("/")[0] for part in below)
    if not parts:
        return {name: times[name]}
    found: dict[str, float] = {}
    for part in parts:
        found |= _with_parts(f"{name}/{part}", times)
    covered = sum(found[f"{name}/{part}"] for part in parts)
    whole = times.get(name, covered)
    return {name: whole, **found, f"{name}/other": whole - covered}


def all_keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every key of any row, one that is not in the first behind its neighbour in a later one."""
    order: list[str] = []
    for row in rows:
        place = 0
        for key in row:
            if key in order:
                place = order.index(key) + 1
            else:
                order.insert(place, key)
                place += 1
    return order


def aligned(rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """The same quantities in every row: what was not timed in a step took 0 s of it."""
    order = all_keys(rows)
    return [{key: row.get(key, 0.0) for key in order} for row in rows]


def middle(rows: Sequence[Mapping[str, float]], key: str = "step") -> dict[str, float]:
    """Means over the middle half of the rows, in order of ``key``: as deaf to a slow step as a
    median, but what adds up in every row adds up here, too.

    Example:
        of steps that took 1, 2, 3 and 100 s: the means of the second and the third
    """
    ordered = sorted(rows, key=lambda row: row[key])
    cut = len(ordered) // 4
    kept = ordered[cut : len(ordered) - cut]
    return {name: float(np.mean([row[name] for row in kept])) for name in (kept[0] if kept else ())}


def summarise(rows: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """The spread of every quantity over rows that all hold the same quantities."""
    return {key: spread([row[key] for row in rows]) for key in (rows[0] if rows else ())}


def as_json(spreads: Mapping[str, Spread]) -> dict[str, dict[str, Any]]:
    return {key: asdict(value) for key, value in spreads.items()}


def save_result(path: Path, result: Mapping[str, Any]) -> None:
    """Whole or not at all, whatever ends this process: also for what is not finished yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    save_result(path, result)
    print(f"written to {path}")
