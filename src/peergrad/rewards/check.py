"""Whether a reward can ever be earned, before anything is started."""

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np

from peergrad.config import RewardConfig, RewardKind, require
from peergrad.data import Prompt, Rollout
from peergrad.grades import Failure
from peergrad.rewards.gsm8k import reference_number, reference_text
from peergrad.rewards.numbers import only_number
from peergrad.rewards.pool import MATHEMATICS
from peergrad.rewards.process import START_SECONDS, RewardProcess

EXPRESSIONS = 300
"""Different references, evenly spread, that ``math`` reads before the start, at 8 to 50 ms each;
plain numbers do not count. The others are read when they are needed."""
SECONDS = 10.0  # for one of them
REMEDY = "correct data.answer_key or the row, or choose another reward"


def check_function(config: RewardConfig, *, limit: float = START_SECONDS) -> None:
    """Import what runs in processes, a user's function or ``math``, as the pool does, in a process
    of its own, within ``limit`` seconds. Raises ValueError if it cannot be used."""
    require(
        config.kind is not RewardKind.math or find_spec("math_verify") is not None,
        "reward.kind",
        "math",
        "needs the package math-verify, which is not installed",
        "install it beside peergrad",
    )
    if config.function is not None:
        process = RewardProcess(config.function)
        try:
            process.start(limit)
        finally:
            process.stop()


def check_answers(kind: RewardKind, prompts: Sequence[Prompt], option: str) -> None:
    """Raise ValueError for a reference answer that no rollout can match under ``kind``.

    ``option``: the key that names the prompts' source. A user's own function is not asked.
    """
    if kind is RewardKind.function:
        return
    for prompt in prompts:
        _require(kind, option, prompt, *_problem(kind, prompt.answer))
    if kind is RewardKind.math:
        _read_expressions(prompts, option)


def _require(
    kind: RewardKind, option: str, prompt: Prompt, problem: str | None, remedy: str = REMEDY
) -> None:
    rule = f"the answer {_place(prompt)} of {option} ({prompt.answer[-40:]!r}) {problem}"
    require(problem is None, "reward.kind", kind.name, rule, remedy)


def _place(prompt: Prompt) -> str:
    row = prompt.id.rpartition("-")[2]
    return f"in row {int(row) + 1}" if row.isdecimal() else f"to {prompt.id}"


def _problem(kind: RewardKind, answer: str) -> tuple[str | None, str]:
    """Why ``answer`` cannot be matched, or None; and what to do."""
    if kind is RewardKind.gsm8k:
        bad = reference_number(answer) is None
        return "is not one number, bare or after ####" if bad else None, REMEDY
    if kind is RewardKind.arithmetic and "####" in answer:
        return "is a whole solution, compared to the letter", "set reward=gsm8k"
    text = reference_text(answer) if kind is RewardKind.math else answer
    return "is empty" if not text.strip() else None, "correct data.answer_key or the row"


def _read_expressions(prompts: Sequence[Prompt], option: str) -> None:
    """Refuse a reference that does not even equal itself, or takes long to find out."""
    distinct = {prompt.answer: prompt for prompt in reversed(prompts)}
    asked = [p for p in reversed(distinct.values()) if only_number(p.answer) is None]
    nothing, process = np.zeros(0), RewardProcess(MATHEMATICS)
    try:
        for prompt in asked[:: -(-len(asked) // EXPRESSIONS) or 1]:
            text = f"\\boxed{{{reference_text(prompt.answer)}}}"
            same = Rollout(nothing, nothing, (), "stop", text)
            result = process.score(prompt, same, SECONDS)
            problem = None
            if isinstance(result, Failure) and result.kind == "timeout":
                problem = f"takes longer than {SECONDS:g} s to read"
            elif isinstance(result, Failure) or result.reward != 1:
                problem = "cannot be read as mathematics"
            _require(RewardKind.math, option, prompt, problem)
    finally:
        process.stop()
