"""Checkpoint folders: what counts as whole, what is refused, what is kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.models import make_hf_model
from tests.spawn import run_ranks


def try_everything(root: str) -> dict[str, Any]:
    """All cases on one policy in one process: building it takes longer than the checks."""
    from peergrad.config import CheckpointConfig, Config, Dtype, ModelConfig
    from peergrad.parallel.checkpoint import Checkpoints
    from peergrad.parallel.groups import init_groups
    from peergrad.parallel.policy import Policy
    from peergrad.parallel.snapshot import damage, load_weights

    folder = Path(root) / "checkpoints"
    config = Config(model=ModelConfig(path=f"{root}/a", dtype=Dtype.float32))
    groups = init_groups(config.parallel, seed=0)
    policy = Policy(config, groups)
    checkpoints = Checkpoints(folder, CheckpointConfig(every=2, keep=2), groups)
    seen: dict[str, Any] = {"fresh": checkpoints.restore(policy)}
    seen["due"] = [step for step in range(1, 6) if checkpoints.due(step, 5)]

    for step in (2, 4, 5):
        checkpoints.save(policy, b"state", {}, None, step=step)
    seen["kept"] = sorted(p.name for p in folder.iterdir())
    seen["whole"] = damage(folder / "step_000005")

    def refused(function: Any) -> str:
        try:
            function()
        except ValueError as error:
            return str(error)
        return "accepted"

    checkpoints.save(policy, b"again", {}, None, step=5)  # a resumed run may save a step again
    seen["again"] = checkpoints.collector_state(5)

    file = next((folder / "step_000005" / "model").glob("*.distcp"))
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    seen["cut"] = refused(lambda: checkpoints.restore(policy))
    fallback = Checkpoints(folder, CheckpointConfig(fallback=True), groups)
    seen["fallback"] = fallback.restore(policy)
    file.write_bytes(content)

    shutil.copytree(folder / "step_000005", folder / ".step_000006.partial")  # a job that died
    seen["partial ignored"] = checkpoints.restore(policy)
    other = Policy(Config(model=ModelConfig(path=f"{root}/b", dtype=Dtype.float32)), groups)
    seen["foreign"] = refused(lambda: checkpoints.restore(other))
    seen["no folder"] = refused(
        lambda: load_weights(folder / "step_000009", policy.model, policy.shape)
    )
    meta = json.loads((folder / "step_000004" / "meta.json").read_text())
    (folder / "step_000004" / "meta.json").write_text(json.dumps({**meta, "format": 0}))
    seen["format"] = damage(folder / "step_000004")
    return seen


@pytest.mark.distributed
def test_checkpoint_folders(tmp_path: Path) -> None:
    make_hf_model(tmp_path / "a", layers=1)
    make_hf_model(tmp_path / "b", layers=2)
    (seen,) = run_ranks(1, try_everything, str(tmp_path))
    assert seen["fresh"] == 0
    assert seen["due"] == [2, 4, 5]
    assert seen["kept"] == ["latest", "step_000004", "step_000005"]
    assert seen["whole"] is None
    assert seen["again"] == b"again"
    assert "is damaged" in seen["cut"] and "checkpoint.fallback=true" in seen["cut"]
    assert seen["fallback"] == 4
    assert seen["partial ignored"] == 5
    assert "another model (layers 1 instead of 2)" in seen["foreign"]
    assert "no such folder" in seen["no folder"]
    assert seen["format"] == "format 0 instead of 1"
