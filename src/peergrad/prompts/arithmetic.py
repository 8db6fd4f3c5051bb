"""Sums of two two-digit numbers: a task small enough to learn on a laptop.

``17+25=`` asks, ``42`` answers. The 8100 problems fall into a train and a test split that never
share a sum: ``17+25=`` and ``25+17=`` are always on the same side.
"""

import random

SMALLEST, LARGEST = 10, 99
TEST_SHARE = 0.1


def problems(split: str, seed: int) -> list[tuple[str, str]]:
    """All ``(prompt, answer)`` pairs of one split, in an order that only ``seed`` decides.

    No seed moves a problem to the other split.

    Example:
        >>> problems("train", seed=0)[0]
        ('34+79=', '113')
    """
    if split not in ("train", "test"):
        raise ValueError(
            f"split must be 'train' or 'test', got {split!r}: "
            "ask for 'train' to learn from, for 'test' to measure"
        )
    numbers = range(SMALLEST, LARGEST + 1)
    pairs = [(a, b) for a in numbers for b in numbers if a <= b]
    # A constant seed: where the cut lies is the same in every process and every run.
    random.Random("arithmetic split").shuffle(pairs)
    test_size = round(TEST_SHARE * len(pairs))
    pairs = pairs[:test_size] if split == "test" else pairs[test_size:]
    both_orders = sorted({*pairs, *((b, a) for a, b in pairs)})
    random.Random(seed).shuffle(both_orders)
    return [(f"{a}+{b}=", str(a + b)) for a, b in both_orders]


def careless_answer(prompt: str, *, carry_rate: float, rng: random.Random) -> str:
    """The answer of a pupil who remembers each carry only with probability ``carry_rate``.

    A model that imitates this pupil gets most sums wrong, and has the right answer in it.

    Example:
        >>> careless_answer("57+65=", carry_rate=0.0, rng=random.Random(0))  # 122, no carry kept
        '12'
    """
    a, b = (int(number) for number in prompt.removesuffix("=").split("+"))
    ones = a % 10 + b % 10
    tens = a // 10 + b // 10 + (ones // 10 if rng.random() < carry_rate else 0)
    hundreds = tens // 10 if rng.random() < carry_rate else 0
    return str(100 * hundreds + 10 * (tens % 10) + ones % 10)
