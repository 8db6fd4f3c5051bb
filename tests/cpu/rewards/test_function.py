"""What a reward may be and may return."""

import asyncio
import enum
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from peergrad.data import Prompt, Rollout
from peergrad.grades import Failure, Grade
from peergrad.rewards.function import evaluate, load_function

PROMPT = Prompt("train-17", np.zeros(1, np.int32), "1+2=", "3")
ROLLOUT = Rollout(np.zeros(1, np.int32), np.zeros(1, np.float32), ((0, 0, 1),), "stop", "3")


def graded(value: Any) -> Grade | Failure:
    return evaluate(lambda prompt, rollout: value, PROMPT, ROLLOUT)


@pytest.mark.parametrize(
    ("value", "reward"),
    [
        *[(1, 1.0), (0.25, 0.25), (True, 1.0), (-3, -3.0), (1e9, 1e9)],
        *[(np.bool_(True), 1.0), (np.bool_(False), 0.0), (np.int8(-3), -3.0), (np.uint64(7), 7.0)],
        *[(np.float16(0.5), 0.5), (np.float32(0.25), 0.25), (np.longdouble(2), 2.0)],
        *[(np.array(0.5), 0.5), (np.array(True), 1.0), (np.array(3, object), 3.0)],
        *[(torch.tensor(0.5), 0.5), (torch.tensor(True), 1.0), (torch.tensor(3), 3.0)],
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
        *[(Decimal("0.25"), 0.25), (Fraction(1, 4), 0.25)],
    ],
)
def test_every_scalar_is_a_reward(value: Any, reward: float) -> None:
    found = graded(value)
    assert found == Grade(reward) and type(found.reward) is float


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("1.0", "returned '1.0', which is no number"),
        (None, "returned None, which is no number"),
        ([1.0], "returned [1.0], which is no number"),
        ((1.0, {}), "returned (1.0, {}), which is no number"),
        (b"1", "returned b'1', which is no number"),
        (1j, "returned 1j, which is no real number"),
        (np.complex64(1), "returned np.complex64(1+0j), which is no real number"),
        (np.array([1.0]), "returned array([1.]), which is no single number"),
        (np.array("1.0"), "returned array('1.0', dtype='<U3'), which is no number"),
        (torch.zeros(2), "returned tensor([0., 0.]), which is no single number"),
        (float("nan"), "returned nan, which is not finite"),
        (float("-inf"), "returned -inf, which is not finite"),
        (np.float32("inf"), "returned np.float32(inf), which is not finite"),
        (torch.tensor(float("nan")), "returned tensor(nan), which is not finite"),
        (Decimal("NaN"), "returned Decimal('NaN'), which is not finite"),
        (Decimal("sNaN"), "returned Decimal('sNaN'), which is not finite"),
        (1e155, "returned 1e+155, which is beyond 1e+09: scale it down"),
        (-1.1e9, "returned -1100000000.0, which is beyond 1e+09: scale it down"),
        pytest.param(10**400, "which is beyond 1e+09: scale it down", id="huge"),
        pytest.param(10**5000, "returned a value of type int, which is beyond 1e+09", id="huger"),
        ({"value": 1}, "which must have one of the keys 'score' and 'reward'"),
        ({"score": "1"}, "returned {'score': '1'}, which is no number"),
    ],
)
def test_nothing_else_is(value: Any, reason: str) -> None:
    found = graded(value)
    assert isinstance(found, Failure) and found.kind == "value"
    assert reason in found.reason and "\n" not in found.reason


def test_a_dictionary_has_a_score_and_parts() -> None:
    value = {"score": np.float32(0.5), "format": True, "pred": "3", "long": float("nan"), 3: 1.0}
    assert graded(value) == Grade(0.5, {"format": 1.0})
    assert graded({"reward": 2}) == Grade(2.0)


def test_parts_are_named_by_plain_text() -> None:
    """Pickled, the name of an enum's member would have the collector import the user's module."""

    class Part(enum.StrEnum):
        score, form = "score", "form"

    found = graded({Part.score: 1, Part.form: 0.5})
    assert isinstance(found, Grade) and found.parts == {"form": 0.5}
    assert [type(name) for name in found.parts] == [str]
    assert graded({"score": 1, "a\n\ud83d": 2}) == Grade(1.0, {"a \\ud83d": 2.0})


class Broken(dict[str, int]):
    def items(self) -> NoReturn:
        raise RuntimeError("broken")


@pytest.mark.parametrize("value", [Broken(score=1), torch.empty((), device="meta")])
def test_values_that_raise(value: Any) -> None:
    found = graded(value)
    assert isinstance(found, Failure) and found.kind == "value"
    assert ", which raised RuntimeError: " in found.reason


class Unprintable(Exception):
    def __str__(self) -> NoReturn:
        raise RuntimeError("broken")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyboardInterrupt(), "KeyboardInterrupt: KeyboardInterrupt ("),
        (asyncio.CancelledError(), "CancelledError: CancelledError ("),
        (GeneratorExit("?"), "GeneratorExit: ? ("),
        (Unprintable(), "Unprintable: an error that cannot be printed ("),
        (ValueError("\ud83d"), "ValueError: \\ud83d ("),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_whatever_is_raised_is_an_error(error: BaseException, text: str, later: bool) -> None:
    def raises(prompt: Prompt, rollout: Rollout) -> float:
        raise error

    async def raises_later(prompt: Prompt, rollout: Rollout) -> float:
        await asyncio.sleep(0)
        raise error

    if later and isinstance(error, KeyboardInterrupt):
        pytest.skip("ends a loop's task otherwise")
    found = evaluate(raises_later if later else raises, PROMPT, ROLLOUT)
    assert isinstance(found, Failure) and found.kind == "error"
    assert found.reason.startswith(f"raised {text}")


def test_a_line_break_in_an_error_is_none_in_the_report() -> None:
    def raises(prompt: Prompt, rollout: Rollout) -> float:
        raise KeyError("a\nb")

    found = evaluate(raises, PROMPT, ROLLOUT)
    assert isinstance(found, Failure) and found.kind == "error"
    assert found.reason.startswith(r"raised KeyError: 'a\nb' (") and __file__ in found.reason


def test_coroutines_are_awaited_in_one_loop() -> None:
    loops = []

    async def score(prompt: Prompt, rollout: Rollout) -> float:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return float(rollout.text == prompt.answer)

    async def fails(prompt: Prompt, rollout: Rollout) -> float:
        raise TimeoutError("the judge")

    with asyncio.Runner() as runner:
        for _ in range(2):
            assert evaluate(score, PROMPT, ROLLOUT, runner) == Grade(1.0)
        failure = evaluate(fails, PROMPT, ROLLOUT, runner)
    assert loops[0] is loops[1]
    assert isinstance(failure, Failure) and "raised TimeoutError: the judge" in failure.reason


FORMS = """
class Judge:
    def score(self, prompt, rollout): return 1.0
    def __call__(self, prompt, rollout): return 1.0
    @staticmethod
    def fixed(prompt, rollout): return 1.0

class Yields:
    def __call__(self, prompt, rollout): yield 1.0

def trl(prompts, completions, **kwargs): return [1.0 for _ in completions]
def trl_answers(completions, answer, **kwargs): return [1.0 for _ in completions]
def one(completions, **kwargs): return [1.0]
def verl_math(solution_str, ground_truth): return 0.0
def verl(data_source, solution_str, ground_truth, extra_info=None): return 1.0
def swapped(rollout, prompt): return 1.0
def rollout_alone(rollout): return 1.0
def yields(prompt, rollout): yield 1.0
async def streams(prompt, rollout): yield 1.0
def keyword(prompt, rollout, *, answer): return 1.0

async def later(prompt, rollout): return 1.0
def more(prompt, rollout, weight=0.5): return 1.0
def any_(*args, **kwargs): return 1.0
judge, yielder, bound = Judge(), Yields(), Judge().score
import functools
partial = functools.partial(more, weight=1.0)
partial_yields = functools.partial(yields)
"""


@pytest.fixture
def forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reward_forms.py").write_text(FORMS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "reward_forms", raising=False)


FORM = "; write it as def score(prompt, rollout) -> float, or async def"


@pytest.mark.parametrize(
    ("name", "rule", "takes"),
    [
        ("Judge", "is a class, and must be a function: name a method or an instance of it", None),
        (
            "Judge.score",
            "is a method without its object, and must be a function or an object's method",
            "(self, prompt, rollout)",
        ),
        ("yielder", "is a generator (it has a yield), and must return its reward", None),
        ("yields", "is a generator (it has a yield), and must return its reward", None),
        ("partial_yields", "is a generator (it has a yield), and must return its reward", None),
        ("streams", "is a generator (it has a yield), and must return its reward", None),
        ("trl", "grades lists, as TRL's rewards do, and must grade one answer",
         "(prompts, completions, **kwargs)"),
        ("trl_answers", "grades lists, as TRL's rewards do, and must grade one answer",
         "(completions, answer, **kwargs)"),
        ("one", "grades lists, as TRL's rewards do, and must grade one answer",
         "(completions, **kwargs)"),
        ("verl_math", "grades texts, as verl's rewards do, and must take (prompt, rollout)",
         "(solution_str, ground_truth)"),
        ("verl", "grades texts, as verl's rewards do, and must take (prompt, rollout)",
         "(data_source, solution_str, ground_truth, extra_info=None)"),
        ("keyword", "must take two arguments, (prompt, rollout)", "(prompt, rollout, *, answer)"),
        ("rollout_alone", "must take two arguments, (prompt, rollout)", "(rollout)"),
        ("swapped", "must take the prompt first, then the rollout", "(rollout, prompt)"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("forms")
def test_forms_that_can_never_work(name: str, rule: str, takes: str | None) -> None:
    with pytest.raises(ValueError) as error:
        load_function(f"reward_forms:{name}")
    instead = "" if takes is None else f", instead of {takes}"
    assert str(error.value) == f"reward.function = 'reward_forms:{name}': {rule}{FORM}{instead}"


@pytest.mark.parametrize(
    "name", ["judge", "bound", "Judge.fixed", "later", "more", "any_", "partial"]
)
@pytest.mark.usefixtures("forms")
def test_forms_that_work(name: str) -> None:
    assert evaluate(load_function(f"reward_forms:{name}"), PROMPT, ROLLOUT) == Grade(1.0)
