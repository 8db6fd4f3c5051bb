"""Rewards that could never be earned are refused before anything is started."""

import sys
from pathlib import Path

import numpy as np
import pytest

from peergrad.config import RewardConfig, RewardKind
from peergrad.data import Prompt
from peergrad.rewards import check_answers, check_function


def function(name: str) -> RewardConfig:
    return RewardConfig(kind=RewardKind.function, function=name)


MODULES = {
    "broken": ("def (", "cannot be imported (SyntaxError: "),
    "absent": (None, "cannot be imported (ModuleNotFoundError: "),
    "without": ("", "cannot be imported (AttributeError: "),
    "noise": ("raise ImportError('a\\nb')", "cannot be imported (ImportError: a b)"),
    "number": ("score = 1", "must name something callable; "),
    "single": (
        "def score(rollout): return 1.0",
        "must take two arguments, (prompt, rollout); ",
    ),
    "leaves": ("import os; os._exit(3)", "importing it ended its process, status 3; "),
    "hangs": ("import time; time.sleep(60)", "importing it took longer than 3 s; correct the "),
}


@pytest.mark.parametrize("name", MODULES)
def test_functions_that_cannot_be_used(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, rule = MODULES[name]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    if text is not None:
        (tmp_path / f"mine_{name}.py").write_text(text)
    with pytest.raises(ValueError) as caught:
        check_function(function(f"mine_{name}:score"), limit=3 if name == "hangs" else 60)
    message = str(caught.value)
    assert message.startswith(f"reward.function = 'mine_{name}:score': {rule}")
    assert "\n" not in message and "; " in message


def test_a_function_that_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "mine.py").write_text("class Scores:\n    def score(prompt, rollout): return 1.0")
    check_function(function("mine:Scores.score"))
    check_function(RewardConfig())


def prompts(*answers: str) -> list[Prompt]:
    tokens = np.array([1], np.int32)
    return [Prompt(f"train-{i}", tokens, "?", answer) for i, answer in enumerate(answers)]


@pytest.mark.parametrize(
    ("kind", "answer", "problem"),
    [
        ("gsm8k", "no idea", "'no idea') is not one number, bare or after ####"),
        ("gsm8k", "#### 1 or 2", "'#### 1 or 2') is not one number"),
        ("gsm8k", "", "'') is not one number"),
        ("arithmetic", "1 + 1\n#### 2", "'1 + 1\\n#### 2') is a whole solution, compared to the"),
        ("arithmetic", " ", "' ') is empty"),
        ("math", "}{", "'}{') cannot be read as mathematics"),
        ("math", "", "'') is empty"),
        ("math", "\\boxed{}", "'\\\\boxed{}') is empty"),
    ],
)
def test_answers_that_can_never_be_matched(kind: str, answer: str, problem: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_answers(RewardKind[kind], prompts("5", answer, answer), "data.source")
    start = f"reward.kind = {kind!r}: the answer in row 2 of data.source ({problem}"
    assert str(caught.value).startswith(start) and "; " in str(caught.value)


def test_answers_that_can(tmp_path: Path) -> None:
    check_answers(RewardKind.gsm8k, prompts("#### 18", "9 * 2 = $18\n#### $1,800.50", "7"), "x")
    check_answers(RewardKind.arithmetic, prompts("7", "seven"), "x")
    check_answers(RewardKind.function, prompts("", "####"), "x")
    check_answers(RewardKind.gsm8k, prompts("1e-05", "3e+08", "\\frac34"), "x")
    check_answers(RewardKind.math, prompts("7", "\\frac{1}{2}", "$x=5$", "$(1, 2]$", "no"), "x")


def test_a_row_without_a_number_is_named_by_its_id() -> None:
    prompt = Prompt("train-a.jsonl", np.array([1], np.int32), "?", "none")
    with pytest.raises(ValueError, match=r"the answer to train-a\.jsonl of x \('none'\) is not"):
        check_answers(RewardKind.gsm8k, [prompt], "x")
