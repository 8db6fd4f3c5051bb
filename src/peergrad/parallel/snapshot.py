"""The folder format of a checkpoint: Megatron's torch_dist state, a description, one rename.

``model/`` holds weights and, in a run's checkpoint, the optimizer, readable at any TP x PP x DP;
``hf/`` configuration and tokenizer; ``meta.json`` step, shape and the size of every file. It is all
written under a hidden name, flushed to disk, and appears by one rename; ``latest`` beside it is
written after that. Whatever moment a job dies at, the newest visible checkpoint is whole.
"""

import json
import os
import shutil
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer

from peergrad.parallel.groups import Groups
from peergrad.parallel.hf.config import Shape
from peergrad.parallel.hf.files import copy_companions
from peergrad.parallel.model import PolicyModel
from peergrad.running.lifetime import die_with_parent

FORMAT = 1


def save_weights(
    path: Path, model: PolicyModel, shape: Shape, groups: Groups, *, companions: Path
) -> None:
    """Write a checkpoint of weights alone (no optimizer): what a conversion makes. Collective."""
    partial = path.with_name(f".{path.name}.partial")
    groups.share(lambda: fresh(partial))
    save_megatron(partial / "model", model, None)

    def finish() -> None:
        copy_companions(companions, partial / "hf")
        write_meta(partial, model, shape, step=0, updates=0, groups=groups)
        publish(partial, path)

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
    require_same_model(path, read_meta(path), shape)
    load_megatron(path / "model", model, None)


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


def require_same_model(path: Path, meta: dict[str, Any], shape: Shape) -> None:
    ours = asdict(shape)
    other = {k: (v, ours.get(k)) for k, v in meta["shape"].items() if ours.get(k) != v}
    if other:
        key, (theirs, mine) = next(iter(other.items()))
        raise ValueError(
            f"checkpoint {path}: is of another model ({key} {theirs} instead of {mine}); "
            "set model.path to the model it was made from"
        )


def fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "model").mkdir(parents=True)


def write_meta(
    folder: Path, model: PolicyModel, shape: Shape, *, step: int, updates: int, groups: Groups
) -> None:
    files = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    meta = {
        "format": FORMAT,
        "step": step,
        "updates": updates,
        "world": groups.world,
        "dtype": str(model.config.params_dtype).removeprefix("torch."),
        "shape": asdict(shape),
        "files": files,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def publish(partial: Path, target: Path) -> None:
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
        _fill_adam(_sharded_adam(optimizer))
        state["optimizer"] = optimizer.sharded_state_dict(
            state, is_loading=loading, metadata=_metadata()
        )
    return state


def save_megatron(path: Path, model: PolicyModel, optimizer: MegatronOptimizer | None) -> None:
    _start_result_queue()
    described = {key: value for key, value in _metadata().items() if key != "dp_cp_group"}
    dist_checkpointing.save(
        _sharded(model, optimizer, loading=False), str(path), content_metadata=described
    )


def _start_result_queue() -> None:
    """Megatron's first save starts a process that holds the queue of the writers' results, and that
    would live on for ever if this rank were killed. Started here, it ends with this rank."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=get_context("spawn"))
        manager.start(die_with_parent, (os.getpid(),))
        filesystem_async._results_queue = manager.Queue()


def load_megatron(path: Path, model: PolicyModel, optimizer: MegatronOptimizer | None) -> None:
    inner = _sharded_adam(optimizer)
    state = dist_checkpointing.load(_sharded(model, optimizer, loading=True), str(path))
    model.load_state_dict(state["model"])
    if inner is not None:
        _load_sharded_adam(inner, state["optimizer"])
    elif optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])


def _sharded_adam(optimizer: MegatronOptimizer | None) -> Any:
    """Megatron's distributed optimizer if it holds a torch AdamW (no Transformer Engine, no
    apex)."""
    chained = getattr(optimizer, "chained_optimizers", [])
    if len(chained) == 1 and type(chained[0]).__name__ == "DistributedOptimizer":
        return chained[0] if isinstance(chained[0].optimizer, torch.optim.AdamW) else None
    return None


def _fill_adam(optimizer: Any) -> None:
    """Give a torch AdamW that has not stepped yet its initial state: Megatron cannot describe an
    empty one, neither to load into it nor to save it."""
    if optimizer is None:
        return
    inner = optimizer.optimizer
    for group in inner.param_groups:
        for parameter in group["params"]:
            if not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


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
