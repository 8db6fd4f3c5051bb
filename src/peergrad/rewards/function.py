"""Your own reward: any ``(prompt, rollout) -> float``, named as ``package.module:callable``."""

import importlib
import inspect
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from peergrad.config import require
from peergrad.config.rules import one_line
from peergrad.data import Prompt, Rollout

RewardFunction = Callable[[Prompt, Rollout], float]


@dataclass(frozen=True)
class Failure:
    """Why a rollout has no reward.

    Example:
        ``Failure(kind="error", reason="raised ZeroDivisionError: division by zero (mine.py:7)")``
    """

    kind: str  # "error", "value", "timeout" or "crash"
    reason: str


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
        _check(False, path, f"cannot be imported ({type(error).__name__}: {one_line(error)})")
    _check(callable(function), path, "must name something callable")
    _check(_takes_two(function), path, "must take two arguments, (prompt, rollout)")
    checked: RewardFunction = function
    return checked


def _check(ok: bool, path: str, rule: str) -> None:
    require(ok, "reward.function", path, rule, "correct it, or set PYTHONPATH")


def _takes_two(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # some built-in callables do not tell their signature
        return True
    return True


def evaluate(function: RewardFunction, prompt: Prompt, rollout: Rollout) -> float | Failure:
    """Call ``function``; anything but a finite number is a failure."""
    try:
        value: object = function(prompt, rollout)
        number = float(value) if isinstance(value, Real) else math.nan
    except (Exception, SystemExit) as error:
        return Failure("error", _describe(error))
    if not math.isfinite(number):
        return Failure("value", f"returned {value!r:.80}, which is no finite number")
    return number


def _describe(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"raised {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
