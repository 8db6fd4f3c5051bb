"""Your own reward: any ``(prompt, rollout) -> number``, named as ``package.module:callable``.

Some wrong forms are told by their signature, before anything is started; the rest by what the
first calls do.
"""

import asyncio
import importlib
import inspect
import math
import traceback
from collections.abc import Awaitable, Callable, Mapping
from decimal import Decimal
from numbers import Complex, Real
from typing import Any

from peergrad.config import LARGEST_REWARD, require
from peergrad.config.rules import one_line
from peergrad.data import Prompt, Rollout
from peergrad.grades import Failure, Grade

RewardFunction = Callable[[Prompt, Rollout], Any]

SCORES = ("score", "reward")
"""The key of a returned dictionary that holds the reward; its other numbers are metrics."""
LISTS = {"prompts", "completions", "queries", "responses", "rollouts", "samples", "solutions"}
"""First or second argument of rewards that grade a batch at a time, as other trainers call them."""
TEXTS = {"data_source", "solution_str", "ground_truth", "model_output"}
"""The same of those that are given texts. Many of them catch all errors and return 0."""


def load_function(path: str) -> RewardFunction:
    """Import ``package.module:callable``. Raises ValueError, which names reward.function.

    Example:
        >>> load_function("peergrad.rewards.gsm8k:reward")
        <function reward at 0x7f3c5a1e8c20>
    """
    module, _, name = path.partition(":")
    _check(bool(module and name), path, "must look like package.module:callable")
    try:
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        rule = f"cannot be imported ({type(error).__name__}: {one_line(error)})"
        raise ValueError(
            f"reward.function = {path!r}: {rule}; correct it, or set PYTHONPATH"
        ) from error
    problem, takes = _unusable(function)
    instead = "" if takes is None else f", instead of {one_line(str(takes), 100)}"
    _check(problem is None, path, problem or "", instead)
    checked: RewardFunction = function
    return checked


def _check(ok: bool, path: str, rule: str, instead: str = "") -> None:
    form = f"write it as def score(prompt, rollout) -> float, or async def{instead}"
    require(ok, "reward.function", path, rule, form)


def _unusable(function: Any) -> tuple[str | None, inspect.Signature | None]:
    """Why ``function`` can never grade an answer, None if nothing speaks against it; its
    arguments, if they are the reason."""
    if not callable(function):
        return "must name something callable", None
    if inspect.isclass(function):
        return "is a class, and must be a function: name a method or an instance of it", None
    called = (function, type(function).__call__)  # the first may be a partial
    if any(inspect.isgeneratorfunction(f) or inspect.isasyncgenfunction(f) for f in called):
        return "is a generator (it has a yield), and must return its reward", None
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in callables do not tell their signature
        return None, None
    return _misfit(signature), signature


def _misfit(signature: inspect.Signature) -> str | None:
    names = list(signature.parameters)[:2]
    if names[:1] == ["self"]:
        return "is a method without its object, and must be a function or an object's method"
    if LISTS & set(names):
        return "grades lists, as TRL's rewards do, and must grade one answer"
    if TEXTS & set(names):
        return "grades texts, as verl's rewards do, and must take (prompt, rollout)"
    try:
        signature.bind(None, None)
    except TypeError:
        return "must take two arguments, (prompt, rollout)"
    if names[1:] == ["prompt"] or names[:1] == ["rollout"]:
        return "must take the prompt first, then the rollout"
    return None


def evaluate(
    function: RewardFunction, prompt: Prompt, rollout: Rollout, runner: asyncio.Runner | None = None
) -> Grade | Failure:
    """Call ``function``, and await in ``runner`` what it returns if that can be awaited; anything
    but a usable number, alone or as the score of a dictionary, is a failure."""
    try:
        value: object = function(prompt, rollout)
        if inspect.isawaitable(value):
            run = asyncio.run if runner is None else runner.run
            value = run(_result(value))
    except BaseException as error:  # cancelled, interrupted, exited: of the function's own doing
        return Failure("error", _describe(error))
    try:
        return _grade(value)
    except ValueError as error:
        return Failure("value", f"returned {_short(value)}, {error}")
    except Exception as error:  # of the value's own methods
        return Failure("value", f"returned {_short(value)}, which {_describe(error)}")


async def _result(value: Awaitable[object]) -> object:
    return await value


def _grade(value: object) -> Grade:
    """Raises ValueError, which says what is wrong with ``value``."""
    if not isinstance(value, Mapping):
        return Grade(number(value))
    keys = [key for key in SCORES if key in value]
    if len(keys) != 1:
        raise ValueError("which must have one of the keys 'score' and 'reward'")
    parts = {}
    for key, part in value.items():
        if isinstance(key, str) and key not in keys:
            try:
                # A name that every sink can write; a member of an enum is another module's.
                parts[one_line(str.__str__(key), 80)] = number(part)
            except ValueError:  # a note for people: verl's rewards return the extracted answer
                continue
    return Grade(number(value[keys[0]]), parts)


def number(value: object) -> float:
    """``value`` as a float: any real number of Python, numpy or torch, a truth value, an array or
    tensor without dimensions. Raises ValueError, which says what else it is."""
    item = getattr(value, "item", None)
    if callable(item) and not isinstance(value, Real):  # numpy.bool_, arrays, tensors of any kind
        if getattr(value, "shape", None) != ():
            raise ValueError("which is no single number")
        value = item()
    if isinstance(value, Complex) and not isinstance(value, Real):
        raise ValueError("which is no real number")
    if not isinstance(value, Real | Decimal):
        raise ValueError("which is no number")
    beyond = f"which is beyond {LARGEST_REWARD:g}: scale it down"
    try:
        found = float(value)
    except OverflowError as error:  # an integer of a thousand digits
        raise ValueError(beyond) from error
    except ValueError:  # a signalling NaN
        found = math.nan
    if not math.isfinite(found):
        raise ValueError("which is not finite")
    if abs(found) > LARGEST_REWARD:
        raise ValueError(beyond)
    return found


def _short(value: object) -> str:
    try:
        return one_line(repr(value), 80)
    except Exception:  # the user's own __repr__, or an integer too long for Python to print
        return f"a value of type {type(value).__name__}"


def _describe(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    try:
        text = one_line(error)
    except Exception:  # its own __str__
        text = "an error that cannot be printed"
    return f"raised {type(error).__name__}: {text} ({place.filename}:{place.lineno})"
