"""The same recorded rollouts train the same model whatever the layout, and again after a resume."""

import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from peergrad.data import Group, Prompt, Rollout
from peergrad.observing.metrics import read_metrics
from peergrad.recording import write_groups
from peergrad.rollout.rollouts import recorded
from tests.e2e.run import MAIN, Run, assert_same_weights, run_in_turn

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LAYOUTS = {  # name -> processes and overrides
    "one": (1, []),
    "one_again": (1, []),
    "tensor2": (2, ["parallel.tensor=2"]),
    "tensor2_again": (2, ["parallel.tensor=2"]),
    "sequence2": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "data2": (2, ["parallel.data=2"]),
    "data2_again": (2, ["parallel.data=2"]),
    "data2_plain": (2, ["parallel.data=2", "parallel.distributed_optimizer=false"]),
    "context2": (2, ["parallel.context=2"]),
    "tensor2_pipeline2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
}
TWICE = (
    "one",
    "data2",
    "data2_plain",
    "tensor2_pipeline2",
)  # with two optimizer steps a batch, too
RESUMED = (  # checkpoint of step 2 of -> step 3 of
    ("tensor2", "tensor2"),
    ("data2", "data2"),
    ("data2_plain", "data2_plain"),
    ("tensor2", "data2"),
    ("data2", "context2"),
    ("tensor2_pipeline2", "data2"),
    ("data2", "tensor2"),
)
NUMBERS = (
    *("loss/total", "loss/policy", "policy/kl", "policy/entropy", "policy/ratio"),
    *("optim/grad_norm", "logprob_gap/mean", "logprob_gap/max"),
)


def groups(step: int) -> Iterator[Group]:
    """Eight prompts with four answers of 1 to 12 tokens each; the logprobs are rough guesses."""
    rng = np.random.default_rng(step)
    for index in range(8):
        prompt = rng.integers(3, 100, rng.integers(2, 10)).astype(np.int32)
        rollouts = []
        for size in rng.integers(1, 13, 4):
            tokens = rng.integers(3, 100, size).astype(np.int32)
            logprobs = -4 - rng.random(size, np.float32)
            spans = ((step, 0, int(size)),)
            reward = float(rng.random())
            rollouts.append(Rollout(tokens, logprobs, spans, "stop", "", reward))
        yield Group(f"{step}/{index}", Prompt(str(index), prompt, "", ""), tuple(rollouts))


@pytest.fixture(scope="module")
def new_replay(new_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Builds a run of three steps on one recording; optimizer, schedule and KL are on."""
    recording = tmp_path_factory.mktemp("recording")
    for step in range(3):
        write_groups(recorded(recording, step), groups(step))

    def build(name: str, *overrides: str) -> Run:
        return new_run(
            name,
            f"rollout.replay={recording}",
            "rollout.batch_size=32",
            "run.steps=3",
            "algo.kl.coef=0.1",
            "parallel.micro_batch_tokens=64",
            "optim.warmup_steps=2",
            "checkpoint.every=2",
            "checkpoint.keep=0",
            "logger.console=false",
            *overrides,
        )

    return build


@pytest.fixture(scope="module")
def runs(new_replay: Callable[..., Run]) -> dict[str, Run]:
    """``<layout>``, ``<layout>_twice`` and ``<from>_to_<to>``: all of them, done."""
    found = {}
    commands: dict[int, list[list[object]]] = {1: [], 2: [], 4: []}

    def add(name: str, layout: str, *more: str) -> None:
        ranks, overrides = LAYOUTS[layout]
        found[name] = new_replay(name, *overrides, *more)
        commands[ranks].append([MAIN, *found[name].arguments])

    for name in LAYOUTS:
        add(name, name)
    for name in TWICE:
        add(f"{name}_twice", name, "algo.minibatches=2")
    for ranks in commands:
        run_in_turn(ranks, *commands[ranks])
        commands[ranks] = []
    for old, new in RESUMED:
        add(f"{old}_to_{new}", new, "run.resume=true")
        copy_until_step_2(found[old], found[f"{old}_to_{new}"])
    run_in_turn(2, *commands[2])
    return found


def copy_until_step_2(old: Run, new: Run) -> None:
    """What was there when the checkpoint of step 2 was."""
    shutil.copytree(old.checkpoints / "step_000002", new.checkpoints / "step_000002")
    (new.checkpoints / "latest").write_text("step_000002")
    rows = [row for row in read_metrics(old.metrics) if row["step"] <= 2]
    assert rows[-1]["kind"] == "checkpoint"
    new.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def numbers(run: Run) -> dict[str, list[float]]:
    """The course of each number over the steps."""
    rows = run.rows("train")
    assert [row["step"] for row in rows] == [1, 2, 3]
    return {key: [row[key] for row in rows] for key in NUMBERS}


def assert_close(one: Run, two: Run) -> None:
    a, b = numbers(one), numbers(two)
    for key in NUMBERS:
        np.testing.assert_allclose(a[key], b[key], rtol=1e-4, atol=1e-7, err_msg=key)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "again" not in name][1:])
def test_layouts_agree(runs: dict[str, Run], layout: str) -> None:
    """Loss, KL, entropy, gradient norm and gap of three steps."""
    assert_close(runs[layout], runs["one"])
    assert numbers(runs["one"])["policy/kl"][2] > 1e-3  # it does learn


@pytest.mark.parametrize("layout", ["data2", "data2_plain", "tensor2_pipeline2"])
def test_layouts_agree_with_two_optimizer_steps_per_batch(
    runs: dict[str, Run], layout: str
) -> None:
    assert_close(runs[f"{layout}_twice"], runs["one_twice"])
    assert numbers(runs["one_twice"])["policy/ratio"] != [1, 1, 1]


@pytest.mark.parametrize("layout", ["one", "tensor2", "data2"])
def test_the_same_layout_again_is_bit_identical(runs: dict[str, Run], layout: str) -> None:
    one, two = runs[layout], runs[f"{layout}_again"]
    assert numbers(one) == numbers(two)
    assert_same_weights(one.hf, two.hf)


@pytest.mark.parametrize(("old", "new"), RESUMED)
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(
    runs: dict[str, Run], old: str, new: str
) -> None:
    """Step 3 after a resume: bit-identical in the same layout, equal in every other."""
    resumed = runs[f"{old}_to_{new}"]
    assert_close(resumed, runs[old])
    if old == new:
        assert numbers(resumed) == numbers(runs[old])
        assert_same_weights(resumed.hf, runs[old].hf)
