"""GSM8K grading: a hand-made table, and every real answer against itself in many renderings."""

import json
import random
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from peergrad.data import Prompt, Rollout
from peergrad.rewards.gsm8k import final_number, reward

GSM8K = Path(__file__).parents[3] / "../shared/data/gsm8k"

TABLE = [
    ("#### 18", 18),
    ("#### 1,234", 1234),
    ("#### 12,345,678.50", Fraction("12345678.5")),
    ("#### -5", -5),
    ("#### \u22125", -5),
    ("#### -$5", -5),
    ("#### $-5", -5),
    ("#### $ 18.00.", 18),
    ("####18", 18),
    ("#### **18**", 18),
    ("#### (18)", 18),
    ("#### = 18", 18),
    ("####\n18", 18),
    ("#### \\$18", 18),
    ("#### 50%", 50),
    ("#### .5", Fraction(1, 2)),
    ("#### 1/2", Fraction(1, 2)),
    ("#### 1 / 2", Fraction(1, 2)),
    ("#### 18 eggs", 18),
    ("#### 18km", 18),
    ("#### 18 dollars/day", 18),
    ("#### 18\nChecked 3 times.", 18),
    ("#### 17\nNo, wait.\n#### 18", 18),
    ("\\boxed{17} #### 18", 18),
    # Several numbers, or none, where exactly one belongs.
    ("#### 17 or 18", None),
    ("#### 5 + 13 = 18", None),
    ("#### 1,23", None),
    ("#### 1,2345", None),
    ("#### 1.2.3", None),
    ("#### 1/2/3", None),
    ("#### 1/0", None),
    ("#### 5 - 3", None),
    ("\\boxed{17, 18}", None),
    ("\\boxed{}", None),
    ("\\boxed{eighteen}, or 18", None),
    # A heading is no answer.
    ("#### Step 2: add\nIt is \\boxed{18}.", 18),
    ("#### Answer\n\\boxed{18}", 18),
    ("#### Answer: 18", 18),
    ("#### \\boxed{18}", 18),
    ("\\boxed{17} and then \\boxed{18}.", 18),
    ("\\boxed{\\boxed{18}}", 18),
    ("\\boxed{\\text{$}1{,}234\\text{ dollars}}", 1234),
    ("\\boxed{1,\\!234}", 1234),
    ("\\boxed{1\\,234}", 1234),
    ("\\boxed{x = 18}", 18),
    ("\\boxed{x_1 = 18}", 18),
    ("\\boxed{\\frac{1}{2}}", Fraction(1, 2)),
    ("\\boxed{-\\dfrac{1}{2}}", Fraction(-1, 2)),
    ("\\boxed{3\\frac{1}{2}}", None),
    ("\\boxed{50\\%}", 50),
    ("\\boxed{1e3}", None),
    ("\\boxed{1.5e3}", None),
    # Unmarked: the last number.
    ("She makes 9 * 2 = $18 every day.", 18),
    ("It is 18...", 18),
    ("It is ...18", 18),
    ("A range of 10-15", 15),
    ("Of 5 people, eighteen.", 5),
    ("\\boxed{18", 18),
    ("H2O", None),
    ("nothing", None),
    ("", None),
    ("#### " + "9" * 41, None),
]


@pytest.mark.parametrize(("text", "number"), TABLE)
def test_final_number(text: str, number: Fraction | int | None) -> None:
    assert final_number(text) == number


def test_only_a_finished_answer_may_be_unmarked() -> None:
    assert grade("18", "It is 18", finish="stop") == 1.0
    assert grade("18", "It is 18", finish="length") == 0.0
    assert grade("18", "#### 18\nand", finish="length") == 1.0


@pytest.mark.parametrize("answer", ["", "none", "#### 1 or 2", "3, 4"])
def test_a_reference_that_is_no_number_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match="reference answer"):
        grade(answer, "#### 1")


@pytest.mark.parametrize("split", ["test", "train"])
def test_every_answer_against_itself(split: str) -> None:
    if not GSM8K.is_dir():
        pytest.skip("no GSM8K here")
    lines = (GSM8K / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    solutions = [json.loads(line)["answer"] for line in lines]
    assert len(solutions) == {"test": 1319, "train": 7473}[split]
    for solution in solutions:
        bare = solution.rpartition("#### ")[2]
        number = Fraction(bare.replace(",", ""))
        # Checked against an independent reading: GSM8K's references are plain decimals.
        assert final_number(solution) == number
        for reference in (solution, bare):
            assert grade(reference, solution) == 1.0
        for right in renderings(number):
            assert grade(solution, right) == 1.0, (solution, right)
        for wrong in (number + 1, number * 10 + 1, -number - 1, number + Fraction(1, 100)):
            for text in renderings(wrong):
                assert grade(solution, text) == 0.0, (solution, text)


def renderings(number: Fraction) -> list[str]:
    plain = f"{number.numerator}" if number.denominator == 1 else f"{float(number)}"
    grouped = f"{number.numerator:,}" if number.denominator == 1 else f"{float(number):,}"
    tail = f"{grouped}.00" if number.denominator == 1 else grouped
    latex = grouped.replace(",", "{,}")
    fraction = f"\\frac{{{number.numerator}}}{{{number.denominator}}}"
    return [
        f"#### {plain}",
        f"#### {grouped}",
        f"2 + 2 = 4\n#### ${tail}.",
        f"#### {grouped} dollars\n",
        f"Thus \\boxed{{{plain}}}.",
        f"\\[ \\boxed{{\\${latex} \\text{{ per day}}}} \\]",
        f"$\\boxed{{{fraction}}}$",
        f"The answer is {tail}%.",
        f"From 7 to 3: **{grouped}**",
    ]


HOSTILE = [
    "1,111",
    "#### ",
    "\\boxed{",
    "\\frac{",
    "-",
    "1 ",
    "1/",
    "{",
    "$",
    ".1",
    "9",
    " ",
    "1e1",
]


def test_time_is_linear_in_the_text() -> None:
    rng = random.Random(0)
    texts = [piece * 100_000 for piece in HOSTILE]
    texts += ["".join(rng.choices(HOSTILE, k=100_000)) for _ in range(5)]
    for text in texts:
        start = time.process_time()
        final_number(text)
        assert time.process_time() - start < 2.0, text[:40]


def grade(answer: str, text: str, finish: str = "stop") -> float:
    empty = np.zeros(0)
    prompt = Prompt("p", empty.astype(np.int32), "?", answer)
    rollout = Rollout(empty.astype(np.int32), empty.astype(np.float32), (), finish, text)
    return reward(prompt, rollout)
