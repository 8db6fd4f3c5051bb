"""Every family of models: what the trainer sends under its names is what SGLang computes with."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peergrad.config import Dtype, ServersConfig
from peergrad.data import Group, Prompt
from peergrad.rollout.engine import Routes, Sampling
from peergrad.rollout.servers import ManagedServers
from peergrad.rollout.sglang import SGLangEngine
from peergrad.rollout.sync import WeightSync
from tests.models import MIXTURES, VARIED, make_hf_model
from tests.servers import START_TIMEOUT
from tests.spawn import run_ranks

pytestmark = [pytest.mark.engine, pytest.mark.slow]
TOLERANCE = 1e-4


class ServersOfMany(ManagedServers):
    """One server of each of ``models``, forked from one process. The last one alone has weights,
    computes in bfloat16, and tells its experts."""

    def __init__(self, models: Sequence[Path], logs: Path) -> None:
        config = ServersConfig(count=len(models), start_timeout=START_TIMEOUT)
        path, dtype = str(models[0]), Dtype.float32
        super().__init__(config, model_path=path, dtype=dtype, log_dir=logs)
        self._models = models

    def options(self, index: int) -> list[str]:
        options = super().options(index)
        options[options.index("--model-path") + 1] = str(self._models[index])
        if index == len(self._models) - 1:
            options[options.index("--dtype") + 1] = "bfloat16"
            options.append("--enable-return-routed-experts")
        else:  # as servers that are to be sent FP8
            options += ["--load-format", "dummy"]
        return options


def test_engine_and_trainer_agree_after_a_sync(tmp_path: Path) -> None:
    """Servers start without weights, with small random ones: what was not sent would show."""
    pytest.importorskip("sglang")
    served, trained = (
        [
            make_hf_model(tmp_path / f"{family}_{seed}", family=family, seed=seed, layers=2, **more)
            for family, more in {**VARIED, **MIXTURES}.items()
        ]
        for seed in (0, 1)
    )
    for path in served:
        (path / "model.safetensors").unlink()
    many = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    rounded = make_hf_model(tmp_path / "rounded", family="qwen3_moe", norm_topk_prob=True, **many)
    with ServersOfMany([*served, rounded], tmp_path / "logs") as servers:
        paths = [str(path) for path in trained]
        (gaps,) = run_ranks(1, measure_gaps, paths, servers.urls[:-1])
        groups = asyncio.run(sample(servers.urls[-1], prompts=8, routes=ROUTES))
        (replayed,) = run_ranks(1, measure_replay, str(rounded), groups, servers.urls[-1])
        logs = [servers.log(index).read_text() for index in range(len(served) + 1)]
    assert max(gap for after in gaps for gap in after) < TOLERANCE, gaps
    # Of classes that SGLang had to look for beyond ours, prompts would not be shared.
    shares = ["equal prompts of a step are computed once" in log for log in logs]
    assert shares == [*[True] * len(served), False]  # it tells of every row
    assert replayed["with"] < replayed["without"] / 2, replayed
    assert replayed["with"] < 0.03, replayed
    assert replayed["canary with"] < min(0.2, replayed["canary without"]), replayed


ROUTES = Routes(layers=4, chosen=2, experts=16, required=True)


def measure_replay(path: str, groups: list[Group], url: str) -> dict[str, float]:
    """Mean gaps in nats of sampled tokens, with the experts that the engine chose and with those
    that the trainer does: what rounds in another way takes others."""
    from peergrad.algo.samples import make_samples
    from peergrad.config import Config, ModelConfig
    from peergrad.parallel.mesh import init_mesh
    from peergrad.parallel.policy import Policy

    config = Config(model=ModelConfig(path=path))  # in bfloat16
    policy = Policy(config, init_mesh(config.parallel, seed=0))
    samples, found = make_samples(groups), {}
    for name, policy.replays in (("with", True), ("without", False)):
        pairs = zip(policy.score(samples).logp, samples, strict=True)
        found[name] = float(np.concatenate([np.abs(x - s.logp_engine) for x, s in pairs]).mean())
    sync = WeightSync([url], vocab_size=policy.shape.vocab, routes=ROUTES)
    canary = sync.load(policy.weights(), 1).canary
    sync.close()
    assert canary is not None and canary.rollouts[0].experts is not None
    for name, policy.replays in (("canary with", True), ("canary without", False)):
        found[name] = policy.canary_gap(canary)
    return found


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


async def sample(url: str, *, prompts: int = 1, routes: Routes | None = None) -> list[Group]:
    """Answers to prompts that reach beyond every length before a rope's scaling."""
    engine, found = SGLangEngine([url]), []
    sampling = Sampling(n=4, max_new_tokens=24, routes=routes)
    try:
        for k in range(prompts):
            prompt = [3 + (7 + k) * i % 90 for i in range(50)]
            asked = Prompt("", np.array(prompt, np.int32), "", "")
            drawn = await engine.generate(prompt, sampling, request_id=str(k))
            found += [Group("", asked, (replace(rollout, reward=0.0),)) for rollout in drawn]
    finally:
        await engine.aclose()
    return found
