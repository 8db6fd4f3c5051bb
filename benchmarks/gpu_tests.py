"""The kernels' tests on a GPU, in as many processes as it takes.

    python benchmarks/gpu_tests.py --out kernels.json tests/kernels

A kernel that reads where it must not leaves the GPU unusable to its process, and every later test
would fail, too. So the device is waited for after each test; if it is lost, or the process with it,
the test at work has failed, and the others go on in a new process. The file is written after every
test. Options other than ``--out`` are pytest's.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from machine import ROOT
from summary import save_result

PLUGINS = ("pytest_timeout", "jaxtyping._pytest_plugin")  # no others, whatever is installed here
LONGEST = 60  # seconds of a test, its compilation included
CHARACTERS = 3000  # of a failure's report


class Record:
    """A pytest plugin: leaves out what an earlier process did, and writes what becomes of the rest.

    The file: ``{"processes": 1, "whole": true, "outcomes": {"passed": 3, ..}, "tests": {id:
    [outcome, seconds], ..}, "failures": {id: report, ..}}``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.session: Any = None
        self.found: dict[str, Any] = read(path)
        self.found |= {"processes": self.found["processes"] + 1, "whole": False}

    def pytest_sessionstart(self, session: Any) -> None:
        self.session = session

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.found["tests"]]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._note(nodeid, "failed", 0.0, "the process ended during this test")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            text = report.longreprtext[-CHARACTERS:]
            self._note(report.nodeid, report.outcome, report.duration, text)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if (error := lost()) is not None:
            seconds = self.found["tests"][nodeid][1]
            earlier = self.found["failures"].get(nodeid, "")
            self._note(nodeid, "failed", seconds, f"{earlier}\nthe GPU is lost: {error}".strip())
            self.session.shouldstop = "the GPU is lost to this process"

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.found["whole"] = exitstatus in (0, 1, 5)  # passed, failed, or nothing was left to do
        self._write()

    def _note(self, test: str, outcome: str, seconds: float, text: str) -> None:
        self.found["tests"][test] = [outcome, round(seconds, 3)]
        self.found["failures"].pop(test, None)
        if outcome == "failed":
            self.found["failures"][test] = text
        self._write()

    def _write(self) -> None:
        kinds = [outcome for outcome, _ in self.found["tests"].values()]
        self.found["outcomes"] = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
        save_result(self.path, self.found)


def read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"processes": 0, "whole": False, "outcomes": {}, "tests": {}, "failures": {}}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def lost() -> str | None:
    """What the GPU answers, if it no longer works."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def one_process(out: Path, wanted: list[str]) -> int:
    """Pytest's exit status."""
    tests = ModuleType("tests")  # a package of that name, wherever it is installed, hides ours
    tests.__path__ = [str(ROOT / "tests")]
    sys.modules["tests"] = tests
    plugins = [word for name in PLUGINS for word in ("-p", name)]
    limit = [f"--timeout={LONGEST}", "--timeout-method=thread"]
    return int(pytest.main([*plugins, *limit, *wanted], plugins=[Record(out)]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--within", action="store_true", help=argparse.SUPPRESS)
    options, wanted = parser.parse_known_args()
    if options.within:
        return one_process(options.out, wanted)
    options.out.unlink(missing_ok=True)
    command = [sys.executable, __file__, f"--out={options.out.resolve()}", "--within", *wanted]
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = -1
    while done < len(read(options.out)["tests"]):  # a process that did nothing is the last
        done = len(read(options.out)["tests"])
        subprocess.run(command, cwd=ROOT, env=alone)
        if read(options.out)["whole"]:
            break
    found = read(options.out)
    print(f"{found['outcomes']} in {found['processes']} processes")
    green = found["whole"] and found["outcomes"].get("passed") and not found["failures"]
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main())
