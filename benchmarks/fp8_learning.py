"""Does a policy whose products are in 8 bits learn as one in bfloat16 does?

    python benchmarks/fp8_learning.py                # three seeds in both ways: half an hour
    python benchmarks/fp8_learning.py --seeds 1 --steps 6

The quickstart in bfloat16 with Transformer Engine's own layers, which tests/te drives on a CPU: its
arithmetic is that of 8 bits, its speed is not. An engine in 8 bits is not to be had on a CPU; the
servers, of a process of their own, are in bfloat16. What follows the options are Hydra overrides.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from machine import ROOT, describe, load_average, result_path
from summary import write_result

from peergrad.observing.metrics import read_metrics
from peergrad.running.ports import free_ports

QUICKSTART = ("experiment=quickstart_cpu", "model.dtype=bfloat16", "rollout.servers.count=1")
WAYS = {"bfloat16": (), "blockwise": ("parallel.fp8=blockwise", "parallel.fp8_gap_every=2")}
GAP = ("fp8", "fp8_rms", "fp8_share", "mean")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    options, overrides = parser.parse_known_args()
    result: dict[str, Any] = {**describe(), "steps": options.steps, "load": load_average()}
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, served(Path(folder), overrides) as servers:
        for seed in range(options.seeds):
            for way, more in WAYS.items():
                given = (f"run.seed={seed}", f"run.steps={options.steps}", *servers, *more)
                rows = run(Path(folder), f"{way}-{seed}", [*given, *overrides])
                runs.append({"way": way, "seed": seed, **figures(rows)})
                print(runs[-1], flush=True)
    result["runs"] = runs
    for way in WAYS:
        last = [one["pass@1"][-1] for one in runs if one["way"] == way]
        print(f"{way}: pass@1 {min(last):.3f} to {max(last):.3f}, mean {np.mean(last):.3f}")
    write_result(result_path(suffix="fp8-learning"), result)
    return 0


@contextmanager
def served(folder: Path, overrides: Sequence[str]) -> Iterator[list[str]]:
    """What tells a run where its server is."""
    (port,) = free_ports(1)
    command = ["-m", "peergrad.serve", "--port", str(port), "--log-dir", str(folder / "servers")]
    process = subprocess.Popen([sys.executable, *command, *QUICKSTART, *overrides], cwd=ROOT)
    try:
        url = f"http://127.0.0.1:{port}"
        yield ["rollout=external", f"rollout.servers.urls=[{url}]", "rollout.servers.wait=600"]
    finally:
        process.terminate()
        process.wait()


def run(folder: Path, name: str, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The metrics of a run. Raises CalledProcessError if it fails."""
    given = [f"run.root={folder}", f"run.name={name}", "parallel.spec=te", "checkpoint.every=0"]
    given += ["rollout.max_canary_gap=null"]
    command = [sys.executable, "-m", "tests.te.train", *QUICKSTART[:2], *given, *overrides]
    with (folder / f"{name}.log").open("w") as said:
        subprocess.run(command, cwd=ROOT, check=True, stdout=said, stderr=said)
    return read_metrics(folder / name / "metrics.jsonl")


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Pass rates of the evaluations, rewards of the steps, and means of what is said of the gap."""
    train = [row for row in rows if row["kind"] == "train"]
    found: dict[str, Any] = {
        "pass@1": [row["pass@1"] for row in rows if row["kind"] == "eval"],
        "reward": [row["reward/mean"] for row in train],
    }
    for key in GAP:
        values = [row[f"logprob_gap/{key}"] for row in train if f"logprob_gap/{key}" in row]
        if values:
            found[f"logprob_gap/{key}"] = float(np.mean(values))
    return found


if __name__ == "__main__":
    sys.exit(main())
