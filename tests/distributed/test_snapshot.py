"""Checkpoint folders: what counts as whole, what is refused, what is kept, what a full disk or a
damaged file ends in."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any
from unittest import mock

import psutil
import pytest
import torch

from peergrad.storage import size_of
from tests.disk import small_disk
from tests.models import make_hf_model
from tests.spawn import run_ranks


def refused(function: Callable[[], Any]) -> str:
    """The error of ``function`` with its class; what it returned if there was none."""
    try:
        return f"accepted: {function()}"
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


@cache
def one_rank() -> Any:
    from peergrad.config import ParallelConfig
    from peergrad.parallel.mesh import init_mesh

    return init_mesh(ParallelConfig(), seed=0)


def make_policy(path: str, dtype: str = "float32", distributed: bool = True, **optim: Any) -> Any:
    from peergrad.config import Config, Dtype, ModelConfig, OptimConfig, ParallelConfig
    from peergrad.parallel.policy import Policy

    config = Config(
        model=ModelConfig(path=path, dtype=Dtype[dtype]),
        parallel=ParallelConfig(distributed_optimizer=distributed),
        optim=OptimConfig(**optim),
    )
    return Policy(config, one_rank())


def keeper(folder: Path, policy: Any, **config: Any) -> Any:
    from peergrad.config import CheckpointConfig
    from peergrad.parallel.checkpoint import Checkpoints

    return Checkpoints(folder, CheckpointConfig(**config), policy.mesh)


def try_everything(root: str) -> dict[str, Any]:
    """All cases in one process: starting it takes longer than the checks."""
    policy = make_policy(f"{root}/a")
    seen = try_folders(Path(root), policy)
    seen["aside"] = try_aside(Path(root) / "aside", policy)
    seen["damage"] = try_damage(Path(root) / "damage", policy)
    seen["settings"] = try_settings(Path(root), policy)
    seen["links"] = try_links(Path(root) / "links", policy)
    seen["disks"] = try_full_disks(Path(root) / "disk", policy)
    return seen


def try_folders(root: Path, policy: Any) -> dict[str, Any]:
    from peergrad.parallel.damage import damage
    from peergrad.parallel.snapshot import load_weights

    folder = root / "checkpoints"
    checkpoints = keeper(folder, policy, every=2, keep=2)
    seen: dict[str, Any] = {"fresh": checkpoints.restore(policy)}
    seen["due"] = [step for step in range(1, 6) if checkpoints.due(step, 5)]

    for step in (2, 4, 5):
        checkpoints.save(policy, b"state", {}, None, step=step)
    seen["left running"] = [child.name() for child in psutil.Process().children(recursive=True)]
    seen["kept"] = sorted(p.name for p in folder.iterdir())
    seen["whole"] = damage(folder / "step_000005")
    checkpoints.save(policy, b"again", {}, None, step=5)  # a resumed run may save a step again
    seen["again"] = checkpoints.collector_state(5)

    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("peergrad.parallel.checkpoint").addHandler(handler)
    logging.getLogger("peergrad.parallel.checkpoint").setLevel(logging.INFO)
    shutil.copytree(folder / "step_000005", folder / ".step_000006.partial")  # a job that died
    seen["partial ignored"] = checkpoints.restore(policy)
    (folder / "step_000005").replace(folder / ".step_000005.old")  # killed between two renames
    seen["renames"] = (checkpoints.restore(policy), sorted(p.name for p in folder.iterdir()))
    checkpoints.save(policy, b"again", {}, None, step=5)
    seen["logged"] = list(logged)
    other = make_policy(f"{root}/b")
    seen["foreign"] = refused(lambda: checkpoints.restore(other))
    seen["no folder"] = refused(
        lambda: load_weights(folder / "step_000009", policy.model, policy.shape, policy.mesh)
    )
    return seen


def try_aside(folder: Path, policy: Any) -> dict[str, Any]:
    """Save while the policy changes: its files are only written once it has."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    changed, write = Event(), FileSystemWriterAsync.write_preloaded_data

    def late(*arguments: Any, **options: Any) -> None:
        changed.wait()
        write(*arguments, **options)

    checkpoints = keeper(folder, policy)
    checkpoints.save(policy, b"one", {}, None, step=1)
    was = state_of(policy)
    with mock.patch.object(FileSystemWriterAsync, "write_preloaded_data", staticmethod(late)):
        checkpoints.begin(policy, b"two", {}, None, step=2, aside=True)
        seen: dict[str, Any] = {"written": [checkpoints.written()]}
        for tensor in tensors_of(policy):
            tensor.add_(1)
        seen["before"] = sorted(p.name for p in folder.glob("[!.]*"))
        changed.set()
        while not checkpoints.written():
            time.sleep(0.01)
        seen["written"].append(checkpoints.written())
        saved = checkpoints.finish()
    seen["after"] = sorted(p.name for p in folder.glob("[!.]*"))
    seen["saved"] = saved.target.name, saved.size == size_of(saved.target), saved.seconds > 0
    moved = state_of(policy)
    seen["restored"] = checkpoints.restore(policy), checkpoints.collector_state(2)
    seen["equal"] = [torch.equal(a, b) for a, b in zip(was, state_of(policy), strict=True)]
    seen["changed"] = [not torch.equal(a, b) for a, b in zip(was, moved, strict=True)]
    return seen


def tensors_of(policy: Any) -> list[torch.Tensor]:
    """All that a checkpoint holds of weights and optimizer, but for counts of steps."""
    (inner,) = policy.optimizer.chained_optimizers
    states = inner.optimizer.state.values()
    moments = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]
    masters = [p for group in inner.optimizer.param_groups for p in group["params"]]
    return [p.data for p in policy.model.parameters()] + moments + [p.data for p in masters]


def state_of(policy: Any) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors_of(policy)]


def try_damage(folder: Path, policy: Any) -> dict[str, str]:
    """Every kind of damage to the newest of two checkpoints, which is mended after each."""
    from peergrad.parallel.snapshot import load_weights

    checkpoints = keeper(folder, policy)
    for step in (4, 5):
        checkpoints.save(policy, b"state", {}, None, step=step)
    newest = folder / "step_000005"
    described = (newest / "meta.json").read_bytes()
    meta = {k: v for k, v in json.loads(described).items() if k != "seal"}
    weights = next((newest / "model").glob("*.distcp"))
    content = weights.read_bytes()
    broken = content[: len(content) // 4] + bytes(len(content) // 2) + content[len(content) // 4 :]
    unchecked = {k: v for k, v in meta.items() if k != "xxh3_128"}
    cases: dict[str, tuple[Path, bytes]] = {
        "cut": (weights, content[:-1]),
        "flipped": (weights, content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]),
        "collector": (newest / "collector.pt", b"STATE"),
        "algo": (newest / "algo.json", b"[]"),
        "rng": (newest / "rng_00000.pt", bytes(meta["files"]["rng_00000.pt"])),
        "latest empty": (folder / "latest", b""),
        "latest outside": (folder / "latest", b"../x"),
        "latest gone": (folder / "latest", b"step_000007"),
        "latest bytes": (folder / "latest", b"\xff"),
        "list": (newest / "meta.json", b"[]"),
        "bytes": (newest / "meta.json", b"\xff"),
        "no world": (newest / "meta.json", dump({k: v for k, v in meta.items() if k != "world"})),
        "format": (newest / "meta.json", dump({**meta, "format": 0})),
        "outside": (newest / "meta.json", dump({**meta, "files": {"../../x": 1}})),
        "no digest": (newest / "meta.json", dump({**meta, "xxh3_128": {}})),
        "renamed": (newest / "meta.json", dump({**meta, "step": 4})),
        "updates": (newest / "meta.json", described.replace(b'"updates": 0', b'"updates": 1')),
        "unguarded": (newest / "meta.json", described.replace(b"xxh3_128", b"xxh3_129")),
    }
    seen = {}
    for name, (file, damaged) in cases.items():
        before = file.read_bytes()
        file.write_bytes(damaged)
        seen[name] = refused(lambda: checkpoints.restore(policy))
        if name in ("cut", "latest empty", "list"):
            seen[f"{name}, fallback"] = refused(
                lambda: keeper(folder, policy, fallback=True).restore(policy)
            )
        file.write_bytes(before)

    # Files of real models are too large for one process: all ranks read their share of them.
    weights.write_bytes(cases["flipped"][1])
    with mock.patch("peergrad.parallel.damage.SMALL_BYTES", 0):
        seen["large"] = refused(lambda: checkpoints.restore(policy))
        falling = keeper(folder, policy, fallback=True)
        seen["large, fallback"] = refused(lambda: falling.restore(policy))
        shape, mesh = policy.shape, policy.mesh
        seen["large, weights"] = refused(lambda: load_weights(newest, policy.model, shape, mesh))
    weights.write_bytes(content)

    # What no digest guards: checkpoints of older versions.
    (newest / "meta.json").write_bytes(dump(unchecked))
    for name in (weights.name, "common.pt", ".metadata"):
        file = newest / "model" / name
        before = file.read_bytes()
        file.write_bytes(broken[: len(content)] if file == weights else bytes(len(before)))
        seen[name.removeprefix("__0_")] = refused(lambda: checkpoints.restore(policy))
        file.write_bytes(before)
    (newest / "rng_00000.pt").write_bytes(bytes(meta["files"]["rng_00000.pt"]))
    seen["rng unchecked"] = refused(lambda: checkpoints.restore(policy))
    (newest / "algo.json").write_bytes(b"[]")
    seen["algo unchecked"] = refused(lambda: checkpoints.algo_state(5))
    shutil.rmtree(folder / "step_000004")
    seen["none left"] = refused(lambda: checkpoints.restore(policy))
    shutil.rmtree(newest / "model")
    seen["none left, fallback"] = refused(
        lambda: keeper(folder, policy, fallback=True).restore(policy)
    )
    (folder / "latest").unlink()
    seen["no latest"] = refused(lambda: checkpoints.restore(policy))
    return seen


def dump(meta: dict[str, Any]) -> bytes:
    return json.dumps(meta).encode()


def try_settings(root: Path, policy: Any) -> dict[str, Any]:
    """Save with one kind of optimizer or precision, resume with another."""
    seen: dict[str, Any] = {}
    kinds = [(d, o) for d in ("float32", "bfloat16") for o in (True, False)]
    for dtype, distributed in kinds:
        saved = make_policy(f"{root}/a", dtype, distributed)
        folder = root / f"{dtype}-{distributed}"
        keeper(folder, saved).save(saved, None, {}, None, step=1)
        for other in kinds:
            resumed = make_policy(f"{root}/a", *other)
            restore = keeper(folder, resumed).restore
            seen[f"{dtype, distributed} -> {other}"] = refused(lambda r=restore, p=resumed: r(p))
        meta = json.loads((folder / "step_000001" / "meta.json").read_text())
        (folder / "step_000001" / "meta.json").write_bytes(
            dump({k: v for k, v in meta.items() if k not in ("optimizer", "xxh3_128", "seal")})
        )
        other_way = make_policy(f"{root}/a", dtype, not distributed)
        seen[f"old {dtype, distributed}"] = refused(
            lambda f=folder, p=other_way: keeper(f, p).restore(p)
        )
    tuned = make_policy(f"{root}/a", lr=1e-3, weight_decay=0.1, beta1=0.5, beta2=0.6, eps=1e-3)
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("peergrad.parallel.checkpoint").addHandler(handler)
    keeper(root / "float32-True", tuned).restore(tuned)
    logging.getLogger("peergrad.parallel.checkpoint").removeHandler(handler)
    seen["told"] = told
    names = ("betas", "eps", "weight_decay")
    seen["optim"] = [tuple(group[n] for n in names) for group in tuned.optimizer.param_groups]
    return seen


def try_links(root: Path, policy: Any) -> dict[str, Any]:
    """The folder of checkpoints and one step of it are links, to two places of somebody else."""
    (root / "big").mkdir(parents=True)
    (root / "archive").mkdir()
    folder = root / "checkpoints"
    with small_disk(root / "big", "20m"):
        folder.symlink_to(root / "big")
        checkpoints = keeper(folder, policy, keep=1)
        checkpoints.save(policy, None, {}, None, step=1)
        shutil.move(folder / "step_000001", root / "archive" / "step_000001")
        (folder / "step_000001").symlink_to(root / "archive" / "step_000001")
        seen: dict[str, Any] = {"through a link": checkpoints.restore(policy)}
        (folder / "step_notes").write_text("a file of the user's")
        for step in (2, 3):
            checkpoints.save(policy, None, {}, None, step=step)
        seen["kept"] = sorted(os.listdir(folder))
        checkpoints.save(policy, None, {}, None, step=1)  # again: replaces the link, not theirs
        seen["archive"] = sorted(os.listdir(root / "archive" / "step_000001"))
        seen["link"] = (folder / "step_000001").is_symlink()
    return seen


def try_full_disks(root: Path, policy: Any) -> dict[str, Any]:
    """Leave less and less space, so that each writer in turn is the one that fails."""
    seen: dict[str, Any] = {}
    with small_disk(root, "2500k") as disk:
        folder = disk / "checkpoints"
        checkpoints = keeper(folder, policy, keep=0)
        (disk / "ballast").write_bytes(bytes(2_300_000))
        seen["first"] = refused(lambda: checkpoints.save(policy, None, {}, None, step=1))
        (disk / "ballast").unlink()
        checkpoints.save(policy, None, {}, None, step=1)
        left = shutil.disk_usage(disk).free
        used = 2_560_000 - left
        for part in (0.99, 0.97, 0.5, 0.02, 0):
            (disk / "ballast").write_bytes(bytes(int(left - used * part)))
            state = b"x" * 4096
            seen[f"{part}"] = refused(lambda s=state: checkpoints.save(policy, s, {}, None, step=2))
            seen[f"{part} left"] = sorted(os.listdir(folder))
            (disk / "ballast").unlink()
        seen["resumed"] = checkpoints.restore(policy)
    (root / "file").write_text("")
    blocked = keeper(root / "file" / "checkpoints", policy)
    seen["file"] = refused(lambda: blocked.save(policy, None, {}, None, step=1))
    return seen


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("snapshot")
    make_hf_model(root / "a", layers=1)
    make_hf_model(root / "b", layers=2)
    (seen,) = run_ranks(1, try_everything, str(root))
    return root, seen


@pytest.mark.distributed
def test_checkpoint_folders(found: tuple[Path, dict[str, Any]]) -> None:
    root, seen = found
    assert seen["fresh"] == 0
    assert seen["due"] == [2, 4, 5]
    assert seen["left running"] == []
    assert seen["kept"] == ["latest", "step_000004", "step_000005"]
    assert seen["whole"] is None
    assert seen["again"] == b"again"
    assert seen["partial ignored"] == 5
    step, names = seen["renames"]
    assert step == 5 and "step_000005" in names and ".step_000005.old" not in names
    assert "another model (layers 1 instead of 2)" in seen["foreign"]
    assert "no such folder" in seen["no folder"]
    resumed, again, saved = seen["logged"]
    assert resumed.split(" in ")[0] == again.split(" in ")[0]
    assert saved.startswith(f"saved {root}/checkpoints/step_000005: step 5, ")
    assert resumed.startswith(f"resumed from {root}/checkpoints/step_000005: step 5, ")
    assert resumed.endswith(" s") and " bytes in " in resumed


@pytest.mark.distributed
def test_training_goes_on_while_a_checkpoint_is_written(
    found: tuple[Path, dict[str, Any]],
) -> None:
    """What is on the disk is the state when it was begun; it is no checkpoint before it is
    whole."""
    seen = found[1]["aside"]
    assert seen["written"] == [False, True]
    assert seen["before"] == ["latest", "step_000001"]
    assert seen["after"] == ["latest", "step_000001", "step_000002"]
    assert seen["saved"] == ("step_000002", True, True)
    assert seen["restored"] == (2, b"two")
    assert len(seen["equal"]) > 20 and all(seen["equal"]) and all(seen["changed"])


@pytest.mark.distributed
def test_damage_is_one_true_line(found: tuple[Path, dict[str, Any]]) -> None:
    """The file, why, and a remedy that is there: an older checkpoint only if one is whole."""
    root, seen = found[0] / "damage", dict(found[1]["damage"])
    for name in ("cut, fallback", "latest empty, fallback", "list, fallback", "large, fallback"):
        assert seen.pop(name) == ("accepted: 5" if name.startswith("latest") else "accepted: 4")
    older = "set checkpoint.fallback=true to go on from step_000004, or choose a new run.name"
    newer = older.replace("000004", "000005")
    start = f"ValueError: run.resume = True: checkpoint {root}/step_000005 is damaged"
    none = f"; no other whole checkpoint is in {root}: choose a new run.name"
    moved = f"; move step_000005 away and {older}"
    for name, problem, remedy in [
        ("cut", " bytes instead of ", older),
        ("flipped", " has another content than was written (XXH3)", older),
        ("large", "(model/__0_0.distcp has another content than was written (XXH3))", older),
        ("collector", "(collector.pt has another content than", older),
        ("algo", "(algo.json has another content than", older),
        ("rng", "(rng_00000.pt has another content than", older),
        ("list", "(meta.json holds a list instead of an object)", older),
        ("bytes", "(meta.json is not JSON (", older),
        ("no world", "(meta.json has no world, or not of the right kind)", older),
        ("format", "(format 0 instead of 1)", older),
        ("outside", "(meta.json names '../../x', which is not inside the folder)", older),
        ("no digest", "(meta.json has no digest of algo.json)", older),
        ("renamed", "(meta.json is of step 4)", older),
        ("updates", "(meta.json has another content than was written (XXH3))", older),
        ("unguarded", "(meta.json has another content than was written (XXH3))", older),
        ("0.distcp", ": model/__0_0.distcp (", moved),
        ("common.pt", ": model/common.pt (", moved),
        (".metadata", ": model/.metadata (", moved),
        ("rng unchecked", ": rng_00000.pt (", moved),
        ("algo unchecked", ": algo.json (no object)", moved),
        ("none left", ": rng_00000.pt (", none),
        ("none left, fallback", " is missing)", none),
    ]:
        line = seen.pop(name)
        assert line.startswith(start) and problem in line and line.endswith(remedy), (name, line)
        assert "\n" not in line
    assert seen.pop("large, weights") == (
        f"ValueError: model.weights = '{root}/step_000005': is no whole checkpoint "
        "(model/__0_0.distcp has another content than was written (XXH3)); name another step "
        "folder, or make it again with tools/hf_to_megatron.py"
    )
    everywhere = start.replace("/step_000005", "")
    assert seen.pop("latest empty") == (
        f"{everywhere} (latest holds '' instead of the name of a step folder); {newer}"
    )
    assert "(latest holds '../x' instead" in seen.pop("latest outside")
    assert "(latest cannot be read: UnicodeDecodeError" in seen.pop("latest bytes")
    gone = start.replace("000005", "000007")
    assert seen.pop("latest gone") == f"{gone} (no such folder); {newer}"
    assert seen.pop("no latest") == f"{everywhere} (no step folder is whole){none}"
    assert not seen


@pytest.mark.distributed
def test_settings_that_a_checkpoint_does_not_fit_are_named(
    found: tuple[Path, dict[str, Any]],
) -> None:
    root, seen = found[0], dict(found[1]["settings"])
    step = root / "float32-True" / "step_000001"
    assert seen.pop("told") == [f"{step} was to go on at the learning rate 1e-06; now it is 0.001"]
    assert seen.pop("optim") == [((0.5, 0.6), 1e-3, 0.1)] * 2  # as configured now
    for name, line in seen.items():
        if name.startswith("old"):
            assert "parallel.distributed_optimizer" in line
            continue
        (dtype, kept), (other, ours) = map(eval, name.split(" -> "))
        step = root / f"{dtype}-{kept}" / "step_000001"
        if kept != ours:
            assert line == (
                f"ValueError: parallel.distributed_optimizer = {ours}: checkpoint {step} was "
                f"written with {kept}; resume with parallel.distributed_optimizer={kept}"
            )
        elif dtype != other and not kept:
            assert line.startswith(f"ValueError: model.dtype = {other!r}: checkpoint {step} was ")
            assert line.endswith(f"; resume with model.dtype={dtype}")
        else:
            assert line == "accepted: 1"


@pytest.mark.distributed
def test_links_are_followed_to_read_and_never_to_remove(
    found: tuple[Path, dict[str, Any]],
) -> None:
    seen = found[1]["links"]
    assert seen["through a link"] == 1
    assert seen["kept"] == ["latest", "step_000001", "step_000003", "step_notes"]
    assert "meta.json" in seen["archive"] and "model" in seen["archive"]
    assert seen["link"] is False


@pytest.mark.distributed
def test_a_full_disk_is_one_line_and_older_checkpoints_stay(
    found: tuple[Path, dict[str, Any]],
) -> None:
    root, seen = found[0] / "disk", found[1]["disks"]
    start = f"StorageError: checkpoint = '{root}/checkpoints/step_%06d': cannot be written, "
    line = seen["first"]
    assert line.startswith(start % 1 + "the disk has too little space ("), line
    assert line.endswith("free some space, then start anew (there is no older checkpoint)")
    for part in (0.99, 0.97, 0.5, 0.02, 0):
        line = seen[str(part)]
        assert line.startswith(start % 2 + "the disk has too little space ("), line
        assert line.endswith("then resume with run.resume=true: step_000001 is whole")
        assert "\n" not in line
        assert seen[f"{part} left"] == ["latest", "step_000001"]
    assert seen["resumed"] == 1
    assert "a file is where a folder should be (" in seen["file"]
