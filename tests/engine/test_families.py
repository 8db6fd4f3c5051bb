"""Every family of models: what the trainer sends under its names is what SGLang computes with."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peergrad.config import Dtype, ServersConfig
from peergrad.data import Group, Prompt
from peergrad.rollout.engine import Sampling
from peergrad.rollout.servers import ManagedServers
from peergrad.rollout.sglang import SGLangEngine
from peergrad.rollout.sync import WeightSync
from tests.models import MIXTURES, VARIED, make_hf_model
from tests.servers import START_TIMEOUT
from tests.spawn import run_ranks

pytestmark = [pytest.mark.engine, pytest.mark.slow]
TOLERANCE = 1e-4


class ServersOfMany(ManagedServers):
    """One server of each of ``models``, forked from one process."""

    def __init__(self, models: Sequence[Path], logs: Path) -> None:
        config = ServersConfig(count=len(models), start_timeout=START_TIMEOUT)
        path, dtype = str(models[0]), Dtype.float32
        super().__init__(config, model_path=path, dtype=dtype, log_dir=logs)
        self._models = models

    def options(self, index: int) -> list[str]:
        options = super().options(index)
        options[options.index("--model-path") + 1] = str(self._models[index])
        return options


def test_engine_and_trainer_agree_after_a_sync(tmp_path: Path) -> None:
    """Servers start with other weights than the trainer has: what was not sent would show."""
    pytest.importorskip("sglang")
    served, trained = (
        [
            make_hf_model(tmp_path / f"{family}_{seed}", family=family, seed=seed, layers=2, **more)
            for family, more in {**VARIED, **MIXTURES}.items()
        ]
        for seed in (0, 1)
    )
    with ServersOfMany(served, tmp_path / "logs") as servers:
        paths = [str(path) for path in trained]
        (gaps,) = run_ranks(1, measure_gaps, paths, servers.urls)
        logs = [servers.log(index).read_text() for index in range(len(served))]
    assert max(gap for after in gaps for gap in after) < TOLERANCE, gaps
    # Of classes that SGLang had to look for beyond ours, prompts would not be shared.
    assert all("equal prompts of a step are computed once" in log for log in logs)


def measure_gaps(paths: list[str], urls: list[str]) -> list[tuple[float, float]]:
    """Largest gaps in nats, on the canary and on sampled tokens, between each trainer and its
    server."""
    from peergrad.config import Config, ModelConfig
    from peergrad.parallel.mesh import init_mesh, leave_layout
    from peergrad.parallel.policy import Scorer

    found = []
    for path, url in zip(paths, urls, strict=True):
        config = Config(model=ModelConfig(path=path, dtype=Dtype.float32))
        trainer = Scorer(config, init_mesh(config.parallel, seed=0), path=path)
        sync = WeightSync([url], vocab_size=trainer.shape.vocab)
        proof = sync.load(trainer.weights(), 1)
        sync.close()
        assert proof.verified and proof.canary is not None
        assert bool(proof.unverified) == (trainer.shape.experts is not None)
        sampled = [trainer.canary_gap(group) for group in asyncio.run(sample(url))]
        found.append((trainer.canary_gap(proof.canary), max(sampled)))
        leave_layout()
    return found


async def sample(url: str) -> list[Group]:
    """Answers to a prompt that reaches beyond every length before a rope's scaling."""
    prompt = [3 + 7 * i % 90 for i in range(50)]
    engine = SGLangEngine([url])
    try:
        drawn = await engine.generate(prompt, Sampling(n=4, max_new_tokens=24), request_id="0")
    finally:
        await engine.aclose()
    asked = Prompt("", np.array(prompt, np.int32), "", "")
    return [Group("", asked, (replace(rollout, reward=0.0),)) for rollout in drawn]
