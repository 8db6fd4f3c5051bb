"""Kills change nothing in how a run ends: the drill, and that it would see a difference. The ten of
this seed are of all kinds and in all phases; half of them are such that a run survives."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.run import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import resume_drill

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]
KILLS, SEED = 10, 16752


@pytest.fixture(scope="module")
def drill(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """Its folder, and the finished process."""
    root = tmp_path_factory.mktemp("drill")
    small = ["rollout.batch_size=32", "rollout.group_size=4", "optim.lr=1e-3"]
    random_model = [f"model.path={model}", "reward.function=tests.e2e.rewards:even"]
    options = ["--kills", KILLS, "--seed", SEED, "--folder", root, "--out", root / "drill.json"]
    command = [sys.executable, "benchmarks/resume_drill.py", *map(str, options)]
    yield root, subprocess.run([*command, *random_model, *small], cwd=REPO, capture_output=True)


def runs(root: Path) -> tuple[Any, Any]:
    return resume_drill.Drilled(root, "killed", []), resume_drill.Drilled(root, "replayed", [])


def test_kills_change_nothing(drill: tuple[Path, Any]) -> None:
    root, process = drill
    assert process.returncode == 0, process.stderr.decode()
    *lines, result, _ = process.stdout.decode().splitlines()
    assert len(lines) == KILLS and all(" of step " in line for line in lines)
    found = json.loads((root / "drill.json").read_text())
    assert result == f"{KILLS}/{KILLS} kills: as if there had been none; weights {found['weights']}"
    victims = {kill["victim"] for kill in found["kills"]}
    phases = {kill["phase"] for kill in found["kills"]}
    assert victims == set(resume_drill.VICTIMS) and phases == set(resume_drill.PHASES)
    killed, _ = runs(root)
    attempts = list((killed.path / "logs").glob("[0-9]*"))
    assert len(attempts) == 1 + sum(kill["ended"] is not None for kill in found["kills"])


def test_the_drill_sees_a_difference(drill: tuple[Path, Any]) -> None:
    """One number of one step, one weight."""
    killed, replayed = runs(drill[0])
    before = killed.metrics.read_text()
    first = killed.rows("train")[0]["loss/total"]
    killed.metrics.write_text(
        before.replace(f'"loss/total": {first}', f'"loss/total": {first + 1}')
    )
    with pytest.raises(RuntimeError, match=r"step 1 has another \['loss/total'\] than its replay"):
        resume_drill.check_replay(killed, replayed)
    killed.metrics.write_text(before)
    weights = killed.hf / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RuntimeError, match="the weights are "):
        resume_drill.check_replay(killed, replayed)
