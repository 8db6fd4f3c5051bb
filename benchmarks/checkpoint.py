"""What it costs to know that a checkpoint is whole: save, verify and load on one process.

    python benchmarks/checkpoint.py            # 100 million parameters, 1.6 GB with optimizer
    python benchmarks/checkpoint.py --tiny     # seconds: shows that the script works

``save`` and ``load`` are those of a run, digests included: ``blocked`` is what training waits for
while its state is copied aside, ``beside`` the whole of that save, with nothing to compute
meanwhile. ``torch_save`` writes the same tensors by ``torch.save`` into one file, flushed to disk
as ours are. ``digests`` takes the digests of files just written, ``verify`` is the part of a load
that compares them with the files still in memory, ``verify_cold`` the same after the kernel was
asked to forget them. Ranks divide the files, so that several need less.
"""

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from machine import describe, load_average, result_path, title
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from summary import as_json, summarise, write_result
from synthetic import TINY, write_model

from peergrad.config import CheckpointConfig, Config, Dtype, ModelConfig, ParallelConfig, Spec

if TYPE_CHECKING:
    from peergrad.parallel.policy import Policy

MODEL = {
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2048,
    "vocab_size": 32000,
    "max_position_embeddings": 1024,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument("--times", type=int, default=5, help="measured repetitions")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    described = {**describe(), "load_average_before": load_average()}
    with tempfile.TemporaryDirectory(prefix="peergrad-checkpoint-", dir=options.folder) as folder:
        write_model(Path(folder) / "hf", TINY if options.tiny else MODEL)
        size, rows = benchmark(Path(folder), options.times)
    spreads = summarise(rows)
    print(f"\ncheckpoint of {size / 1e9:.2f} GB on {title(described)}")
    table = Table("", "seconds: median (p10-p90)", "GB/s", box=SIMPLE)
    for key, value in spreads.items():
        table.add_row(key, value.text(), f"{size / value.median / 1e9:.2f}")
    Console().print(table)
    name = "checkpoint-tiny" if options.tiny else "checkpoint"
    found = {"bytes": size, "summary": as_json(spreads), "repetitions": rows}
    write_result(options.out or result_path(suffix=name), {"benchmark": name, **described, **found})
    return 0


def benchmark(folder: Path, times: int) -> tuple[int, list[dict[str, float]]]:
    """Bytes of a checkpoint, and seconds per part of every repetition but the first."""
    # Imported here: --help should not have to wait for Megatron.
    from peergrad.parallel import damage
    from peergrad.parallel.checkpoint import Checkpoints
    from peergrad.parallel.digests import digests
    from peergrad.parallel.mesh import close_mesh, init_mesh
    from peergrad.parallel.policy import Policy
    from peergrad.storage import size_of

    damage.SMALL_BYTES = 0  # whatever its size, a file is one of those that ranks divide
    config = Config(
        model=ModelConfig(path=str(folder / "hf"), dtype=Dtype.float32),
        parallel=ParallelConfig(spec=Spec.torch),
    )
    mesh = init_mesh(config.parallel, seed=0)
    try:
        policy = Policy(config, mesh)
        checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(keep=1), mesh)
        gc.freeze()  # as a run does: Megatron's search for garbage then costs nothing
        rows = []
        for step in range(1, times + 2):
            row: dict[str, float] = {}
            state: tuple[Policy, None, dict[str, object], None] = policy, None, {}, None
            with timed(row, "save"):
                path = checkpoints.save(*state, step=step)
            with timed(row, "torch_save"):
                save_plainly(policy, folder / "plain.pt")
            with timed(row, "beside"):
                with timed(row, "blocked"):
                    checkpoints.begin(*state, step=step, aside=True)
                checkpoints.finish()
            names = damage.read_meta(path)["files"]
            with timed(row, "digests"):
                digests(path, names, mesh)
            with timed(row, "verify"):
                assert damage.verify(path, mesh) is None
            forget(path)
            with timed(row, "verify_cold"):
                assert damage.verify(path, mesh) is None
            with timed(row, "load"):
                assert checkpoints.restore(policy) == step
            rows.append(row)
            told = (f"{name} {row[name]:.2f} s" for name in ("save", "blocked", "load"))
            print(f"{step - 1}/{times}  {', '.join(told)}", flush=True)
        return size_of(path), rows[1:]
    finally:
        close_mesh()


def save_plainly(policy: "Policy", file: Path) -> None:
    """Weights, their copies in the optimizer, and its moments."""
    inner = policy.optimizer.chained_optimizers[0].optimizer
    groups = [group["params"] for group in inner.param_groups]
    state = policy.model.state_dict(), groups, list(inner.state.values())
    with file.open("wb") as stream:
        torch.save(state, stream)
        os.fsync(stream.fileno())


@contextmanager
def timed(row: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    row[name] = time.perf_counter() - start


def forget(folder: Path) -> None:
    """Ask the kernel to drop the files' pages from memory; they are on the disk by now."""
    for file in (path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
