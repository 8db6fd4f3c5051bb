"""Whether a run can go on from a checkpoint that is whole: the same model, an optimizer state that
can be read, steps left to do, and a learning rate that does not jump unless ``optim`` says so."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from peergrad.config import Config, Dtype, require
from peergrad.parallel.hf.config import Shape
from peergrad.parallel.hf.rope import Rope
from peergrad.parallel.optimizer import learning_rate, schedule_updates

JUMP = 1e-3
"""Change of the learning rate, as a part of its peak, that is too small to matter."""


def require_resumable(path: Path, meta: dict[str, Any], shape: Shape, config: Config) -> None:
    """ValueError unless a run of ``config``, whose model is of ``shape``, can go on from checkpoint
    ``path``, which ``meta`` describes."""
    require_same_model("run.resume", path, meta, shape)
    require_same_optimizer(path, meta, config.parallel.distributed_optimizer, config.model.dtype)
    require_same_course(path, meta, config)


def require_same_model(key: str, path: Path, meta: dict[str, Any], shape: Shape) -> None:
    """ValueError, which names ``key``, unless checkpoint ``path`` is of a model of ``shape``."""
    ours = asdict(shape)
    for name, theirs in _described(meta["shape"]).items():
        require(
            ours.get(name) == theirs,
            key,
            str(path),
            f"is of another model ({name} {theirs} instead of {ours.get(name)})",
            "set model.path to the model it was made from",
        )


def _described(shape: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's shape. Two fields of those from before there were more ropes meant the default
    one, or Llama 3.1's with its own numbers."""
    if "rope_theta" not in shape:
        return shape
    rest = {name: x for name, x in shape.items() if name not in ("rope_theta", "rope_factor")}
    rope = Rope(shape["rope_theta"])
    if (factor := shape["rope_factor"]) is not None:
        rope = replace(rope, kind="llama3", factor=factor, original=8192, slow=1.0, fast=4.0)
    return {**rest, "rope": asdict(rope)}


def describe_optimizer(optimizer: MegatronOptimizer) -> dict[str, Any]:
    """How the optimizer's state is kept, which decides who can read it."""
    wrapper = (getattr(optimizer, "chained_optimizers", None) or [optimizer])[0]
    return {
        "distributed": type(wrapper).__name__ == "DistributedOptimizer",
        "kind": type(wrapper.optimizer).__name__,
    }


def require_same_optimizer(path: Path, meta: dict[str, Any], ours: bool, dtype: Dtype) -> None:
    """Refuse an optimizer state that Megatron cannot read: of another setting than ``ours`` of
    ``parallel.distributed_optimizer``, or undistributed and of another precision."""
    theirs = _distributed(path, meta)
    require(
        theirs in (ours, None),
        "parallel.distributed_optimizer",
        ours,
        f"checkpoint {path} was written with {theirs}",
        f"resume with parallel.distributed_optimizer={theirs}",
    )
    require(
        ours or meta["dtype"] == dtype.name,
        "model.dtype",
        dtype.name,
        f"checkpoint {path} was written with {meta['dtype']} and without the distributed "
        "optimizer, whose state alone fits both precisions",
        f"resume with model.dtype={meta['dtype']}",
    )


def _distributed(path: Path, meta: dict[str, Any]) -> bool | None:
    """Whether checkpoint ``path`` holds the state of a distributed optimizer; None: not known."""
    try:
        return bool(meta["optimizer"]["distributed"])
    except (KeyError, TypeError):  # of an older peergrad
        try:
            common = torch.load(path / "model" / "common.pt", weights_only=False)
            return "param_state_sharding_type" in common["optimizer"]
        except Exception:
            return None  # damaged: loading it will say so


def require_same_course(path: Path, meta: dict[str, Any], config: Config) -> None:
    """Refuse a run that ends before checkpoint ``path``, and one whose next learning rate another
    length of the run would move. ``optim`` itself may be changed: see ``moved_rate``."""
    steps, optim = config.run.steps, config.optim
    require(
        meta["step"] <= steps,
        "run.steps",
        steps,
        f"checkpoint {path} was taken after step {meta['step']}",
        f"use {meta['step']} or more, or choose a new run.name",
    )
    before, now = meta.get("schedule_updates"), schedule_updates(config)
    if before is None or optim.decay_steps is not None:  # of an older peergrad; or chosen
        return
    if meta.get("schedule") not in (optim.schedule.name, None):  # another one is chosen, too
        return
    was, will = (learning_rate(optim, update=meta["updates"], total=n) for n in (before, now))
    require(
        abs(was - will) <= JUMP * optim.lr,
        "optim.decay_steps",
        None,
        f"the learning rate would jump from {was:.3g} to {will:.3g} at the resume, as "
        f"optim.schedule={optim.schedule.name} of checkpoint {path} was to end at optimizer step "
        f"{before} and now at {now}",
        f"set it to {max(1, before * steps // now)} to keep the course, or to {steps} to jump",
    )


def moved_rate(meta: dict[str, Any], config: Config) -> tuple[float, float] | None:
    """(the learning rate that the checkpoint's run would have gone on with, this run's), if they
    differ; None also for a checkpoint of an older peergrad."""
    was, will = meta.get("next_lr"), next_rate(config, meta["updates"])
    if was is None or abs(was - will) <= JUMP * max(was, will):
        return None
    return was, will


def next_rate(config: Config, updates: int) -> float:
    """The learning rate of the optimizer step after ``updates``."""
    return learning_rate(config.optim, update=updates, total=schedule_updates(config))
