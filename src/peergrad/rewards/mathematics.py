r"""General mathematics, judged by math-verify: ``\frac{1}{2}`` is 0.5, ``\{1, 2\}`` is ``2, 1``.

Its own time limits are signals and are turned off: simplifying what a model writes may take for
ever, so this runs in the pool's processes, under ``reward.timeout``.
"""

import logging
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from peergrad.data import Prompt, Rollout
from peergrad.rewards.gsm8k import last_box, reference_text

TAIL = 2000  # characters searched for an unmarked answer: the parser's patterns are not linear

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its limits are off


def reward(prompt: Prompt, rollout: Rollout) -> float:
    r"""1 if the rollout's answer is mathematically equal to the reference, else 0.

    The answer is what the last ``\boxed{...}`` holds; without one, the last expression of a text
    that ended by itself. The reference is an expression, bare, in dollars, boxed or behind the last
    ``####``. Raises ValueError if it cannot be read.

    Example:
        answer "\\frac{1}{2}": "\\boxed{0.5}" and "so it is $2/4$." earn 1.
    """
    reference = _reference(prompt.answer)
    if not reference:
        raise ValueError(f"the reference answer {prompt.answer[-60:]!r} cannot be read")
    box = last_box(rollout.text)
    if box is not None:
        found = _parse_box(box)
    else:
        found = _parse(rollout.text[-TAIL:]) if rollout.finish == "stop" else []
    return float(verify(reference, found, timeout_seconds=None))


@lru_cache(maxsize=1024)
def _reference(answer: str) -> list[Any]:
    return _parse_box(reference_text(answer))


def _parse_box(content: str) -> list[Any]:
    return _parse(f"\\boxed{{{content}}}") if content.strip() else []


def _parse(text: str) -> list[Any]:
    found: list[Any] = parse(text, parsing_timeout=None)
    return found
