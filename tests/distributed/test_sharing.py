"""Answers that share their prompt against answers with a copy each, and both against one process in
float64: the same logprobs, the same gradient, on every layout."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.gradients import distance, exported_gradient
from tests.models import make_hf_model
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

TEMPERATURE, TOLERANCE = 0.8, 1e-6
# Of each group: the prompt's tokens, and those of its answers.
GROUPS = [
    (1, (4, 9, 2, 1)),  # a prompt of one token
    (5, (1, 1, 1)),  # all that is scored is predicted from the prompt
    (3, (6, 1)),
    (7, (12,)),  # nobody to share with
    (70, (9, 8, 15, 1, 30)),  # large: each answer attends by itself
    (60, (8, 8, 15)),  # alike to those
    (20, (290, 3, 17)),  # longer than a block of attention
    (6, (5, 8)),  # of all tokens but one each, and of all
]
Layout = tuple[int, int, bool, int]  # tensor, pipeline, sequence, token budget
LAYOUTS: dict[int, list[Layout]] = {
    1: [(1, 1, False, 10_000), (1, 1, False, 120)],
    2: [(2, 1, False, 10_000), (2, 1, True, 200), (1, 2, False, 150), (1, 1, False, 10_000)],
}


def samples() -> list[Any]:
    """The peers of a group are not neighbours; one answer in four comes twice."""
    from peergrad.algo.samples import Sample

    rng, found = np.random.default_rng(3), []
    for group, (size, answers) in enumerate(GROUPS):
        prompt = rng.integers(3, 100, size).astype(np.int32)
        for answer in answers:
            weight = rng.uniform(0.5, 1.5, answer) * (rng.random(answer) > 0.2) / 50
            weight[-1] = 0.02
            if group == len(GROUPS) - 1:
                weight[:-1] = 0
            found.append(
                Sample(
                    tokens=np.append(prompt, rng.integers(3, 100, answer)).astype(np.int32),
                    prompt_length=size,
                    logp_engine=np.full(answer, -1.0, np.float32),
                    advantage=rng.normal(size=answer).astype(np.float32),
                    weight=weight.astype(np.float32),
                    version=np.zeros(answer, np.int32),
                    group=group,
                )
            )
    found += [replace(sample, advantage=1 - sample.advantage) for sample in found[::4]]
    return [found[i] for i in rng.permutation(len(found))]


def oracle(path: str) -> tuple[list[np.ndarray], dict[str, torch.Tensor]]:
    """Logprobs of every answer, and the gradient of -sum of weight * advantage * logp by HF name,
    one sequence after another in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    found, loss = [], torch.zeros((), dtype=torch.float64)
    for sample in samples():
        ids = torch.from_numpy(sample.tokens).long()[None]
        logits = model(ids).logits[0, sample.prompt_length - 1 : -1]
        targets = ids[0, sample.prompt_length :, None]
        logp = (logits / TEMPERATURE).log_softmax(-1).gather(1, targets)[:, 0]
        found.append(logp.detach().numpy())
        loss = loss - (torch.from_numpy(sample.weight * sample.advantage).double() * logp).sum()
    loss.backward()
    return found, {name: p.grad for name, p in model.named_parameters()}


def both(path: str, layouts: list[Layout]) -> list[dict[bool, Any]]:
    """On each layout, without sharing and with it: packed tokens of this rank, logprobs, loss, and
    on rank 0 the gradients by HF name."""
    from peergrad.algo.objective import Objective
    from peergrad.config import (
        AlgoConfig,
        Config,
        Dtype,
        KlConfig,
        ModelConfig,
        OptimConfig,
        ParallelConfig,
        RolloutConfig,
    )
    from peergrad.parallel.mesh import init_mesh, leave_layout
    from peergrad.parallel.policy import Policy

    results = []
    for tensor, pipeline, sequence, budget in layouts:
        parallel = ParallelConfig(
            tensor=tensor,
            pipeline=pipeline,
            sequence=sequence,
            micro_batch_tokens=budget,
            distributed_optimizer=False,
        )
        config = Config(
            model=ModelConfig(path=path, dtype=Dtype.float32),
            parallel=parallel,
            rollout=RolloutConfig(temperature=TEMPERATURE),
            optim=OptimConfig(lr=1e-30, clip_grad=0.0),
        )
        policy, found = Policy(config, init_mesh(parallel, seed=0)), {}
        assert policy.model.shares_prompts
        for share in (False, True):
            policy.model.shares_prompts = share
            packed = policy._pack(samples(), policy._divide(samples()).bins)
            logp = policy.score(samples()).logp
            update = policy.update(samples(), Objective(AlgoConfig(kl=KlConfig(coef=0.0))))
            for one, other in zip(logp, update.scores.logp, strict=True):
                np.testing.assert_array_equal(one, other)
            tokens = sum(batch.tokens.numel() for batch in packed)
            found[share] = (tokens, logp, update.metrics["loss/total"], exported_gradient(policy))
        results.append(found)
        leave_layout()
    return results


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "model"
    return str(make_hf_model(folder, tied=True, layers=2, spread=0.03))


@pytest.fixture(scope="module")
def expected(path: str) -> Any:
    return oracle(path)


@pytest.mark.parametrize("ranks", [1, 2])
def test_shared_prompts_change_nothing_but_the_work(path: str, expected: Any, ranks: int) -> None:
    per_rank = run_ranks(ranks, both, path, LAYOUTS[ranks])
    for layout, found in zip(LAYOUTS[ranks], per_rank[0], strict=True):
        (_, alone, loss, apart), (_, shared, same, together) = found[False], found[True]
        scored = [sample.scored for sample in samples()]
        for one, other, theirs, at in zip(alone, shared, expected[0], scored, strict=True):
            np.testing.assert_allclose(other, one, rtol=0, atol=2e-6)
            np.testing.assert_allclose(other[at], theirs[at], rtol=0, atol=1e-5)
        assert same == pytest.approx(loss, rel=1e-6)
        distances = [distance(g, expected[1]) for g in (apart, together)]
        print(layout, distances, distance(together, apart))
        assert max(distances) <= TOLERANCE
    for i, (tensor, pipeline, _, budget) in enumerate(LAYOUTS[ranks]):
        data = per_rank[:: tensor * pipeline]  # one rank of each replica
        before, after = (sum(rank[i][share][0] for rank in data) for share in (False, True))
        assert after < (0.6 if budget == 10_000 else 0.8) * before
