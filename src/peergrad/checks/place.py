"""Where the run writes to, and whether there is room."""

import shutil
import tempfile
from pathlib import Path

from peergrad.config import Config, Dtype, require
from peergrad.parallel.hf.config import Shape
from peergrad.parallel.hf.tensors import parameters
from peergrad.storage import existing


def check_folder(config: Config) -> None:
    """Raise ValueError unless the run's folder can be written."""
    check_writable("run.root", config.run.root, run_folder(config))


def check_writable(key: str, value: str, folder: Path) -> None:
    """Raise ValueError, about ``key = value``, unless ``folder`` can be made or written, by writing
    there: permissions do not tell of read-only file systems."""
    remedy = "choose another folder, or correct its permissions"
    try:
        place = existing(folder)
        require(place.is_dir(), key, value, f"{place} is a file, not a folder", remedy)
        with tempfile.TemporaryDirectory(prefix=".peergrad-check-", dir=place):
            pass
    except OSError as error:
        rule = f"cannot be written to ({error.strerror})"
        raise ValueError(f"{key} = {value!r}: {rule}; {remedy}") from error


def run_folder(config: Config) -> Path:
    return Path(config.run.root) / config.run.name


def resumed_step(config: Config) -> int | None:
    """The step that the run continues from; None if it starts anew."""
    pointer = run_folder(config) / "checkpoints" / "latest"
    if not config.run.resume or not pointer.is_file():
        return None
    number = pointer.read_text(errors="replace").strip().removeprefix("step_")
    return int(number) if number.isdecimal() else None


def checkpoint_bytes(config: Config, shape: Shape) -> int:
    """About what a checkpoint takes: weights, their float32 main copy, two moments."""
    small, sharded = config.model.dtype is Dtype.bfloat16, config.parallel.distributed_optimizer
    weights = 2 if small else 4
    main = 4 if small or sharded else 0  # float32 weights are their own
    reference = weights if config.algo.kl.reset_every else 0
    padding = (shape.padded_vocab - shape.vocab) * shape.hidden * (1 if shape.tied else 2)
    return (parameters(shape) + padding) * (weights + main + 8 + reference)


def disk_warning(config: Config, shape: Shape) -> str | None:
    """What to say if the disk may be too small for this run's checkpoints and exported model."""
    every, keep, steps = config.checkpoint.every, config.checkpoint.keep, config.run.steps
    left = max(0, steps - (resumed_step(config) or 0))
    due = -(-left // every) if every else 1
    number = min(due, keep + 1) if keep else due  # the oldest goes when the newest is whole
    exported = parameters(shape) * (2 if config.model.dtype is Dtype.bfloat16 else 4)
    needed = number * checkpoint_bytes(config, shape) + exported
    free = shutil.disk_usage(existing(run_folder(config))).free
    if free >= needed:
        return None
    have, want = gigabytes(free), gigabytes(needed)
    return f"{have} free in run.root; checkpoints ({number} at a time) and model take about {want}"


def gigabytes(size: float) -> str:
    """A size for people: 3 significant digits, decimal units."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB" if size < 1000 else f"{size / 1000:.3g} TB"
