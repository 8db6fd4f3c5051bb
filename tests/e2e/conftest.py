from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.run import Run

# Quick on a CPU; the model knows nothing, so the reward asks for something it can stumble upon.
SMALL = (
    "model.dtype=float32",
    "reward=function",
    "reward.function=tests.e2e.rewards:even",
    "reward.workers=1",
    "reward.timeout=600",
    "rollout.group_size=4",
    "rollout.max_new_tokens=8",
    "rollout.max_canary_gap=1e-4",
    "optim.lr=1e-3",
    "evaluation.prompts=16",
    "evaluation.pass_reward=0.5",
)

WHOLE = (
    "parallel.tensor=2",
    "parallel.micro_batch_tokens=128",
    "algo.kl.coef=0.001",
    "rollout.batch_size=32",
    "run.steps=4",
    "evaluation.every=2",
    "checkpoint.every=2",
)


@pytest.fixture(scope="session")
def new_run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Run]]:
    """Builds a small run of ``model`` with the overrides given; no process of it outlives us."""
    root = tmp_path_factory.mktemp("runs")
    runs = []

    def build(name: str, *overrides: str) -> Run:
        runs.append(Run(root, name, f"model.path={model}", *SMALL, *overrides))
        return runs[-1]

    yield build
    for run in runs:
        run.kill()


@pytest.fixture(scope="session")
def whole(new_run: Callable[..., Run]) -> Run:
    """A run of four steps on two tensor ranks and a managed server, that nothing disturbed."""
    run = new_run("whole", *WHOLE)
    run.start(ranks=2)
    run.finish()
    return run
