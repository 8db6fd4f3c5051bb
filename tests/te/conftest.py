"""Ranks of these tests have the stand-in; where they cannot, the tests are skipped and say why."""

from pathlib import Path

import pytest

from tests import spawn
from tests.te.install import missing

HERE = Path(__file__).parent
found: list[str] = []  # why they are skipped


def pytest_configure(config: pytest.Config) -> None:
    """Called once this file is found. There is one fork server for all of a session's tests."""
    asked = [config.invocation_params.dir / arg.split("::")[0] for arg in config.args]
    alone = all(path.resolve().is_relative_to(HERE) for path in asked)
    reason = (
        missing()
        if alone
        else "ranks here have Transformer Engine, all others none: run tests/te alone"
    )
    if reason is None:
        spawn.PRELOAD = "tests.te.preload"
    else:
        found.append(reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if found and item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason=found[0]))
