"""What a run exports is what a server makes of it; and what tells that a server is out of step."""

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from peergrad.config import Dtype
from peergrad.data import Group, Prompt, Rollout
from peergrad.rollout.engine import Sampling
from peergrad.rollout.sglang import SGLangEngine
from tests.e2e.run import Run
from tests.servers import managed
from tests.spawn import run_ranks

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPTS = [[3, 4, 13, 5, 6, 17], [40, 41, 42], [70]]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def url(whole: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of what the run exported."""
    with managed(whole.hf, tmp_path_factory.mktemp("export")) as servers:
        yield servers.urls[0]


def generate(url: str, **sampling: Any) -> list[Group]:
    """Answers to each of PROMPTS, rewarded for even tokens."""

    async def answer_all() -> list[list[Rollout]]:
        engine = SGLangEngine([url])
        drawn = Sampling(max_new_tokens=24, **sampling)
        try:
            return await asyncio.gather(
                *(engine.generate(p, drawn, request_id=str(i)) for i, p in enumerate(PROMPTS))
            )
        finally:
            await engine.aclose()

    groups = []
    for prompt, rollouts in zip(PROMPTS, asyncio.run(answer_all()), strict=True):
        graded = tuple(replace(r, reward=float(np.mean(r.tokens % 2 == 0))) for r in rollouts)
        groups.append(Group("", Prompt("", np.array(prompt, np.int32), "", ""), graded))
    return groups


def test_the_server_answers_as_transformers_does(whole: Run, url: str) -> None:
    """Greedy answers of the exported checkpoint, token by token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(whole.hf, dtype=torch.float32)
    for group in generate(url, n=1, temperature=0.0):
        prompt = torch.from_numpy(group.prompt.tokens).long()[None]
        found = model.generate(prompt, max_new_tokens=24, do_sample=False)
        assert found[0, prompt.numel() :].tolist() == group.rollouts[0].tokens.tolist()


def test_a_missing_or_wrong_sync_shows(whole: Run, url: str) -> None:
    """One optimizer step in the trainer. The logprobs of rollouts, and of the canary, agree if and
    only if the engine was given the new weights, each under its own name. Exchanged before they are
    sent, two tensors of one shape get past the checksums: only logprobs can tell."""
    (gaps,) = run_ranks(1, measure_gaps, str(whole.hf), url)
    assert gaps["before"] < TOLERANCE
    assert gaps["stale"] > 1e-2
    assert gaps["exchanged, canary"] > 1e-2
    assert gaps["exchanged"] > 1e-2
    assert gaps["synced, canary"] < TOLERANCE
    assert gaps["synced"] < TOLERANCE


def measure_gaps(path: str, url: str) -> dict[str, float]:
    """Largest gaps in nats between a trainer of one rank and the server, which is left as it was
    found."""
    from peergrad.algo.grading import AlgoState, grade
    from peergrad.algo.objective import Objective
    from peergrad.algo.samples import make_samples, weigh
    from peergrad.config import AlgoConfig, Config, KlConfig, ModelConfig, OptimConfig
    from peergrad.parallel.mesh import init_mesh
    from peergrad.parallel.policy import Policy
    from peergrad.rollout.sync import WeightSync

    model = ModelConfig(path=path, dtype=Dtype.float32)
    algo = AlgoConfig(kl=KlConfig(coef=0.0))
    config = Config(model=model, algo=algo, optim=OptimConfig(lr=1e-2))
    policy = Policy(config, init_mesh(config.parallel, seed=0))
    sync = WeightSync([url], vocab_size=policy.shape.vocab)
    gaps = {}

    def measure(name: str) -> list[Group]:
        groups = generate(url, n=4)
        single = (replace(g, rollouts=(rollout,)) for g in groups for rollout in g.rollouts)
        gaps[name] = max(map(policy.canary_gap, single))
        return groups

    def push(version: int, names: dict[str, str], weights: Iterable[tuple[str, Any]]) -> float:
        proof = sync.load(((names.get(name, name), w) for name, w in weights), version)
        assert proof.verified and not proof.unverified and proof.canary is not None
        return policy.canary_gap(proof.canary)

    groups = measure("before")
    original = [(name, weight.clone()) for name, weight in policy.weights()]
    graded = grade(groups, make_samples(groups), algo, AlgoState(0.0), max_tokens=24)[0]
    assert policy.update(weigh(graded, algo, max_tokens=24), Objective(algo)).refusal is None
    measure("stale")
    one, two = (f"model.layers.0.self_attn.{kind}_norm.weight" for kind in "qk")
    gaps["exchanged, canary"] = push(1, {one: two, two: one}, policy.weights())
    measure("exchanged")
    gaps["synced, canary"] = push(2, {}, policy.weights())
    measure("synced")
    push(0, {}, original)
    sync.close()
    return gaps
