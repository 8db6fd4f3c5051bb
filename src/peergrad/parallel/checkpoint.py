"""Saving and restoring a run, atomically and for any later layout.

A checkpoint is a folder ``step_000012``: ``model/`` (Megatron's torch_dist format: weights and, in a
run's checkpoint, the optimizer, readable at any TP x PP x DP), ``rng_<rank>.pt``, ``collector.pt``
(prompt position and unfinished groups), ``hf/`` (configuration and tokenizer) and ``meta.json``. It
is written under a hidden name, flushed to disk, and appears by one rename; ``latest`` is written
after that. Whatever moment a job dies at, the newest visible checkpoint is whole.
"""

import json
import logging
import os
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer import MegatronOptimizer

from peergrad.config import CheckpointConfig
from peergrad.parallel.groups import Groups
from peergrad.parallel.hf.config import Shape
from peergrad.parallel.hf.files import copy_companions
from peergrad.parallel.model import PolicyModel
from peergrad.parallel.policy import Policy

log = logging.getLogger(__name__)
FORMAT = 1


class Checkpoints:
    """The checkpoints of one run; ``folder`` is ``<run>/checkpoints``."""

    def __init__(self, folder: Path, config: CheckpointConfig, groups: Groups) -> None:
        self.folder, self.config, self.groups = folder, config, groups

    def due(self, step: int, last: int) -> bool:
        """Whether the state after ``step`` of ``last`` steps is to be kept."""
        return step == last or (self.config.every > 0 and step % self.config.every == 0)

    def save(self, policy: Policy, collector: bytes | None, *, step: int) -> Path:
        """Write the state after ``step``. Collective. Saving a step again replaces it."""
        target = self.folder / f"step_{step:06d}"
        partial = self.folder / f".{target.name}.partial"
        self.groups.share(lambda: _fresh(partial))
        _save_megatron(partial / "model", policy.model, policy.optimizer)
        torch.save(_rng_state(), partial / f"rng_{self.groups.rank:05d}.pt")

        def finish() -> None:
            if collector is not None:
                (partial / "collector.pt").write_bytes(collector)
            copy_companions(Path(policy.config.model.path), partial / "hf")
            _write_meta(partial, policy.shape, step=step, updates=policy.updates, groups=self.groups)
            _publish(partial, target)
            self._prune()

        self.groups.barrier()
        self.groups.share(finish)
        return target

    def restore(self, policy: Policy) -> int:
        """Load the newest checkpoint into ``policy``; the step it was taken after, 0 if there is
        none. Collective. ValueError for a damaged or foreign one, unless ``checkpoint.fallback``
        finds an older whole one."""
        path = self.groups.share(self._newest)
        if path is None:
            return 0
        meta = read_meta(path)
        _require_same_model(path, meta, policy.shape)
        _load_megatron(path / "model", policy.model, policy.optimizer)
        policy.updates = meta["updates"]
        rng = path / f"rng_{self.groups.rank:05d}.pt"
        if meta["world"] == self.groups.world and rng.exists():
            _set_rng_state(torch.load(rng, weights_only=False))
        log.info("resumed from %s", path)
        return int(meta["step"])

    def collector_state(self, step: int) -> bytes | None:
        """What the collector saved with the checkpoint of ``step``; None if there is none."""
        path = self.folder / f"step_{step:06d}" / "collector.pt"
        return path.read_bytes() if path.exists() else None

    def _newest(self) -> Path | None:
        """The checkpoint to resume from: the one ``latest`` names, or with ``fallback`` the newest
        one that is whole."""
        pointer = self.folder / "latest"
        if not pointer.exists():
            return None
        named = self.folder / pointer.read_text().strip()
        problem = damage(named)
        if problem is None:
            return named
        if self.config.fallback:
            for path in sorted(self.folder.glob("step_*"), reverse=True):
                if damage(path) is None:
                    log.warning("%s is damaged (%s): falling back to %s", named, problem, path)
                    return path
        raise ValueError(
            f"run.resume = True: checkpoint {named} is damaged ({problem}); set "
            "checkpoint.fallback=true to use an older one, or choose a new run.name"
        )

    def _prune(self) -> None:
        whole = sorted(self.folder.glob("step_*"))
        for path in whole[: -self.config.keep] if self.config.keep else []:
            # Hidden first: a crash in the middle of rmtree must not leave a half that looks whole.
            doomed = path.replace(path.with_name(f".{path.name}.old"))
            shutil.rmtree(doomed)


def save_weights(
    path: Path, model: PolicyModel, shape: Shape, groups: Groups, *, companions: Path
) -> None:
    """Write a checkpoint of weights alone (no optimizer): what a conversion makes. Collective."""
    partial = path.with_name(f".{path.name}.partial")
    groups.share(lambda: _fresh(partial))
    _save_megatron(partial / "model", model, None)

    def finish() -> None:
        copy_companions(companions, partial / "hf")
        _write_meta(partial, shape, step=0, updates=0, groups=groups)
        _publish(partial, path)

    groups.barrier()
    groups.share(finish)


def load_weights(path: Path, model: PolicyModel, shape: Shape) -> None:
    """Fill ``model`` from the weights of checkpoint ``path``. Collective.

    Raises ValueError if it is missing, damaged, or of another model.
    """
    problem = damage(path)
    if problem is not None:
        raise ValueError(
            f"model.weights = {str(path)!r}: is no whole checkpoint ({problem}); "
            "name a step folder written by a run or by tools/hf_to_megatron.py"
        )
    _require_same_model(path, read_meta(path), shape)
    _load_megatron(path / "model", model, None)


def read_meta(path: Path) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((path / "meta.json").read_text())
    return meta


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint folder ``path``; None if it is whole.

    Compares the size of every file with the list in ``meta.json``.
    """
    if not path.is_dir():
        return "no such folder"
    try:
        meta = read_meta(path)
    except (OSError, ValueError) as error:
        return f"meta.json: {error}"
    if meta.get("format") != FORMAT:
        return f"format {meta.get('format')} instead of {FORMAT}"
    for name, size in meta["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def _require_same_model(path: Path, meta: dict[str, Any], shape: Shape) -> None:
    ours = asdict(shape)
    other = {k: (v, ours.get(k)) for k, v in meta["shape"].items() if ours.get(k) != v}
    if other:
        key, (theirs, mine) = next(iter(other.items()))
        raise ValueError(
            f"checkpoint {path}: is of another model ({key} {theirs} instead of {mine}); "
            "set model.path to the model it was made from"
        )


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "model").mkdir(parents=True)


def _write_meta(folder: Path, shape: Shape, *, step: int, updates: int, groups: Groups) -> None:
    files = {
        str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()
    }
    meta = {
        "format": FORMAT,
        "step": step,
        "updates": updates,
        "world": groups.world,
        "shape": asdict(shape),
        "files": files,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _publish(partial: Path, target: Path) -> None:
    """Flush ``partial`` to disk, rename it to ``target``, then point ``latest`` at it."""
    for path in [*partial.rglob("*"), partial]:
        _flush(path)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.replace(old)
    partial.replace(target)
    _flush(target.parent)
    pointer = target.with_name("latest.partial")
    pointer.write_text(target.name)
    _flush(pointer)
    pointer.replace(target.with_name("latest"))
    _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def _metadata() -> dict[str, Any]:
    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        # The only sharding of the distributed optimizer that any other layout can read.
        "distrib_optim_sharding_type": "fully_reshardable",
    }


def _sharded(
    model: PolicyModel, optimizer: MegatronOptimizer | None, *, loading: bool
) -> dict[str, Any]:
    state: dict[str, Any] = {"model": model.sharded_state_dict(metadata=_metadata())}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(
            state, is_loading=loading, metadata=_metadata()
        )
    return state


def _save_megatron(path: Path, model: PolicyModel, optimizer: MegatronOptimizer | None) -> None:
    described = {key: value for key, value in _metadata().items() if key != "dp_cp_group"}
    dist_checkpointing.save(
        _sharded(model, optimizer, loading=False), str(path), content_metadata=described
    )


def _load_megatron(path: Path, model: PolicyModel, optimizer: MegatronOptimizer | None) -> None:
    inner = _sharded_adam(optimizer)
    if inner is not None:
        inner._init_optimizer_states_with_dummy_values()  # a fresh torch AdamW cannot be described
    state = dist_checkpointing.load(_sharded(model, optimizer, loading=True), str(path))
    model.load_state_dict(state["model"])
    if inner is not None:
        _load_sharded_adam(inner, state["optimizer"])
    elif optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])


def _sharded_adam(optimizer: MegatronOptimizer | None) -> Any:
    """Megatron's distributed optimizer if it holds a torch AdamW (no Transformer Engine, no apex)."""
    chained = getattr(optimizer, "chained_optimizers", [])
    if len(chained) == 1 and type(chained[0]).__name__ == "DistributedOptimizer":
        return chained[0] if isinstance(chained[0].optimizer, torch.optim.AdamW) else None
    return None


@torch.no_grad()
def _load_sharded_adam(optimizer: Any, state: dict[str, Any]) -> None:
    """Megatron 0.16's loader with torch AdamW fails on the missing 'step' and, worse, gives all
    parameters one shared step tensor that every parameter increments: wrong bias correction without
    an error. So steps are taken out, states loaded, and each parameter gets a step of its own."""
    parameters = state.pop("param_state")
    state.pop("param_state_sharding_type")
    optimizer.load_state_dict(state)
    inner = optimizer.optimizer
    for values in inner.state.values():
        values.pop("step")
    optimizer.load_parameter_state_from_fully_reshardable(parameters)
    for group in inner.param_groups:
        for parameter in group["params"]:
            inner.state[parameter]["step"] = torch.tensor(float(group["step"]))
