"""Whether a reward can ever be earned, before anything is started."""

from collections.abc import Sequence

from peergrad.config import RewardConfig, RewardKind, require
from peergrad.data import Prompt
from peergrad.rewards.gsm8k import reference_number
from peergrad.rewards.process import START_SECONDS, RewardProcess


def check_function(config: RewardConfig, *, limit: float = START_SECONDS) -> None:
    """Import the user's function as the pool does, in a process of its own, within ``limit``
    seconds. Raises ValueError if it cannot be used."""
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
    for prompt in prompts if kind is not RewardKind.function else ():
        problem, remedy = _problem(kind, prompt.answer)
        row = int(prompt.id.rpartition("-")[2]) + 1
        rule = f"the answer in row {row} of {option} ({prompt.answer[-40:]!r}) {problem}"
        require(problem is None, "reward.kind", kind.name, rule, remedy)


def _problem(kind: RewardKind, answer: str) -> tuple[str | None, str]:
    """Why ``answer`` cannot be matched, or None; and what to do."""
    if kind is RewardKind.gsm8k:
        bad = reference_number(answer) is None
        remedy = "correct data.answer_key or the row, or choose another reward"
        return "is not one number, bare or after ####" if bad else None, remedy
    if "####" in answer:
        return "is a whole solution, compared to the letter", "set reward=gsm8k"
    bad = not answer.strip()
    return "is empty" if bad else None, "correct data.answer_key or the row"
