"""The run on a GPU: what it keeps of parts that go wrong, and what it compares with what."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_targets import TARGETS, compare
from benchmarks.summary import spread
from tests.waiting import PATIENCE_SECONDS, wait_until

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_targets_are_of_lines_that_are_measured() -> None:
    import logprob

    measured = {(section, method) for section, _, method, _ in logprob.lines(tiny=False)}
    assert {(t.section, t.method) for t in TARGETS} <= measured


def test_a_target_is_a_share_of_the_floor_of_its_run() -> None:
    target = TARGETS[0]
    record = {
        "section": target.section,
        "method": target.method,
        "text": "8192 x 151936",
        "seconds": {kind: asdict(spread([1e-3])) for kind in ("forward", "both")},
        "floor": {"forward": 0.9e-3, "both": 0.1e-3},
    }
    first, both, *others = compare([{"floors": {}}, record], "NVIDIA H200")
    assert (first["measured_ms"], first["share"]) == pytest.approx((1.0, 0.9))
    assert first["reached"] and first["target_ms"] == pytest.approx(0.9 / target.share)
    assert first["estimate"]["ms"] == [0.61, 0.66] and "not measured" in first["estimate"]["basis"]
    assert both["reached"] is False
    assert [other["measured_ms"] for other in others] == [None] * 2
    slower = record | {"floor": {"forward": 0.8e-3, "both": 0.1e-3}}
    assert compare([slower], "NVIDIA H100 80GB HBM3")[0]["reached"] is False
    assert compare([slower], "NVIDIA H100 80GB HBM3")[0]["estimate"]["floor_ms"] == 0.74
    assert "estimate" not in compare([slower], None)[0]


def test_what_is_carried_is_what_was_tried_here() -> None:
    import gpu_carry

    lines = (FOLDER.parent / "requirements-cpu.lock").read_text().splitlines()
    assert set(gpu_carry.pinned()) <= set(lines)


WRITES = """
import sys, time
from pathlib import Path
file = next(word for word in sys.argv if word.startswith("--out=")).removeprefix("--out=")
Path(file).write_text('{"records": [1]}')
print("so far", flush=True)
Path(sys.argv[0]).with_name("said").touch()
"""


@pytest.mark.parametrize(
    ("then", "status", "said"),
    [
        ("", "done", None),
        ("sys.exit(3)", "failed with status 3", ["so far"]),
        ("time.sleep(60)", "over its time of 1 s", ["so far"]),
    ],
)
def test_what_a_part_wrote_is_kept_however_it_ends(
    tmp_path: Path,
    then: str,
    status: str,
    said: list[str] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import gpu

    wait, limit = subprocess.Popen.wait, 1.0 if "sleep" in then else PATIENCE_SECONDS

    def once_it_has_said(process: Any, timeout: float | None = None) -> int:
        if timeout == limit:
            wait_until((tmp_path / "said").exists)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", once_it_has_said)
    script = tmp_path / "part.py"
    script.write_text(WRITES + then)
    made = gpu.run(gpu.Part("one", limit, (str(script),)), limit, None)
    assert made["status"] == status and made.get("said") == said
    assert made["result"] == {"records": [1]}
    assert gpu.run(gpu.Part("late", 1.0, (str(script),)), -1.0, None)["result"] is None


def test_tests_behind_a_lost_process_are_run(tmp_path: Path) -> None:
    tests, out = tmp_path / "test_some.py", tmp_path / "out.json"
    tests.write_text(
        "import os\n"
        "def test_a(): pass\n"
        "def test_b(): os.kill(os.getpid(), 9)\n"
        "def test_c(): assert 1 == 2\n"
        "def test_d(): pass\n"
    )
    command = [sys.executable, str(FOLDER / "gpu_tests.py"), f"--out={out}", str(tests)]
    assert subprocess.run(command, capture_output=True).returncode == 1
    found = json.loads(out.read_text())
    assert (found["outcomes"], found["processes"]) == ({"failed": 2, "passed": 2}, 2)
    lost, failed = (next(v for k, v in found["failures"].items() if k.endswith(x)) for x in "bc")
    assert lost == "the process ended during this test" and "assert 1 == 2" in failed
