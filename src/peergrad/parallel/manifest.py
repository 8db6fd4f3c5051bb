"""An HF folder and a Megatron checkpoint held against each other, and against what a conversion
said of them: the digest of every tensor, read and written.

All tensors go by their HF names, those of the checkpoint too.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from peergrad.config.rules import one_line
from peergrad.parallel.damage import SEAL, sealed
from peergrad.parallel.mesh import Mesh
from peergrad.parallel.rows import CheckpointTensors, Rows, fingerprint

FORMAT = 1
HF, MEGATRON = "hf", "megatron"
WHERE = {HF: "the HF folder", MEGATRON: "the checkpoint"}
Table = Mapping[str, str]
"""By HF name: precision, size and XXH3-128 of its bytes, ``bfloat16 (64, 16) 9f...``."""


@dataclass(frozen=True)
class Finding:
    """What is wrong with a tensor, or a file.

    Example:
        ``Finding("model.norm.weight", "is missing in the HF folder")``
    """

    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.name} {self.what}"


@dataclass(frozen=True)
class Comparison:
    """An HF folder and a Megatron checkpoint, tensor by tensor.

    Example:
        ``Comparison(tables={"hf": {"model.norm.weight": "float32 (64,) 9f..."}, "megatron": {...}},
        findings=[])``
    """

    tables: dict[str, dict[str, str]]  # of either side
    findings: list[Finding]


def compare(
    hf: Mapping[str, Rows],
    checkpoint: CheckpointTensors,
    mesh: Mesh,
    *,
    order: list[str],
    tick: Callable[[int], object],
) -> Comparison:
    """Read both from the disk, each rank its share. Of different precisions the wider one is
    rounded to the other. ``order``: HF names, by which findings are sorted. Collective."""
    tables: dict[str, dict[str, str]] = {HF: {}, MEGATRON: {}}
    findings = []
    for tensors in checkpoint.parameters(mesh.rank, mesh.world):
        for name, theirs in tensors.items():
            texts, problem = _compared(hf.get(name), theirs)
            for side, text in texts.items():
                tables[side][name] = text
            if problem is not None:
                findings.append(Finding(name, problem))
            tick(0 if theirs is None else prod(theirs.shape) * theirs.dtype.itemsize)
    parts = mesh.gather((tables, findings))
    place = {name: i for i, name in enumerate(order)}
    for side in tables:
        items = [item for found, _ in parts for item in found[side].items()]
        tables[side] = dict(sorted(items, key=lambda item: place[item[0]]))
    all_findings = [finding for _, found in parts for finding in found]
    return Comparison(tables, sorted(all_findings, key=lambda finding: place[finding.name]))


def _compared(ours: Rows | None, theirs: Rows | None) -> tuple[dict[str, str], str | None]:
    """(a line of the table of each side that can be read, what is wrong) with a tensor of the HF
    folder and of the checkpoint."""
    sides = {HF: ours, MEGATRON: theirs}
    here = {side: rows for side, rows in sides.items() if rows is not None}
    problems = [f"is missing in {WHERE[side]}" for side in sides if side not in here]
    kinds = [rows.dtype for rows in here.values()]
    common = torch.bfloat16 if torch.bfloat16 in kinds else kinds[-1]
    texts, values = {}, {}
    for side, rows in here.items():
        try:
            digest, values[side] = fingerprint(rows, common)
        except (ValueError, OSError) as error:
            problems.append(f"cannot be read: {one_line(error)}")
            continue
        texts[side] = f"{str(rows.dtype).removeprefix('torch.')} {rows.shape} {digest}"
    if not problems and len({rows.shape for rows in here.values()}) > 1:
        problems.append(" and ".join(f"is {r.shape} in {WHERE[s]}" for s, r in here.items()))
    if not problems and values[HF] != values[MEGATRON]:
        problems.append("differs")
    return texts, problems[0] if problems else None


def describe(source: Path, written: Path, tables: Mapping[str, Table], **more: Any) -> str:
    """The manifest of a conversion of folder ``source`` to ``written``; ``more``: what else it
    says."""
    paths = {"source": str(source.absolute()), "written": str(written.absolute())}
    return json.dumps(sealed({"format": FORMAT, **paths, **more, "tensors": tables}), indent=1)


def read_manifest(file: Path) -> dict[str, Any]:
    """ValueError, which says why, if it is none, or not as it was written."""
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"is not JSON ({one_line(error)})") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"is no manifest of format {FORMAT}")
    if found.get(SEAL) != sealed(found)[SEAL]:
        raise ValueError("has another content than was written (XXH3)")
    return found


def check_manifest(
    file: Path, side: str, tables: Mapping[str, Table], source: Path
) -> list[Finding]:
    """Hold the manifest ``file``, beside what ``side`` of ``tables`` is of, against the tensors on
    the disk; and the other side, if its source is the folder ``source``."""
    try:
        manifest = read_manifest(file)
        expected: dict[str, dict[str, str]] = {s: manifest["tensors"][s] for s in tables}
    except (ValueError, KeyError, TypeError) as error:
        return [
            Finding(file.name, str(error) if isinstance(error, ValueError) else "is incomplete")
        ]
    known = manifest["source"] == str(source.absolute())
    found = []
    for one in (s for s in tables if s == side or known):
        changed = [n for n, text in tables[one].items() if expected[one].get(n) != text]
        if changed and len(changed) == len(tables[one]):
            return [Finding(file.name, "is the manifest of another conversion")]
        found += [Finding(n, f"in {WHERE[one]} is not what {file.name} says") for n in changed]
        gone = [name for name in expected[one] if name not in tables[one]]
        found += [Finding(name, f"of {file.name} is not in {WHERE[one]}") for name in gone]
    return found
