"""Recorded rollouts against the run that is to train on them."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from peergrad.checks.place import resumed_step
from peergrad.config import Config, Replay
from peergrad.config.rules import one_line
from peergrad.data import Group
from peergrad.parallel.hf.config import Experts, Shape
from peergrad.recording import read_groups

MAGIC = b"PAR1"  # begins and ends every whole Parquet file


def check_recorded(config: Config, shape: Shape) -> None:
    """Raise ValueError unless every step of the run has a record. Only the first and the last are
    read whole: a long run has gigabytes of them."""
    if config.rollout.replay is None:
        return
    from peergrad.rollout.recorder import missing, recorded

    folder = Path(config.rollout.replay)
    first, last = (resumed_step(config) or 0) + 1, config.run.steps
    for step in range(first, last + 1):
        file = recorded(folder, step - 1)
        if not file.is_file():
            rule, remedy = missing(folder, step - 1)
            raise _error(config, rule, f"set run.steps={step - 1}" if step > first else remedy)
        try:
            whole = _ends(file) == (MAGIC, MAGIC)
        except OSError as error:
            rule = f"{file.name} cannot be read ({error.strerror})"
            raise _error(config, rule, "correct that, or name another run") from error
        _require(config, whole, f"{file.name} is damaged", "restore the file")
    for step in sorted({first, last} if first <= last else ()):
        _check_groups(config, recorded(folder, step - 1), shape)


def _ends(file: Path) -> tuple[bytes, bytes]:
    """The first and the last bytes of a file."""
    with file.open("rb") as stream:
        first = stream.read(len(MAGIC))
        stream.seek(-min(len(MAGIC), file.stat().st_size), os.SEEK_END)
        return first, stream.read()


def _check_groups(config: Config, file: Path, shape: Shape) -> None:
    try:
        groups = read_groups(file)
    except (OSError, ValueError) as error:
        rule = f"{file.name} is damaged ({type(error).__name__}: {one_line(error)})"
        raise _error(config, rule, "restore the file, or set run.steps below it") from error
    wanted = config.rollout.prompts_per_step
    rule = f"{file.name} holds {len(groups)} groups instead of {wanted}"
    remedy = f"set rollout.batch_size={len(groups) * config.rollout.group_size}"
    _require(config, len(groups) == wanted, rule, remedy if groups else "restore the file")
    most = max(map(_largest, groups))
    rule = f"{file.name} has the token id {most}, the model only ids below {shape.vocab}"
    _require(config, most < shape.vocab, rule, "use the model that it was recorded with")
    if config.moe.replays and shape.experts is not None:
        _check_experts(config, file, groups, shape, shape.experts)


def _check_experts(
    config: Config, file: Path, groups: Sequence[Group], shape: Shape, experts: Experts
) -> None:
    every = [rollout.experts for group in groups for rollout in group.rollouts]
    told = [found for found in every if found is not None]
    needed = config.moe.replay is Replay.on
    rule = f"{file.name} has answers without the experts that moe.replay=on needs"
    _require(config, not needed or len(told) == len(every), rule, "set moe.replay=auto")
    size = shape.layers, experts.chosen
    fit = all(x.shape[1:] == size and x.max(initial=0) < experts.number for x in told)
    rule = f"{file.name} has other experts than {experts.chosen} of {experts.number} in each of "
    rule, remedy = f"{rule}{shape.layers} layers", "use the model that it was recorded with"
    _require(config, fit, rule, remedy)


def _largest(group: Group) -> int:
    """The largest token id of a group's prompt and answers."""
    tokens = [group.prompt.tokens, *(rollout.tokens for rollout in group.rollouts)]
    return int(np.concatenate(tokens).max(initial=0))


def _require(config: Config, ok: bool, rule: str, remedy: str) -> None:
    if not ok:
        raise _error(config, rule, remedy)


def _error(config: Config, rule: str, remedy: str) -> ValueError:
    return ValueError(f"rollout.replay = {config.rollout.replay!r}: {rule}; {remedy}")
