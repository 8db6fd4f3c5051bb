r"""GSM8K: the final number of an answer, compared exactly.

Where the number is looked for; the first place that applies decides:

1. behind the last ``####`` up to the line's end, if a number is the first thing there (otherwise it
   was a heading);
2. in the last ``\boxed{...}``;
3. the last number of the text, if the rollout ended by itself: so a model that was never told the
   format can learn from its first step. In a text that was cut off the last number is chance.

Places 1 and 2 must hold exactly one number: ``#### 17 or 18`` earns nothing. Currency, units,
percent signs, Markdown and LaTeX around a number are ignored: ``50%`` is 50.
"""

from fractions import Fraction

import regex as re  # Python's own, before 3.11.5, matches possessive groups wrongly, without a word

from peergrad.data import Prompt, Rollout

MAX_DIGITS = 40  # Longer numbers are noise, and slow to convert.

# No number: digits inside a word (x2), in 1e3, or grouped wrongly (1,23 is two numbers). Possessive
# repetition keeps the search linear, whatever a model writes.
_NUMBER = re.compile(
    r"""(?:(?<![\w)])(?P<minus>[-\u2212]))?+
        (?:\\?[$\u20ac\u00a3][ ]?(?P<minus_after>[-\u2212])?+)?+
        (?<!\w)
        (?P<value>
            (?>[0-9]{1,3}(?:,[0-9]{3}){1,9}+(?![0-9]) | [0-9]++) (?:\.[0-9]++)?+
          | (?<!\.)\.[0-9]++
        )
        (?:[ ]?/[ ]?(?P<denominator>[0-9]++))?+
        (?!e[-+]?[0-9])""",
    re.ASCII | re.IGNORECASE | re.VERBOSE,
)
_FRACTION = re.compile(r"(?P<whole>[0-9])?\\[dt]?frac\{(?P<top>[^{}]*+)\}\{(?P<bottom>[^{}]*+)\}")
_LATEX_IN_NUMBERS = re.compile(r"\{(,)\}|\\[,!]")  # 1{,}234, 1\,234 and 1,\!234


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
        >>> reference_number("9 * 2 = $18\\n#### 18")
        Fraction(18, 1)
    """
    return _only_number(answer.rpartition("####")[2])


def final_number(text: str, *, anywhere: bool = True) -> Fraction | None:
    r"""The number that ``text`` arrives at, if any; ``anywhere`` allows an unmarked one.

    Example:
        >>> final_number(r"Half of 2,469 is \boxed{\frac{2469}{2}}, which is about 1234.")
        Fraction(2469, 2)
    """
    _, marker, rest = text.rpartition("####")
    line = rest.lstrip().partition("\n")[0]
    if marker and _starts_with_number(line):
        return _only_number(line)
    box = _last_box(text)
    if box is not None:
        return _only_number(box)
    numbers = _numbers(text) if anywhere else []
    return _value(numbers[-1]) if numbers else None


def _starts_with_number(line: str) -> bool:
    number = _NUMBER.search(line)
    return number is not None and not any(map(str.isalpha, line[: number.start()]))


def _last_box(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` holds, braces and all; None without one that is closed."""
    _, marker, rest = text.rpartition(r"\boxed{")
    depth = 1
    for brace in re.finditer(r"[{}]", rest if marker else ""):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return rest[: brace.start()]
    return None


def _only_number(text: str) -> Fraction | None:
    numbers = _numbers(text)
    return _value(numbers[0]) if len(numbers) == 1 else None


def _numbers(text: str) -> list[re.Match[str]]:
    text = _LATEX_IN_NUMBERS.sub(r"\1", text)
    text = _FRACTION.sub(_plain_fraction, text)
    return list(_NUMBER.finditer(text))


def _plain_fraction(latex: re.Match[str]) -> str:
    r"""``\frac{1}{2}`` as 1/2; the 3 of ``3\frac{1}{2}`` stays a number of its own."""
    whole = f"{latex['whole']} " if latex["whole"] else ""
    return f"{whole}{latex['top']}/{latex['bottom']}"


def _value(number: re.Match[str]) -> Fraction | None:
    denominator = number["denominator"] or "1"
    if len(number[0]) > MAX_DIGITS or not int(denominator):
        return None
    value = Fraction(number["value"].replace(",", "")) / int(denominator)
    return -value if number["minus"] or number["minus_after"] else value
