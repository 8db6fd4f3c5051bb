"""Put the stand-in where Transformer Engine and Megatron find it.

In a process of its own: what these decide when they are imported holds for its whole life.
"""

import importlib.util
import os
import sys
import warnings
from pathlib import Path

PACKAGES = Path(sys.prefix) / "te"
"""Where ``make`` installs ``requirements-te.lock``, apart from what a run imports."""


def missing() -> str | None:
    """Why it cannot be installed here; None: it can."""
    there = (PACKAGES / "transformer_engine").is_dir()
    return None if there else f"no {PACKAGES}: make quick-te installs it"


def install() -> None:
    """Before Megatron is imported; a second time it does nothing.

    From then on ``parallel.spec=te`` is possible in this process, and in those forked from it.
    """
    from tests.te import extension, gpu

    if extension.NAME in sys.modules:
        return
    assert (reason := missing()) is None, reason
    sys.path.append(str(PACKAGES))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # no libraries of CUDA are looked for
    os.environ["NVTE_TORCH_COMPILE"] = "0"
    sys.modules[extension.NAME] = extension.make()
    _load_common()
    gpu.pretend()
    from peergrad.parallel.device import without_compiler

    with without_compiler(), warnings.catch_warnings(action="ignore"):
        import transformer_engine.pytorch

        transformer_engine.common = sys.modules["transformer_engine.common"]
        import peergrad.parallel.policy  # noqa: F401
    from peergrad.parallel import engine

    engine.has_gpu = lambda: True


def _load_common() -> None:
    """Its part for all frameworks, which would load the compiled module from a file."""
    name = "transformer_engine.common"
    folder = PACKAGES / "transformer_engine" / "common"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    common = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(common)
    common.load_framework_extension = lambda framework: None
