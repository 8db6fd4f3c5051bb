"""What travels between the parts: prompts, rollouts and groups, as compact numpy arrays.

Nothing here imports torch, so that the collector process stays light. The packed tensors that the
trainer works on are ``peergrad.algo.packing.MicroBatch``.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from peergrad.storage import flush, partial_of, remove, writing

FINISH_REASONS = ("stop", "length", "abort")


@dataclass(frozen=True)
class Prompt:
    """One prompt, already tokenised.

    Example:
        ``Prompt(id="train-17", tokens=np.array([5, 3, 9], np.int32), text="1+2=", answer="3")``
    """

    id: str
    tokens: np.ndarray  # [P] int32
    text: str
    answer: str
    extra: dict[str, Any] = field(default_factory=dict)  # further columns of the data set


@dataclass(frozen=True)
class Rollout:
    """One sampled answer.

    ``logprobs[t]`` is the engine's log probability of ``tokens[t]`` at the sampling temperature
    over the full vocabulary. ``versions`` are half-open spans ``(weight version, start, end)``
    over the answer's tokens: a rollout that was interrupted by a weight sync has several.

    Example:
        ``Rollout(tokens=np.array([7, 1], np.int32), logprobs=np.array([-.1, -.2], np.float32),
        versions=((4, 0, 2),), finish="stop", text="3", reward=1.0)``
    """

    tokens: np.ndarray  # [R] int32
    logprobs: np.ndarray  # [R] float32
    versions: tuple[tuple[int, int, int], ...]
    finish: str  # one of FINISH_REASONS
    text: str
    reward: float = 0.0

    def __post_init__(self) -> None:
        if self.tokens.shape != self.logprobs.shape or self.tokens.ndim != 1:
            raise ValueError(
                f"a rollout needs one logprob per token, got {self.tokens.shape} tokens and "
                f"{self.logprobs.shape} logprobs"
            )
        if self.finish not in FINISH_REASONS:
            raise ValueError(f"finish must be one of {FINISH_REASONS}, got {self.finish!r}")

    @property
    def token_versions(self) -> np.ndarray:
        """Weight version that each token was drawn with, [R] int32."""
        return np.repeat(
            np.array([version for version, _, _ in self.versions], np.int32),
            [end - start for _, start, end in self.versions],
        )


@dataclass(frozen=True)
class Group:
    """All rollouts of one prompt: the peers that an answer is graded against.

    ``id`` is stable and unique within a run; a group is never inferred from position.

    Example:
        ``Group(id="3/train-17", prompt=prompt, rollouts=(rollout_a, rollout_b))``
    """

    id: str
    prompt: Prompt
    rollouts: tuple[Rollout, ...]

    @property
    def rewards(self) -> np.ndarray:
        """Rewards of the peers, [G] float64."""
        return np.array([rollout.reward for rollout in self.rollouts], np.float64)


def _group_to_json(group: Group) -> dict[str, Any]:
    prompt = group.prompt
    return {
        "id": group.id,
        "prompt": {
            "id": prompt.id,
            "tokens": prompt.tokens.tolist(),
            "text": prompt.text,
            "answer": prompt.answer,
            "extra": prompt.extra,
        },
        "rollouts": [
            {
                "tokens": r.tokens.tolist(),
                # float32 -> shortest decimal that reads back to the same float32
                "logprobs": [float(str(x)) for x in r.logprobs],
                "versions": r.versions,
                "finish": r.finish,
                "text": r.text,
                "reward": r.reward,
            }
            for r in group.rollouts
        ],
    }


def _group_from_json(record: dict[str, Any]) -> Group:
    prompt = record["prompt"]
    rollouts = tuple(
        Rollout(
            tokens=np.array(r["tokens"], np.int32),
            logprobs=np.array(r["logprobs"], np.float32),
            versions=tuple((v[0], v[1], v[2]) for v in r["versions"]),
            finish=r["finish"],
            text=r["text"],
            reward=r["reward"],
        )
        for r in record["rollouts"]
    )
    return Group(
        id=record["id"],
        prompt=Prompt(**{**prompt, "tokens": np.array(prompt["tokens"], np.int32)}),
        rollouts=rollouts,
    )


def write_groups(path: Path, groups: Iterable[Group]) -> None:
    """Write groups as zstandard-compressed JSON lines; float32 logprobs survive bit-exactly.

    The file appears under its name only when it is complete.
    """
    with writing("rollouts", path):
        path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        with writing("rollouts", path):
            with zstandard.open(partial, "wt", encoding="utf-8") as out:
                for group in groups:
                    out.write(json.dumps(_group_to_json(group), ensure_ascii=False) + "\n")
            flush(partial)
            partial.replace(path)
    except BaseException:
        with suppress(OSError):
            remove(partial)
        raise


def read_groups(path: Path) -> list[Group]:
    """Read what ``write_groups`` wrote.

    Raises FileNotFoundError if there is no such file, ValueError if it is damaged.
    """
    try:
        # In one piece: the library's stream readers take a cut file for a shorter one.
        reader = zstandard.ZstdDecompressor().decompressobj()
        text = reader.decompress(path.read_bytes()).decode()
        if not reader.eof:
            raise ValueError("it is cut short")
        return [_group_from_json(json.loads(line)) for line in text.split("\n")[:-1]]
    except (zstandard.ZstdError, ValueError, KeyError, TypeError, IndexError) as error:
        what = " ".join(str(error).split())
        raise ValueError(
            f"rollouts = {str(path)!r}: is damaged ({type(error).__name__}: {what}); "
            "use another recording"
        ) from error
