"""The checkpoints of a run: save, restore, prune. The folder format is in ``snapshot``.

Beside Megatron's state a run keeps ``rng_<rank>.pt``, ``collector.pt`` (the prompt position and the
groups that were waiting or in flight), ``algo.json`` (what the objective remembers) and, once the
reference has been replaced by a policy of the run, ``reference/``.
"""

import json
import logging
import random
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peergrad.config import CheckpointConfig, require
from peergrad.parallel.damage import (
    damage,
    first_line,
    read_meta,
    verify,
)
from peergrad.parallel.mesh import Mesh
from peergrad.parallel.optimizer import schedule_updates
from peergrad.parallel.policy import Policy, Scorer
from peergrad.parallel.resume import (
    moved_rate,
    next_rate,
    require_resumable,
)
from peergrad.parallel.saving import Write
from peergrad.parallel.snapshot import (
    Unloadable,
    describe,
    filling,
    load_megatron,
    new_snapshot,
    on_every_rank,
    point_to,
    write_megatron,
    write_meta,
)
from peergrad.storage import put_in_place, remove, restore_old, size_of

log = logging.getLogger(__name__)
REFERENCE, ALGO = "reference", "algo.json"
STEP = re.compile(r"step_\d{6,}")


@dataclass(frozen=True)
class Saved:
    """A checkpoint on the disk."""

    target: Path
    size: int  # bytes
    seconds: float  # since it was begun


@dataclass(frozen=True)
class _Pending:
    """A checkpoint whose files are being written."""

    step: int
    start: float  # on the monotonic clock
    target: Path
    folder: Path  # where it is until it is whole
    meta: dict[str, Any]
    writes: list[Write]


class Checkpoints:
    """The checkpoints of one run; ``folder`` is ``<run>/checkpoints``."""

    def __init__(self, folder: Path, config: CheckpointConfig, mesh: Mesh) -> None:
        self.folder, self.config, self.mesh = folder, config, mesh
        self._pending: _Pending | None = None
        self._rotten: dict[Path, str] = {}  # folders that look whole, and what reading them found

    def due(self, step: int, last: int) -> bool:
        """Whether the state after ``step`` of ``last`` steps is to be kept."""
        return step == last or (self.config.every > 0 and step % self.config.every == 0)

    def save(
        self,
        policy: Policy,
        collector: bytes | None,
        algo: Mapping[str, object],
        reference: Scorer | None,
        *,
        step: int,
    ) -> Path:
        """``begin`` and ``finish``; the folder."""
        self.begin(policy, collector, algo, reference, step=step, aside=False)
        return self.finish().target

    def begin(
        self,
        policy: Policy,
        collector: bytes | None,
        algo: Mapping[str, object],
        reference: Scorer | None,
        *,
        step: int,
        aside: bool,
    ) -> None:
        """Begin to write the state after ``step``, of which ``finish`` makes a checkpoint.
        Collective. No other one may be on its way.

        ``reference``: None if it can be had from where the run was started. ``aside``: copy weights
        and optimizer to the host's memory first, so that training may go on until ``finish``.
        Raises StorageError if the disk refuses; older checkpoints are then as they were.
        """
        assert self._pending is None, "two checkpoints at once"
        start = time.monotonic()
        target = self.folder / f"step_{step:06d}"
        then = partial(self._then, target)
        policy.gather()
        folder = new_snapshot("checkpoint", target, self.mesh, then=then)
        with filling("checkpoint", target, folder, self.mesh, then=then):
            writes = [write_megatron(folder / "model", policy.model, policy.optimizer, aside=aside)]
            if reference is not None:
                self.mesh.share((folder / REFERENCE).mkdir)
                model = reference.model
                writes.append(write_megatron(folder / REFERENCE, model, None, aside=aside))
            rng = folder / f"rng_{self.mesh.rank:05d}.pt"
            on_every_rank(self.mesh, lambda: rng.write_bytes(_rng_state()))

            def complete() -> None:
                if collector is not None:
                    (folder / "collector.pt").write_bytes(collector)
                (folder / ALGO).write_text(json.dumps(algo))
                policy.companions.write(folder / "hf", dtype=policy.config.model.dtype.name)

            self.mesh.share(complete)
        meta = describe(
            policy.model,
            policy.shape,
            policy.optimizer,
            self.mesh,
            step=step,
            updates=policy.updates,
            schedule_updates=schedule_updates(policy.config),
            schedule=policy.config.optim.schedule.name,
            next_lr=next_rate(policy.config, policy.updates),
        )
        self._pending = _Pending(step, start, target, folder, meta, writes)

    def written(self) -> bool:
        """Whether ``finish`` would not wait for any rank's files. Collective."""
        assert self._pending is not None
        return all(self.mesh.gather(all(write.done for write in self._pending.writes)))

    def finish(self) -> Saved:
        """Wait for what ``begin`` has begun, and make it the newest checkpoint. Collective. Saving
        a step again replaces it. Raises as ``begin``."""
        pending, self._pending = self._pending, None
        assert pending is not None
        target, folder = pending.target, pending.folder
        then = partial(self._then, target)
        with filling("checkpoint", target, folder, self.mesh, then=then):
            known: dict[str, str] = {}
            for write in pending.writes:
                known |= write.finish()

            def finish() -> int:
                put_in_place(folder, target)
                point_to(target)
                return size_of(target)

            write_meta(folder, pending.meta, self.mesh, known=known)
            size = self.mesh.share(finish)
        self.mesh.share(lambda: self._prune(pending.step))
        self._log("saved", target, pending.step, pending.start)
        return Saved(target, size, time.monotonic() - pending.start)

    def _then(self, target: Path) -> str:
        """What a person can do once the disk takes checkpoints again."""
        whole = [p for p in self._steps() if p != target and damage(p) is None]
        if not whole:
            return ", then start anew (there is no older checkpoint)"
        return f", then resume with run.resume=true: {whole[0].name} is whole"

    def _log(self, done: str, path: Path, step: int, start: float) -> None:
        if self.mesh.rank == 0:
            seconds, size = time.monotonic() - start, size_of(path)
            log.info("%s %s: step %d, %d bytes in %.1f s", done, path, step, size, seconds)

    def restore(self, policy: Policy) -> int:
        """Load the newest checkpoint into ``policy``; the step it was taken after, 0 if there is
        none. Collective. ValueError for a damaged or foreign one, unless ``checkpoint.fallback``
        finds an older whole one."""
        start = time.monotonic()
        path = self._newest_verified()
        if path is None:
            return 0
        meta = self.mesh.share(lambda: read_meta(path))
        require_resumable(path, meta, policy.shape, policy.config)
        if self.mesh.rank == 0 and (rates := moved_rate(meta, policy.config)) is not None:
            log.warning("%s was to go on at the learning rate %.3g; now it is %.3g", path, *rates)
        try:
            load_megatron(path / "model", policy.model, policy.optimizer)
        except Unloadable as error:
            raise self._refused(path, str(error)) from error.__cause__
        policy.updates = meta["updates"]
        on_every_rank(self.mesh, lambda: self._restore_rng(path, meta["world"]))
        self._log("resumed from", path, meta["step"], start)
        return int(meta["step"])

    def _newest_verified(self) -> Path | None:
        """``_newest``, every bit of it. Collective."""
        self._rotten.clear()
        while (path := self.mesh.share(self._newest)) is not None:
            self._require_shared(path)
            problem = verify(path, self.mesh)
            if problem is None:
                break
            self._rotten[path] = problem
        return path

    def _restore_rng(self, path: Path, world: int) -> None:
        file = path / f"rng_{self.mesh.rank:05d}.pt"
        if world != self.mesh.world:
            return
        try:
            _set_rng_state(_read_rng_state(file))
        except Exception as error:
            text = f"is damaged: {file.name} ({first_line(error)})"
            raise self._refused(path, text) from error

    def _require_shared(self, path: Path) -> None:
        """Every rank must see the checkpoint: on several machines, a shared disk. Collective."""
        blind = [rank for rank, seen in enumerate(self.mesh.gather(path.is_dir())) if not seen]
        require(
            not blind,
            "run.resume",
            True,
            f"checkpoint {path.absolute()} is not there on the machines of ranks {blind[:8]}",
            "put run.root on a disk that all machines share",
        )

    def collector_state(self, step: int) -> bytes | None:
        """What the collector saved with the checkpoint of ``step``; None if there is none."""
        path = self.folder / f"step_{step:06d}" / "collector.pt"
        return path.read_bytes() if path.exists() else None

    def algo_state(self, step: int) -> dict[str, object] | None:
        """What the objective remembered after ``step``; None if nothing was saved."""
        path = self.folder / f"step_{step:06d}" / ALGO
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_bytes())
            if isinstance(found, dict):
                return found
            text = f"is damaged: {ALGO} (no object)"
            raise self._refused(path.parent, text)
        except json.JSONDecodeError as error:
            text = f"is damaged: {ALGO} ({error})"
            raise self._refused(path.parent, text) from error

    def restore_reference(self, reference: Scorer, step: int) -> None:
        """Load the reference that was saved after ``step``. Collective. ValueError if it is
        damaged."""
        path = self.folder / f"step_{step:06d}"
        require(
            (path / REFERENCE).is_dir(),
            "run.resume",
            True,
            f"checkpoint {path} has no {REFERENCE}/, though the policy had become the reference",
            "set algo.kl.coef=0, or choose a new run.name",
        )
        try:
            load_megatron(path / REFERENCE, reference.model, None)
        except Unloadable as error:
            raise self._refused(path, str(error)) from error.__cause__

    def _steps(self) -> list[Path]:
        """The step folders, the newest first."""
        found = [p for p in self.folder.glob("step_*") if STEP.fullmatch(p.name) and p.is_dir()]
        return sorted(found, key=_number, reverse=True)

    def _newest(self) -> Path | None:
        """The checkpoint to resume from: the one ``latest`` names, or with ``fallback`` the newest
        one that is whole."""
        for old in self.folder.glob(".step_*.old"):  # a job that died between two renames
            if damage(old) is None:
                restore_old(old.with_name(old.name[1:].removesuffix(".old")))
        if not self._steps() and not (self.folder / "latest").exists():
            log.warning("%s holds no checkpoint: starting from the beginning", self.folder)
            return None
        named, problem = self._latest()
        if named is not None:
            problem = self._problem(named)
            if problem is None:
                return named
        whole = next((path for path in self._steps() if self._problem(path) is None), None)
        if problem is None and whole is not None:  # a job that died before it wrote latest
            return whole
        problem = problem or "no step folder is whole"
        if self.config.fallback and whole is not None:
            log.warning("%s: %s; falling back to %s", named or self.folder, problem, whole)
            return whole
        raise self._refused(named or self.folder, f"is damaged ({problem})")

    def _problem(self, path: Path) -> str | None:
        """What is wrong with the step folder ``path``; None if it can be resumed from."""
        problem = damage(path) or self._rotten.get(path)
        if problem is None and (step := read_meta(path)["step"]) != _number(path):
            return f"meta.json is of step {step}"  # what is beside it is found by the folder's name
        return problem

    def _latest(self) -> tuple[Path | None, str | None]:
        """(the step folder that ``latest`` names, what is wrong with ``latest``)."""
        pointer = self.folder / "latest"
        if not pointer.exists():
            return None, None
        try:
            name = pointer.read_text().strip()
        except (OSError, ValueError) as error:
            return None, f"latest cannot be read: {first_line(error)}"
        if not STEP.fullmatch(name):
            return None, f"latest holds {name[:40]!r} instead of the name of a step folder"
        return self.folder / name, None

    def _refused(self, path: Path, problem: str) -> ValueError:
        """The error for the checkpoint ``path``, with a remedy that is there."""
        others = [p for p in self._steps() if p != path and self._problem(p) is None]
        text = f"run.resume = True: checkpoint {path} {problem}"
        if not others:
            return ValueError(
                f"{text}; no other whole checkpoint is in {self.folder}: choose a new run.name"
            )
        seen = path.exists() and path != self.folder and self._problem(path) is None
        move = f"move {path.name} away and " if seen else ""  # its sizes alone would be trusted
        return ValueError(
            f"{text}; {move}set checkpoint.fallback=true to go on from {others[0].name}, or choose "
            "a new run.name"
        )

    def _prune(self, newest: int) -> None:
        """Keep the last ones up to step ``newest``; later ones, of a course that a fallback has
        left, are not counted. Links are left alone: what they point to is somebody's own."""
        steps = [p for p in self._steps() if _number(p) <= newest and not p.is_symlink()]
        olds = self.folder.glob(".step_*.old")
        left = [old for old in olds if (self.folder / old.name[1:].removesuffix(".old")).exists()]
        for path in [*left, *self.folder.glob(".step_*.pruned")]:  # by a job that died
            shutil.rmtree(path, ignore_errors=True)
        for path in steps[self.config.keep :] if self.config.keep else []:
            try:
                # Hidden first: a crash in the middle must not leave a half that looks whole.
                remove(path.replace(path.with_name(f".{path.name}.pruned")))
            except OSError as error:
                log.warning("%s cannot be removed (%s)", path, error.strerror)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _rng_state() -> bytes:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    state = {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }
    content = BytesIO()  # torch's writer of files does not say why it fails
    torch.save(state, content)
    return content.getvalue()


def _read_rng_state(file: Path) -> dict[str, Any]:
    """What ``_rng_state`` made. Nothing but tensors, numbers and numpy's array is made from it: the
    file cannot run code."""
    words = np.zeros(1, np.uint32)
    array: list[Any] = [words.__reduce__()[0], np.ndarray, np.dtype, type(words.dtype)]
    with torch.serialization.safe_globals(array):
        state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
