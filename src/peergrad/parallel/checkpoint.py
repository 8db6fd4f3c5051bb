"""The checkpoints of a run: save, restore, prune. The folder format is in ``snapshot``.

Beside Megatron's state a run keeps ``rng_<rank>.pt``, ``collector.pt`` (the prompt position and the
groups that were waiting or in flight), ``algo.json`` (what the objective remembers) and, once the
reference has been replaced by a policy of the run, ``reference/``.
"""

import json
import logging
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peergrad.config import CheckpointConfig
from peergrad.parallel.groups import Groups
from peergrad.parallel.hf.files import copy_companions
from peergrad.parallel.policy import Policy, Scorer
from peergrad.parallel.snapshot import (
    damage,
    fresh,
    load_megatron,
    publish,
    read_meta,
    require_same_model,
    save_megatron,
    write_meta,
)

log = logging.getLogger(__name__)
REFERENCE = "reference"


class Checkpoints:
    """The checkpoints of one run; ``folder`` is ``<run>/checkpoints``."""

    def __init__(self, folder: Path, config: CheckpointConfig, groups: Groups) -> None:
        self.folder, self.config, self.groups = folder, config, groups

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
        """Write the state after ``step``. Collective. Saving a step again replaces it.

        ``reference``: None if it can be had from where the run was started.
        """
        target = self.folder / f"step_{step:06d}"
        partial = self.folder / f".{target.name}.partial"
        self.groups.share(lambda: fresh(partial))
        save_megatron(partial / "model", policy.model, policy.optimizer)
        if reference is not None:
            self.groups.share((partial / REFERENCE).mkdir)
            save_megatron(partial / REFERENCE, reference.model, None)
        torch.save(_rng_state(), partial / f"rng_{self.groups.rank:05d}.pt")

        def finish() -> None:
            if collector is not None:
                (partial / "collector.pt").write_bytes(collector)
            (partial / "algo.json").write_text(json.dumps(algo))
            copy_companions(Path(policy.config.model.path), partial / "hf")
            write_meta(
                partial,
                policy.model,
                policy.shape,
                step=step,
                updates=policy.updates,
                groups=self.groups,
            )
            publish(partial, target)
            self._prune(target)

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
        require_same_model(path, meta, policy.shape)
        load_megatron(path / "model", policy.model, policy.optimizer)
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

    def algo_state(self, step: int) -> dict[str, object] | None:
        """What the objective remembered after ``step``; None if nothing was saved."""
        path = self.folder / f"step_{step:06d}" / "algo.json"
        found: dict[str, object] | None = json.loads(path.read_text()) if path.exists() else None
        return found

    def restore_reference(self, reference: Scorer, step: int) -> None:
        """Load the reference that was saved after ``step``. Collective."""
        load_megatron(self.folder / f"step_{step:06d}" / REFERENCE, reference.model, None)

    def _newest(self) -> Path | None:
        """The checkpoint to resume from: the one ``latest`` names, or with ``fallback`` the newest
        one that is whole."""
        pointer = self.folder / "latest"
        whole = [p for p in sorted(self.folder.glob("step_*"), reverse=True) if not damage(p)]
        if pointer.exists():
            named = self.folder / pointer.read_text().strip()
        elif whole:  # a job that died between the two renames
            named = whole[0]
        else:
            log.warning("%s holds no checkpoint: starting from the beginning", self.folder)
            return None
        problem = damage(named)
        if problem is None:
            return named
        if self.config.fallback and whole:
            log.warning("%s is damaged (%s): falling back to %s", named, problem, whole[0])
            return whole[0]
        raise ValueError(
            f"run.resume = True: checkpoint {named} is damaged ({problem}); set "
            "checkpoint.fallback=true to use an older one, or choose a new run.name"
        )

    def _prune(self, newest: Path) -> None:
        """Keep the last ones up to ``newest``; later ones, of a course that a fallback has left,
        are not counted."""
        whole = [p for p in sorted(self.folder.glob("step_*")) if p.name <= newest.name]
        for path in whole[: -self.config.keep] if self.config.keep else []:
            # Hidden first: a crash in the middle of rmtree must not leave a half that looks whole.
            doomed = path.replace(path.with_name(f".{path.name}.old"))
            shutil.rmtree(doomed)


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
