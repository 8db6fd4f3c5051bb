"""One optimizer step of the real Megatron policy: its gradient, its refusals, its checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import make_hf_model
from tests.spawn import run_ranks

KL_COEF, TEMPERATURE = 0.1, 0.8
Layout = tuple[int, int, int, str, bool]  # tensor, pipeline, token budget, dtype, sequence


def samples(bad: bool = False) -> list[Any]:
    from peergrad.algo.packing import Sample

    rng = np.random.default_rng(1)
    return [
        Sample(
            tokens=rng.integers(3, 100, n).astype(np.int32),
            prompt_length=3,
            logprobs=np.full(n - 3, -1.0, np.float32),
            advantage=float("nan") if bad else float(rng.normal()),
            weight=1 / 50,
        )
        for n in (4, 9, 30, 12, 5, 21, 6, 15)
    ]


def oracle(path: str, reference: str) -> tuple[float, float]:
    """Loss and global gradient norm of the same step with transformers and autograd in float64."""
    from transformers import AutoModelForCausalLM

    policy, frozen = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64) for p in (path, reference)
    )
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples():
        ids = torch.from_numpy(sample.tokens).long()[None]
        at, target = slice(sample.prompt_length - 1, -1), ids[0, sample.prompt_length :, None]
        logp, ref = (
            (m(ids).logits[0, at] / TEMPERATURE).log_softmax(-1).gather(1, target)[:, 0]
            for m in (policy, frozen)
        )
        log_q = ref.detach() - logp
        surrogate = -(logp - logp.detach()).exp() * sample.advantage
        total = total + (sample.weight * (surrogate + KL_COEF * (log_q.exp() - 1 - log_q))).sum()
    total.backward()
    squares = sum((p.grad**2).sum() for p in policy.parameters())  # a tied one once
    return float(total), float(squares**0.5)


def make(path: str, layout: Layout, **sections: Any) -> tuple[Any, Any]:
    from peergrad.config import (
        Config,
        Dtype,
        ModelConfig,
        OptimConfig,
        ParallelConfig,
        RolloutConfig,
    )
    from peergrad.parallel.groups import init_groups
    from peergrad.parallel.policy import Policy

    tensor, pipeline, budget, dtype, sequence = layout
    config = Config(
        model=ModelConfig(path=path, dtype=Dtype[dtype]),
        parallel=ParallelConfig(
            tensor=tensor,
            pipeline=pipeline,
            sequence=sequence,
            micro_batch_tokens=budget,
            logprob_chunk=7,
            distributed_optimizer=sections.get("distributed", True),
        ),
        rollout=RolloutConfig(temperature=TEMPERATURE),
        optim=OptimConfig(lr=1e-2, clip_grad=1.0),
    )
    groups = init_groups(config.parallel, seed=0)
    return Policy(config, groups), groups


def step(path: str, reference: str, layouts: list[Layout]) -> list[tuple[float, float, bool]]:
    """(loss, gradient norm, step with NaN applied or weights changed) on each layout."""
    from peergrad.algo.objective import Grpo
    from peergrad.algo.packing import with_logprobs
    from peergrad.parallel.groups import leave_layout
    from peergrad.parallel.policy import Scorer

    objective, found = Grpo(clip_low=0.2, clip_high=0.2, kl_coef=KL_COEF), []
    for layout in layouts:
        policy, groups = make(path, layout)
        frozen = Scorer(policy.config, groups, path=reference)

        def batches(bad: bool, policy: Any = policy, frozen: Any = frozen) -> list[Any]:
            packed = policy.pack(samples(bad))
            return with_logprobs(packed, "logp_ref", frozen.logprobs(packed))

        parameters = list(policy.model.parameters())
        before = [parameter.clone() for parameter in parameters]
        refused = policy.update(batches(bad=True), objective)
        untouched = all(map(torch.equal, before, parameters))
        update = policy.update(batches(bad=False), objective)
        moved = not all(map(torch.equal, before, parameters))
        assert update.applied
        assert moved
        found.append(
            (
                update.metrics["loss/total"],
                update.metrics["optim/grad_norm"],
                refused.applied or not untouched,
            )
        )
        leave_layout()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gradient_equals_transformers_autograd(tmp_path: Path, ranks: int) -> None:
    """The gradient norm pins every gradient's size: a wrong denominator, a lost all-reduce or a
    micro-batch counted twice moves it. A NaN advantage must leave all weights as they are."""
    layouts: dict[int, list[Layout]] = {
        1: [(1, 1, 10_000, "float32", False), (1, 1, 16, "float32", False)],
        2: [(t, p, 32, "float32", s) for t, p, s in [(2, 1, 0), (2, 1, 1), (1, 2, 0), (1, 1, 0)]],
        4: [(2, p, 40, d, p == 2) for p, d in [(2, "float32"), (1, "float32"), (2, "bfloat16")]],
    }
    # Tied: two pipeline stages hold a copy of the embedding each and must add up its gradient.
    path = str(make_hf_model(tmp_path / "policy", seed=0, tied=True))
    reference = str(make_hf_model(tmp_path / "reference", seed=1, tied=True))
    loss, norm = oracle(path, reference)
    for rank in run_ranks(ranks, step, path, reference, layouts[ranks]):
        for (_, _, _, dtype, _), (our_loss, our_norm, refused_wrongly) in zip(
            layouts[ranks], rank, strict=True
        ):
            tolerance = 1e-5 if dtype == "float32" else 0.05
            assert our_loss == pytest.approx(loss, rel=tolerance)
            assert our_norm == pytest.approx(norm, rel=tolerance)
            assert not refused_wrongly


def checkpoint_rounds(
    path: str, folder: str, layouts: list[tuple[Layout, bool]]
) -> list[list[float]]:
    """Train two steps and save on the first layout, then restore and train a third on each."""
    from peergrad.algo.objective import Grpo
    from peergrad.config import CheckpointConfig
    from peergrad.parallel.checkpoint import Checkpoints
    from peergrad.parallel.groups import leave_layout

    objective = Grpo(clip_low=0.2, clip_high=0.2, kl_coef=0.0)
    losses = []
    for i, (layout, distributed) in enumerate([layouts[0], *layouts]):
        policy, groups = make(path, layout, distributed=distributed)
        checkpoints = Checkpoints(Path(folder), CheckpointConfig(keep=2), groups)
        if i == 0:
            for number in (1, 2):
                policy.update(policy.pack(samples()), objective)
                checkpoints.save(policy, b"prompts", step=number)
        else:
            assert checkpoints.restore(policy) == 2
            assert checkpoints.collector_state(2) == b"prompts"
        update = policy.update(policy.pack(samples()), objective)
        # The fourth step's gradient shows the third step's Adam state, bias correction included.
        after = policy.update(policy.pack(samples()), objective)
        keys = ("loss/total", "optim/grad_norm", "policy/entropy")
        losses.append([u.metrics[key] for u in (update, after) for key in keys])
        leave_layout()
    return losses


@pytest.mark.distributed
@pytest.mark.parametrize("distributed", [True, False])
def test_resumed_training_continues_the_same_numbers(tmp_path: Path, distributed: bool) -> None:
    path = str(make_hf_model(tmp_path / "model"))
    grids = [(2, 1), (1, 2), (1, 1)]  # saved at TP 2; resumed there, at PP 2 and at DP 2
    layouts = [((t, p, 40, "float32", False), distributed) for t, p in grids]
    for rank in run_ranks(2, checkpoint_rounds, path, str(tmp_path / "ckpt"), layouts):
        uninterrupted, same_layout, *others = rank
        assert same_layout == uninterrupted  # bit for bit
        for other in others:
            assert other == pytest.approx(uninterrupted, rel=1e-4)


def failing_share() -> str:
    from peergrad.config import ParallelConfig
    from peergrad.parallel.groups import init_groups

    groups = init_groups(ParallelConfig(), seed=0)
    assert groups.share(lambda: groups.rank) == 0

    def fail() -> None:
        raise KeyError("the cause")

    try:
        groups.share(fail)
    except Exception as error:
        return f"{type(error).__name__} {error}"
    return "nothing raised"


@pytest.mark.distributed
def test_an_error_on_rank_0_reaches_every_rank() -> None:
    first, second = run_ranks(2, failing_share)
    assert first == "KeyError 'the cause'"
    assert second.startswith("RuntimeError rank 0 failed: KeyError")
