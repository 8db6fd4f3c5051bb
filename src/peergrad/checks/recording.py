"""The run whose rollouts are replayed, against the run that is to train on them."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from peergrad.config import Config, MoeConfig, OldPolicy, Schedule, require
from peergrad.config.rules import one_line
from peergrad.running.preset import leaves

SAME = ("temperature", "batch_size", "group_size")
"""Keys of ``rollout`` that cannot be changed: recorded logprobs are of that temperature, and groups
come as they were recorded."""
COURSE = ("model.path", "model.weights", "model.reference", "model.dtype", "run.seed", "optim",
          "algo", "rollout.max_new_tokens", "rollout.max_staleness", "kernels.logits",
          "parallel.megatron", "moe")  # fmt: skip
"""What decides which policy a run has after some steps, up to rounding."""
ASIDE = ("algo.source", "algo.differences", "algo.sampling.limit", "optim.on_nonfinite",
         "optim.decay_steps")  # fmt: skip
"""Parts of these that do not."""


_SINCE = {f"moe.{f.name}": getattr(f.default, "name", f.default) for f in fields(MoeConfig)}
"""What recordings of an older peergrad do not say."""


def check_recording(config: Config) -> None:
    """Raise ValueError if the recorded rollouts cannot be trained on as configured."""
    recorded = _recorded(config)
    if recorded is None:
        return
    for key in SAME:
        ours, theirs = getattr(config.rollout, key), recorded[f"rollout.{key}"]
        rule = f"the run to replay was recorded with {theirs}"
        require(ours == theirs, f"rollout.{key}", ours, rule, f"set rollout.{key}={theirs}")


def foreign(config: Config) -> str | None:
    """Why the policy of this run will not be the one that sampled the recorded rollouts; None if it
    will, or if nothing is replayed."""
    if config.rollout.replay is None:
        return None
    last = _recorded(config)
    if last is None:
        return "has no config.yaml"
    ours = _flat(OmegaConf.structured(config))
    if (other := _other_course(config, ours, last)) is not None:
        return f"was recorded with {other}"
    for attempt in sorted(Path(config.rollout.replay).glob("logs/*/config.yaml")):
        if (other := _other_course(config, ours, _read(config, attempt))) is not None:
            return f"was recorded in several attempts, one of them with {other}"
    return None


def _other_course(config: Config, ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """What leads the run of ``theirs`` to other policies than this one; None if nothing does."""
    for key in sorted(ours.keys() | theirs.keys()):
        among = any(_within(key, part) for part in COURSE)
        if among and not any(_within(key, part) for part in ASIDE):
            before = theirs.get(key, _SINCE.get(key))
            if ours.get(key) != before and not _one_path(key, ours.get(key), before):
                return f"{key}={before}"
    if config.optim.schedule is not Schedule.constant and _end(ours) != _end(theirs):
        return f"a schedule of {_end(theirs)} steps"
    return None


def settled(config: Config) -> Config:
    """The configuration with the policy that ratios are taken to: the one that sampled recorded
    rollouts, if this run's will not be that one and nothing else corrects for it."""
    algo = config.algo
    open_to = algo.old_policy is OldPolicy.auto and not algo.correction.weighs_engine
    if not open_to or foreign(config) is None:
        return config
    return replace(config, algo=replace(algo, old_policy=OldPolicy.engine))


def _recorded(config: Config) -> dict[str, Any] | None:
    """The configuration of the recorded run by full key; None if there is none."""
    file = Path(config.rollout.replay or "") / "config.yaml"
    if config.rollout.replay is None or not file.is_file():
        return None
    found = _read(config, file)
    missing = [key for key in SAME if f"rollout.{key}" not in found]
    if missing:
        raise _unreadable(config, file, f"it has no rollout.{missing[0]}")
    return found


def _read(config: Config, file: Path) -> dict[str, Any]:
    """A config.yaml of the recorded run by full key."""
    try:
        loaded = OmegaConf.load(file)
        return _flat(loaded) if isinstance(loaded, DictConfig) else {}
    except (OSError, ValueError, OmegaConfBaseException) as error:
        raise _unreadable(config, file, one_line(error)) from error
    except Exception as error:  # the YAML reader's own kinds
        if "yaml" in type(error).__module__:
            raise _unreadable(config, file, one_line(error)) from error
        raise


def _unreadable(config: Config, file: Path, why: str) -> ValueError:
    folder = config.rollout.replay or ""
    return ValueError(
        f"rollout.replay = {folder!r}: its {file.relative_to(folder)} cannot be read ({why}); "
        "restore the file, or remove it"
    )


def _flat(node: DictConfig) -> dict[str, Any]:
    """Values by full key; enumerations by their names, as YAML has them."""
    plain = OmegaConf.to_container(node, resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return leaves(plain)


def _within(key: str, part: str) -> bool:
    return key == part or key.startswith(f"{part}.")


def _one_path(key: str, ours: Any, theirs: Any) -> bool:
    """Whether both are the same folder, written in two ways."""
    texts = key.startswith("model.") and isinstance(ours, str) and isinstance(theirs, str)
    return texts and Path(ours).resolve() == Path(theirs).resolve()


def _end(values: dict[str, Any]) -> Any:
    return values.get("optim.decay_steps") or values.get("run.steps")
