"""GSM8K grading: a hand-made table, and real answers against themselves in many renderings."""

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
    ("\\boxed{1{,}234{,}567}", 1_234_567),
    ("\\boxed{1\\,234}", 1234),
    ("\\boxed{x = 18}", 18),
    ("\\boxed{x_1 = 18}", 18),
    ("\\boxed{\\frac{1}{2}}", Fraction(1, 2)),
    ("\\boxed{-\\dfrac{1}{2}}", Fraction(-1, 2)),
    ("\\boxed{50\\%}", 50),
    # As computers write numbers.
    ("#### 1e-05", Fraction(1, 100_000)),
    ("#### 3e+08", 300_000_000),
    ("#### 1.5E3", 1500),
    ("#### 2e\u22122", Fraction(1, 50)),
    ("#### 1e5.", 100_000),
    ("#### 1e400", None),
    ("#### 1e1e1", None),
    ("#### 2e-005", Fraction(1, 50_000)),
    ("#### 1e+008", 100_000_000),
    ("#### 1e-400", None),
    ("#### 1e+100", None),
    ("It is 1e-100", None),
    ("#### 1_000", None),
    ("#### 0x1F", None),
    ("\\boxed{101_2}", None),
    ("#### \uff11\uff0c\uff12\uff13\uff14\uff0e\uff15", Fraction("1234.5")),
    ("#### 1\u20443", Fraction(1, 3)),
    ("\\boxed{1e3}", 1000),
    ("\\boxed{3 \\times 10^8}", 300_000_000),
    ("\\boxed{1.5\\cdot10^{-2}}", Fraction("0.015")),
    ("\\boxed{2 * 10^{3}}", 2000),
    ("\\boxed{10^{5}}", 100_000),
    ("#### 5.", 5),
    ("#### 007", 7),
    ("#### +5", 5),
    ("#### \uff11\uff18", 18),
    # Fractions.
    ("\\boxed{\\frac34}", Fraction(3, 4)),
    ("\\boxed{\\frac{3}4}", Fraction(3, 4)),
    ("\\boxed{\\frac3{4}}", Fraction(3, 4)),
    ("\\boxed{\\frac{-1}{2}}", Fraction(-1, 2)),
    ("\\boxed{\\frac{1}{-2}}", Fraction(-1, 2)),
    ("\\boxed{\\frac{1,200}{2}}", 600),
    ("#### \\frac{3}{4}", Fraction(3, 4)),
    ("#### $\\frac{3}{4}$", Fraction(3, 4)),
    ("#### 18/2", 9),
    ("\\boxed{\\frac{x+1}{2}}", None),
    ("\\boxed{\\frac{\\frac12}{3}}", None),
    ("It is \\frac{x+1}{2}.", None),
    # Mixed numbers.
    ("\\boxed{3\\frac{1}{2}}", Fraction(7, 2)),
    ("\\boxed{-3\\tfrac12}", Fraction(-7, 2)),
    ("\\boxed{13 \\dfrac{1}{4}}", Fraction(53, 4)),
    ("#### 3 1/2", Fraction(7, 2)),
    ("#### -3 1/2 cups", Fraction(-7, 2)),
    ("#### 3\u00bd", Fraction(7, 2)),
    ("#### \u00bd", Fraction(1, 2)),
    ("#### 3 4/2", None),
    # Units and other company.
    ("\\boxed{18\\text{ m}^2}", 18),
    ("\\boxed{18\\,\\mathrm{cm}^{3}}", 18),
    ("\\boxed{18 m^2}", 18),
    ("\\boxed{18\\text{ m}^2/\\text{s}^2}", 18),
    ("\\boxed{5\\text{ kg CO}_2}", 5),
    ("\\boxed{x_{1} = 5}", 5),
    ("\\boxed{\\text{18 eggs}}", 18),
    ("\\boxed{\\text{\\textbf{18}}}", 18),
    ("\\boxed{\\left(18\\right)}", 18),
    ("\\boxed{18~\\text{km/h}}", 18),
    ("\\boxed{90^\\circ}", 90),
    ("\\boxed{\\theta = 90^{\\circ}}", 90),
    ("\\boxed{60\\frac{\\text{km}}{\\text{h}}}", 60),
    ("\\boxed{\\underline{18}}", 18),
    ("\\boxed{\\color{red}{18}}", 18),
    ("\\boxed{\\Large 18}", 18),
    ("\\boxed{90^{\\circ}}", 90),
    ("\\boxed{\\$1{,}234.50}", Fraction("1234.5")),
    ("\\boxed 5", 5),
    ("#### 90\u00b0", 90),
    ("#### 18 m\u00b2", 18),
    ("#### __18__", 18),
    ("#### _18_", 18),
    ("#### `18`", 18),
    ("#### \u20ac18", 18),
    ("#### \u00a51,800", 1800),
    ("#### US$18", 18),
    ("#### Rs.18", 18),
    ("#### 18 USD", 18),
    # Signs.
    ("#### \u20135", -5),
    ("#### - 5", -5),
    ("\\boxed{- 5}", -5),
    ("#### 10-15", None),
    ("#### 10\u201315", None),
    ("#### \u00b15", None),
    ("\\boxed{\\pm 5}", None),
    # Expressions are no numbers.
    ("\\boxed{\\sqrt{16}}", None),
    ("\\boxed{2\\pi}", None),
    ("\\boxed{2^3}", None),
    ("\\boxed{3x^2}", None),
    ("\\boxed{5!}", None),
    ("\\boxed{5x}", None),
    ("\\boxed{5 i}", None),
    ("\\boxed{5 in}", 5),
    ("\\boxed{5\\theta}", None),
    ("\\boxed{0.\\overline{3}}", None),
    ("\\boxed{x^{2}+5}", None),
    ("\\boxed{5 \\times 3}", None),
    ("#### 5\u00b2", None),
    ("The result is 2^3.", None),
    # Neither are dates, times, lists, ordinals and other languages' separators.
    ("#### 3:30", None),
    ("#### 1 234", None),
    ("#### 1.234,50", None),
    ("\\boxed{5 \\text{ or } 6}", None),
    ("It is the 3rd.", None),
    # A numbered heading is no answer.
    ("#### 2. Add the apples\nSo 3 + 4 = 7", 7),
    ("#### 2) Add\nIt is \\boxed{7}.", 7),
    ("#### **2. Add**\n7", 7),
    ("#### (2) Add\n7", 7),
    ("#### 2\\. Add\n7", 7),
    ("#### 2.Add\n7", 7),
    ("##### 2. Add\n7", 7),
    ("##### 18", 18),
    ("#### 2: Add\n7", 7),
    ("#### 2 - Add\n7", 7),
    ("#### 3 steps:\n7", 7),
    ("#### 1. 5 + 3 = 8", 8),
    ("#### 18\n#### 2. Check it", 18),
    ("#### 18\n#### Explanation\nIn 2 steps", 18),
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


@pytest.mark.parametrize(
    ("split", "every"), [("test", 1), pytest.param("train", 5, marks=pytest.mark.slow)]
)
def test_real_answers_against_themselves(split: str, every: int) -> None:
    if not GSM8K.is_dir():
        pytest.skip("no GSM8K here")
    lines = (GSM8K / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    solutions = [json.loads(line)["answer"] for line in lines]
    assert len(solutions) == {"test": 1319, "train": 7473}[split]
    for solution in solutions[::every]:
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
    "_",
    "^",
    "10^",
    "1 1/",
    "\\text{",
    "m^2",
    "\u00bd",
    "\u2212",
    "#### 1. a\n",
    "\\boxed 1",
]


def test_time_is_linear_in_the_text() -> None:
    rng = random.Random(0)
    texts = [piece * (200_000 // len(piece)) for piece in HOSTILE]
    texts += ["".join(rng.choices(HOSTILE, k=50_000)) for _ in range(5)]
    for text in texts:
        start = time.process_time()
        final_number(text)
        assert time.process_time() - start < 20, text[:40]  # quadratic: minutes


def grade(answer: str, text: str, finish: str = "stop") -> float:
    empty = np.zeros(0)
    prompt = Prompt("p", empty.astype(np.int32), "?", answer)
    rollout = Rollout(empty.astype(np.int32), empty.astype(np.float32), (), finish, text)
    return reward(prompt, rollout)
