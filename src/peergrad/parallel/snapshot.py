"""The folder format of a checkpoint: Megatron's torch_dist state, a description, one rename.

``model/`` holds weights and, in a run's checkpoint, the optimizer, readable at any TP x PP x DP;
``hf/`` configuration and tokenizer; ``meta.json`` step, shape, size and digest of every file. It is
all written under a hidden name, flushed to disk, and appears by one rename; in a run ``latest``
beside it is written after that. Whatever moment a job dies at, the newest visible checkpoint is
whole.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer import MegatronOptimizer

from peergrad.echo import is_echo
from peergrad.parallel.damage import (
    FORMAT,
    culprit,
    damage,
    describe_files,
    first_line,
    read_meta,
    sealed,
    verify,
)
from peergrad.parallel.fp8 import keep_exact
from peergrad.parallel.hf.companions import Companions
from peergrad.parallel.hf.config import Shape
from peergrad.parallel.mesh import Mesh
from peergrad.parallel.model import PolicyModel, Stage
from peergrad.parallel.renaming import as_written
from peergrad.parallel.resume import describe_optimizer, require_same_model
from peergrad.parallel.saving import Write
from peergrad.storage import flush, partial_of, put_in_place, writing

log = logging.getLogger(__name__)
CONFIGURED = ("betas", "eps", "weight_decay", "max_lr", "min_lr")


class Unloadable(ValueError):
    """What is wrong with a checkpoint, said without its name: "is damaged: FILE (...)"."""


def save_weights(
    path: Path, model: Stage, shape: Shape, mesh: Mesh, *, companions: Companions
) -> None:
    """Write a checkpoint of weights alone (no optimizer): what a conversion makes. Collective.

    Something of that name is refused. Raises StorageError if the disk refuses.
    """
    partial = new_snapshot("checkpoint", path, mesh)
    with filling("checkpoint", path, partial, mesh):
        digests = write_megatron(partial / "model", model, None, aside=False).finish()
        dtype = str(model.config.params_dtype).removeprefix("torch.")
        mesh.barrier()
        mesh.share(lambda: companions.write(partial / "hf", dtype=dtype))
        meta = describe(model, shape, None, mesh, step=0, updates=0)
        write_meta(partial, meta, mesh, known=digests)
        mesh.share(lambda: put_in_place(partial, path, replace=False))


def load_weights(
    path: Path, model: Stage, shape: Shape, mesh: Mesh, *, key: str = "model.weights"
) -> None:
    """Fill ``model`` from the weights of checkpoint ``path``. Collective.

    Raises ValueError, which names it ``key``, if it is missing, damaged, or of another model.
    """
    start = time.monotonic()
    remedy = "name another step folder, or make it again with tools/hf_to_megatron.py"
    problem = mesh.share(lambda: damage(path)) or verify(path, mesh)
    if problem is not None:
        raise ValueError(f"{key} = {str(path)!r}: is no whole checkpoint ({problem}); {remedy}")
    require_same_model(key, path, read_meta(path), shape)
    try:
        load_megatron(path / "model", model, None)
    except Unloadable as error:
        raise ValueError(f"{key} = {str(path)!r}: {error}; {remedy}") from error.__cause__
    log.info("read the weights of %s in %.1f s", path, time.monotonic() - start)


def new_snapshot(what: str, target: Path, mesh: Mesh, *, then: Callable[[], str] = str) -> Path:
    """A fresh hidden folder beside ``target``, the same on every rank, to be filled (``filling``)
    and put in place. Collective. Raises StorageError if the disk refuses, which calls the target
    ``what`` and ends in ``then()``."""
    with writing(what, target, then=then):
        return mesh.share(lambda: _fresh(target))


@contextmanager
def filling(
    what: str, target: Path, partial: Path, mesh: Mesh, *, then: Callable[[], str] = str
) -> Iterator[None]:
    """The body writes into ``partial``, which ``new_snapshot`` made for ``target``; it is removed
    if that fails. Raises as ``new_snapshot`` does."""
    try:
        with writing(what, target, then=then):
            yield
    except BaseException:
        if mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _fresh(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    steps = "step_*" if target.name.startswith("step_") else None  # one writer for all of a run's
    partial = partial_of(target, siblings=steps)
    (partial / "model").mkdir(parents=True)
    return partial


def on_every_rank(mesh: Mesh, function: Callable[[], object]) -> None:
    """Run ``function``, which has no collective, on every rank. If it fails anywhere it fails
    everywhere, so that no rank waits for another: own errors as they are. Collective."""
    failure: Exception | None = None
    try:
        function()
    except Exception as error:
        failure = error
    mine = None if failure is None else (isinstance(failure, ValueError), str(failure))
    found = [other for other in mesh.gather(mine) if other is not None]
    if failure is not None:
        raise failure
    for wrong_value, text in found:
        raise (ValueError if wrong_value else RuntimeError)(text)


def describe(
    model: Stage,
    shape: Shape,
    optimizer: MegatronOptimizer | None,
    mesh: Mesh,
    **progress: float | str,
) -> dict[str, Any]:
    """What ``meta.json`` says of a checkpoint beside its files.

    ``progress``: ``step`` and ``updates`` done, and in a run's checkpoint ``schedule``,
    ``schedule_updates`` and ``next_lr``.
    """
    return {
        "format": FORMAT,
        **progress,
        "world": mesh.world,
        "dtype": str(model.config.params_dtype).removeprefix("torch."),
        "optimizer": None if optimizer is None else describe_optimizer(optimizer),
        "shape": asdict(shape),
    }


def write_meta(
    folder: Path, meta: Mapping[str, Any], mesh: Mesh, *, known: Mapping[str, str]
) -> None:
    """Write meta.json of the checkpoint ``folder``, which is complete but for this. ``known``:
    digests that this rank has taken already, by the files' names. Collective."""
    text = json.dumps(sealed({**meta, **describe_files(folder, mesh, known)}), indent=1)
    mesh.share(lambda: (folder / "meta.json").write_text(text))


def point_to(target: Path) -> None:
    """Make ``latest`` beside the checkpoint ``target`` name it."""
    pointer = target.with_name("latest.partial")
    pointer.write_text(target.name)
    flush(pointer)
    pointer.replace(target.with_name("latest"))
    flush(target.parent)


def _metadata() -> dict[str, Any]:
    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        # The only sharding of the distributed optimizer that any other layout can read.
        "distrib_optim_sharding_type": "fully_reshardable",
    }


def _sharded(model: Stage, optimizer: MegatronOptimizer | None, *, loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {
        key: piece.sharded_state_dict(metadata=_metadata()) for key, piece in _keyed(model)
    }
    if optimizer is not None:
        _fill_adam(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(
            state, is_loading=loading, metadata=_metadata()
        )
    return state


def _keyed(model: Stage) -> Iterator[tuple[str, PolicyModel]]:
    """The pieces, and where their state is held while it is saved or loaded; in the files tensors
    go by the numbers of their layers."""
    for i, piece in enumerate(model.pieces):
        yield f"model{i}" if i else "model", piece


def write_megatron(
    path: Path, model: Stage, optimizer: MegatronOptimizer | None, *, aside: bool
) -> Write:
    """Begin to write model and optimizer; ``aside``: a copy of them. Collective."""
    described = {key: value for key, value in _metadata().items() if key != "dp_cp_group"}
    return Write(path, _sharded(model, optimizer, loading=False), described, aside=aside)


def load_megatron(path: Path, model: Stage, optimizer: MegatronOptimizer | None) -> None:
    """Fill model and optimizer from what ``write_megatron`` wrote; what ``optim`` configures stays
    as it is. Collective. Raises Unloadable."""
    groups = [] if optimizer is None else optimizer.param_groups
    before = [dict(group) for group in groups]
    wanted = _sharded(model, optimizer, loading=True)
    try:
        _fill(wanted, path, model, optimizer)
    except (KeyboardInterrupt, SystemExit, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        if is_echo(error):
            raise
        file = culprit(path)
        raise Unloadable(
            f"is damaged: {file}" if file else f"cannot be loaded ({first_line(error)})"
        ) from error
    groups = [] if optimizer is None else optimizer.param_groups
    for group, own in zip(groups, before, strict=True):
        for key, value in own.items():
            group.setdefault(key, value)  # torch's Adam knows fewer keys than Transformer Engine's
        configured = {k: own[k] for k in CONFIGURED if k in own}
        changed = {k: v for k, v in configured.items() if group[k] != v}
        if changed:
            log.info("optimizer: %s as configured now, not as in %s", changed, path)
        group.update(configured)


def _fill(
    wanted: dict[str, Any], path: Path, model: Stage, optimizer: MegatronOptimizer | None
) -> None:
    state = dist_checkpointing.load(as_written(wanted, str(path)), str(path))
    for key, piece in _keyed(model):
        piece.load_state_dict(state[key])
        for name, parameter in piece.named_parameters() if optimizer is None else ():
            keep_exact(parameter, state[key][name])
    if optimizer is None:
        return
    chained, saved = _chained(optimizer), state["optimizer"]
    parts = [saved] if len(chained) == 1 else [saved[i] for i in range(len(chained))]
    for wrapper, part in zip(chained, parts, strict=True):
        if not isinstance(wrapper.optimizer, torch.optim.AdamW):
            wrapper.load_state_dict(part)
        elif type(wrapper).__name__ == "DistributedOptimizer":
            _load_sharded_adam(wrapper, part)
        else:
            # Megatron leaves out a step of 0, which its loader then misses.
            part.get("optimizer", part)["state"].setdefault("common_step", torch.tensor(0.0))
            wrapper.load_state_dict(part)


def _chained(optimizer: MegatronOptimizer) -> list[Any]:
    """Megatron's optimizers: one, and of a mixture of experts another one for these. Each wraps a
    torch AdamW, or one of Transformer Engine's or apex's."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _fill_adam(optimizer: MegatronOptimizer) -> None:
    """Give an Adam that has not stepped yet its initial state: Megatron cannot describe an empty
    one to save it or load into it, and what it saves of torch's cannot be loaded."""
    for inner in (wrapper.optimizer for wrapper in _chained(optimizer)):
        fused = hasattr(inner, "initialize_state")  # Transformer Engine's
        for group in inner.param_groups if fused or isinstance(inner, torch.optim.AdamW) else ():
            if fused:
                group.setdefault("step", 0)
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    _fill_state(inner, parameter)


def _fill_state(inner: Any, parameter: torch.nn.Parameter) -> None:
    """What the first step of torch's AdamW or of Transformer Engine's FusedAdam begins with."""
    if isinstance(inner, torch.optim.AdamW):
        inner.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    else:
        remainders = inner.store_param_remainders and parameter.dtype is torch.bfloat16
        inner.initialize_state(parameter, remainders)


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
