"""Whether Transformer Engine here is whole: its parts of one version, its compiled part, cuDNN."""

from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from peergrad.config import Config, Spec
from peergrad.preflight.report import Found, problem

PACKAGE = "transformer-engine"
COMPILED = f"{PACKAGE}-torch"
CORES = (f"{PACKAGE}-cu13", f"{PACKAGE}-cu12")
RANGE = ((2, 9), (2, 12))
"""From the first on, below the second: what megatron-core 0.16.1 is for by its own word."""
CUDNN = 90600
"""9.6.0, which takes sequences of any lengths in one row without building its graphs anew."""
CAPABILITY = 8.0
"""Of a GPU that multiplies in bfloat16."""
REMEDY = "install it as README.md says, with requirements-gpu.lock"


def asks_for_engine(config: Config | None) -> bool:
    """Whether ranks are to have its layers, where it is."""
    return config is None or config.parallel.spec is not Spec.torch


def needs_engine(config: Config | None) -> bool:
    return config is not None and config.parallel.spec is Spec.te


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_packages(needed: bool, versions: Callable[[str], str | None] = installed) -> Found:
    """What the packages say of themselves; without Transformer Engine nothing is wrong unless it is
    ``needed``."""
    found = versions(PACKAGE)
    if found is None:
        wrong = problem(PACKAGE, None, "parallel.spec=te needs it", REMEDY)
        return Found((wrong,) if needed else ())
    low, high = RANGE
    if not low <= _numbers(found) < high:
        rule = f"megatron-core is for {_spell(low)} to below {_spell(high)}"
        return Found((problem(PACKAGE, found, rule, REMEDY),))
    core = next((name for name in CORES if versions(name) is not None), CORES[0])
    for name in (COMPILED, core):
        if (other := versions(name)) != found:
            rule = f"{PACKAGE} {found} needs the same version of it"
            return Found((problem(name, other, rule, REMEDY),))
    return Found()


def judge(said: Mapping[str, Any]) -> Found:
    """What is wrong with what the probe has found on the GPUs: ``capability`` of the least, and
    where Transformer Engine is installed ``error`` of its import, or ``cudnn``."""
    wrong = []
    if (least := said.get("capability", CAPABILITY)) < CAPABILITY:
        rule = f"bfloat16 needs {CAPABILITY} (Ampere) or more"
        wrong.append(problem("gpu capability", least, rule, "choose other GPUs"))
    if (error := said.get("error")) is not None:
        rule = f"transformer_engine.pytorch cannot be imported ({error[:200]})"
        remedy = "build it for this torch (README.md), or set parallel.spec=torch"
        wrong.append(problem(PACKAGE, installed(PACKAGE), rule, remedy))
    if (cudnn := said.get("cudnn", CUDNN)) < CUDNN:
        rule = f"Transformer Engine's attention needs {CUDNN} (9.6.0) or later"
        wrong.append(problem("cudnn", cudnn, rule, REMEDY))
    return Found(tuple(wrong))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())


def _spell(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
