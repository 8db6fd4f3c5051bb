r"""GSM8K: the final number of an answer, compared exactly.

Where the number is looked for; the first place that applies decides:

1. behind the last ``####`` that is followed by a number on its line (else it was a heading, and so
   it was in ``#### 2. Add the apples``), up to the line's end;
2. in the last ``\boxed{...}``;
3. the last number of the text, if the rollout ended by itself: so a model that was never told the
   format can learn from its first step. In a text that was cut off the last number is chance.

Places 1 and 2 must hold exactly one number: ``#### 17 or 18`` earns nothing.
``peergrad.rewards.numbers`` says what a number is.
"""

from fractions import Fraction

import regex as re

from peergrad.data import Prompt, Rollout
from peergrad.rewards.numbers import numbers_in, only_number, starts_with_number, value_of

HEADINGS = 16  # markers looked at, from the end: a model that writes nothing else has no answer
_HEADING = re.compile(  # "2. Add", "(2) Add", "**2.** Add", "2 - Add", "2.Add"
    r"[\s*_(]*+[0-9]{1,3}+"
    r"(?:\\?+[.):](?:\**+\s[\s*]*+[^\s*]|[A-Za-z])|\s*+[-\u2013\u2014]\s[A-Za-z])"
)
_PRODUCT = re.compile(r"[0-9]\s?+(?:!|[nxyzi](?![A-Za-z]))")  # 5! and 5x, in a box
_BARE_BOX = re.compile(r"\s*+[-$]*+[0-9][0-9.,]*+")


def reward(prompt: Prompt, rollout: Rollout) -> float:
    """1 if the rollout's final number equals the reference, else 0.

    The reference is GSM8K's own solution or a bare number.

    Example:
        answer "9 * 2 = $18\\n#### 18": "... #### 18", "So it is \\boxed{$18.00}." and "18 dollars."
        earn 1, "#### 17 or 18" and "#### 180" earn 0.
    """
    reference = reference_number(prompt.answer)
    if reference is None:
        raise ValueError(
            f"the reference answer {prompt.answer[-60:]!r} must be one number, bare or after ####"
        )
    return float(final_number(rollout.text, anywhere=rollout.finish == "stop") == reference)


def reference_number(answer: str) -> Fraction | None:
    """The number that a reference answer stands for; None if it is not one number.

    Example:
        >>> reference_number("9 * 2 = $18\\n#### 18"), reference_number("1e-05")
        (Fraction(18, 1), Fraction(1, 100000))
    """
    return only_number(answer.rpartition("####")[2])


def final_number(text: str, *, anywhere: bool = True) -> Fraction | None:
    r"""The number that ``text`` arrives at, if any; ``anywhere`` allows an unmarked one.

    Example:
        >>> final_number(r"Half of 2,469 is \boxed{\frac{2469}{2}}, which is about 1234.")
        Fraction(2469, 2)
    """
    for rest in reversed(text.split("####")[1:][-HEADINGS:]):
        line = rest.lstrip("#").lstrip().partition("\n")[0].rstrip()
        if starts_with_number(line) and not _is_heading(line):
            return only_number(line)
    box = last_box(text)
    if box is not None:
        return None if _PRODUCT.search(box) else only_number(box)
    numbers = numbers_in(text) if anywhere else []
    return value_of(numbers[-1]) if numbers else None


def _is_heading(line: str) -> bool:
    return _HEADING.match(line) is not None or line.rstrip("* ").endswith(":")


def reference_text(answer: str) -> str:
    r"""The final answer of a reference: of the last box, behind the last ``####``, or all of it;
    without dollars around it."""
    box = last_box(answer)
    return answer.rpartition("####")[2].strip(" \n$") if box is None else box


def last_box(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` holds, braces and all, or the number of a ``\boxed 5``; None
    without one that is closed."""
    _, marker, rest = text.rpartition(r"\boxed")
    if not marker:
        return None
    rest = rest.lstrip()
    if not rest.startswith("{"):
        bare = _BARE_BOX.match(rest)
        return None if bare is None else bare[0]
    depth = 0
    for brace in re.finditer(r"[{}]", rest):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return rest[1 : brace.start()]
    return None
