"""Where the run writes to: the folder, the disk, the account."""

import netrc
import os
import shutil
import tempfile
from pathlib import Path
from urllib.parse import urlparse

from peergrad.config import Config, Dtype, require
from peergrad.parallel.hf.config import Shape
from peergrad.parallel.hf.tensors import parameters

HOST = "https://api.wandb.ai"


def check_place(config: Config) -> None:
    """Raise ValueError unless the run's folder can be written and W&B knows who is logging."""
    _check_folder(config)
    if config.logger.wandb == "online":
        _check_account()


def run_folder(config: Config) -> Path:
    return Path(config.run.root) / config.run.name


def resumed_step(config: Config) -> int | None:
    """The step that the run continues from; None if it starts anew."""
    pointer = run_folder(config) / "checkpoints" / "latest"
    if not config.run.resume or not pointer.is_file():
        return None
    number = pointer.read_text().strip().removeprefix("step_")
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
    left = steps - (resumed_step(config) or 0)
    due = left // every + 1 if every else 1
    number = min(due, keep + 1) if keep else due  # the oldest goes when the newest is whole
    exported = parameters(shape) * (2 if config.model.dtype is Dtype.bfloat16 else 4)
    needed = number * checkpoint_bytes(config, shape) + exported
    free = shutil.disk_usage(_existing(run_folder(config))).free
    if free >= needed:
        return None
    return f"{gigabytes(free)} free in run.root, {number} checkpoints and the model take " + (
        f"about {gigabytes(needed)}"
    )


def gigabytes(size: float) -> str:
    """A size for people: 3 significant digits, decimal units."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB" if size < 1000 else f"{size / 1000:.3g} TB"


def _check_folder(config: Config) -> None:
    """By writing there, since permissions do not tell of read-only file systems."""
    root, remedy = config.run.root, "choose another folder, or correct its permissions"
    try:
        place = _existing(run_folder(config))
        require(place.is_dir(), "run.root", root, f"{place} is a file, not a folder", remedy)
        with tempfile.TemporaryDirectory(prefix=".peergrad-check-", dir=place):
            pass
    except OSError as error:
        rule = f"cannot be written to ({error.strerror})"
        raise ValueError(f"run.root = {root!r}: {rule}; {remedy}") from error


def _existing(path: Path) -> Path:
    """The nearest of ``path`` and the folders above it that exists."""
    return next(place for place in [path.absolute(), *path.absolute().parents] if place.exists())


def _check_account() -> None:
    host = urlparse(os.environ.get("WANDB_BASE_URL", HOST)).hostname or ""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    require(
        any(_has_login(file, host) for file in files),
        "logger.wandb",
        "online",
        f"needs a key, and neither WANDB_API_KEY nor {files[0]} has one for {host}",
        "run wandb login, or set logger.wandb=offline",
    )


def _has_login(file: Path, host: str) -> bool:
    try:
        return netrc.netrc(str(file)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
