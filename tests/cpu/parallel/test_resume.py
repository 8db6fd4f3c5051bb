"""Which checkpoints a run may go on from: steps and learning rates worked out by hand."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from peergrad.config import AlgoConfig, Config, OptimConfig, RunConfig, Schedule
from peergrad.parallel.hf.rope import Rope
from peergrad.parallel.optimizer import schedule_updates
from peergrad.parallel.resume import moved_rate, require_same_course, require_same_model
from tests.cpu.parallel.test_mapping import SHAPE

PATH = Path("runs/x/checkpoints/step_000020")


def config(steps: int, epochs: int = 1, **optim: Any) -> Config:
    return Config(
        run=RunConfig(steps=steps), algo=AlgoConfig(epochs=epochs), optim=OptimConfig(**optim)
    )


def meta(step: int, total: int, per_step: int = 1) -> dict[str, Any]:
    return {"step": step, "updates": step * per_step, "schedule_updates": total}


def test_a_checkpoint_is_of_one_model() -> None:
    """Also one from before there was more than one way to scale a rope."""
    llama3 = Rope(5e5, "llama3", factor=8.0, original=8192, slow=1.0, fast=4.0)
    scaled = replace(SHAPE, rope=llama3)
    ours = json.loads(json.dumps({"shape": asdict(scaled)}))
    older = {"shape": {"heads": SHAPE.heads, "rope_theta": 5e5, "rope_factor": 8.0}}
    for made in (ours, older):
        require_same_model("run.resume", PATH, made, scaled)
        with pytest.raises(ValueError, match=r"is of another model \(rope"):
            require_same_model("run.resume", PATH, made, SHAPE)
        with pytest.raises(ValueError, match=r"is of another model \(rope"):
            wider = replace(llama3, factor=32.0)
            require_same_model("run.resume", PATH, made, replace(SHAPE, rope=wider))
    plain = {"shape": {"heads": SHAPE.heads, "rope_theta": 1e4, "rope_factor": None}}
    require_same_model("run.resume", PATH, plain, SHAPE)
    for rope in (replace(SHAPE.rope, kind="linear", factor=2.0), replace(llama3, fast=8.0)):
        with pytest.raises(ValueError, match=r"is of another model \(rope"):
            made = plain if rope.kind == "linear" else older
            require_same_model("run.resume", PATH, made, replace(SHAPE, rope=rope))


def test_the_schedule_is_counted_in_optimizer_steps() -> None:
    assert schedule_updates(config(20, epochs=2)) == 40
    assert schedule_updates(config(20, 2, schedule=Schedule.cosine, decay_steps=15)) == 30


def test_a_run_cannot_end_before_its_checkpoint() -> None:
    with pytest.raises(ValueError) as error:
        require_same_course(PATH, meta(20, 20), config(10))
    assert str(error.value) == (
        f"run.steps = 10: checkpoint {PATH} was taken after step 20; use 20 or more, or choose a "
        "new run.name"
    )
    require_same_course(PATH, meta(20, 20), config(20))


def test_a_longer_run_does_not_move_the_learning_rate() -> None:
    """Cosine to 0 over 20 steps, then over 40: the 21st update would be at
    (1 + cos(20 pi / 39)) / 2 = 0.4799 of the peak."""
    with pytest.raises(ValueError) as error:
        require_same_course(PATH, meta(20, 20), config(40, lr=1.0, schedule=Schedule.cosine))
    assert str(error.value) == (
        "optim.decay_steps = None: the learning rate would jump from 0 to 0.48 at the resume, as "
        f"optim.schedule=cosine of checkpoint {PATH} was to end at optimizer step 20 and now at "
        "40; set it to 20 to keep the course, or to 40 to jump"
    )
    for decay_steps in (20, 40):
        require_same_course(
            PATH,
            meta(20, 20),
            config(40, lr=1.0, schedule=Schedule.cosine, decay_steps=decay_steps),
        )
    require_same_course(PATH, meta(20, 20), config(40, lr=1.0))  # constant


def test_what_is_left_alone() -> None:
    """The same course under another peak is the user's word; a warm-up does not know the end; an
    older checkpoint does not know it either."""
    linear = {"lr": 1.0, "schedule": Schedule.linear}
    require_same_course(PATH, meta(5, 20), config(20, **linear))
    require_same_course(PATH, meta(5, 20), config(20, **{**linear, "lr": 0.1}))
    require_same_course(PATH, meta(5, 20), config(40, **linear, warmup_steps=10))
    with pytest.raises(ValueError, match=r"from 0\.737 to 0\.872 at the resume"):
        require_same_course(PATH, meta(5, 20), config(40, **linear))
    constant = {**meta(5, 20), "schedule": "constant"}  # of which the line would not be true
    require_same_course(PATH, constant, config(40, **linear))
    old = {"step": 5, "updates": 5}
    require_same_course(PATH, old, config(40, **linear))


def test_a_rate_that_goes_on_elsewhere_is_told() -> None:
    """A warm-up of 40 instead of none, after 9 updates: 10/40 of the peak."""
    checkpoint = {**meta(9, 100), "next_lr": 1.0}
    assert moved_rate(checkpoint, config(100, lr=1.0)) is None
    assert moved_rate(checkpoint, config(100, lr=1.0, warmup_steps=40)) == (1.0, 0.25)
    assert moved_rate(checkpoint, config(100, lr=0.1)) == (1.0, 0.1)
    assert moved_rate(meta(9, 100), config(100, lr=0.1)) is None  # of an older peergrad
    ended = {**meta(9, 9), "next_lr": 0.0}
    assert moved_rate(ended, config(9, lr=1.0, schedule=Schedule.linear)) is None


def test_more_optimizer_steps_a_step_are_another_course() -> None:
    """Linear over 20 updates, 5 done: 1 - 5/19. Two epochs a step make them 40: 1 - 5/39."""
    with pytest.raises(ValueError) as error:
        require_same_course(
            PATH, meta(5, 20), config(20, epochs=2, lr=1.0, schedule=Schedule.linear)
        )
    assert "set it to 10 to keep the course, or to 20 to jump" in str(error.value)
