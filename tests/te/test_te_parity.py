"""Transformer Engine's layers against PyTorch's, through the policy, on every layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.gradients import distance, exported_gradient
from tests.models import VARIED, make_hf_model
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

Layout = dict[str, Any]  # fields of parallel


def samples() -> list[Any]:
    from peergrad.algo.samples import Sample

    rng, found = np.random.default_rng(1), []
    for size in (4, 9, 30, 12, 5, 21, 6, 15):
        answer = size - 3
        tokens, full = rng.integers(3, 100, size).astype(np.int32), np.ones(answer, np.float32)
        advantage = rng.normal(size=answer).astype(np.float32)
        version = np.zeros(answer, np.int32)
        found.append(Sample(tokens, 3, -full, advantage, full / 50, version))
    return found


def make(
    path: str,
    spec: str,
    layout: Layout,
    dtype: str = "float32",
    weights: str | None = None,
    **sections: Any,
) -> Any:
    """A policy that learns the model ``path``."""
    from peergrad.config import Config, Dtype, ModelConfig, OptimConfig, ParallelConfig, Spec
    from peergrad.parallel.mesh import init_mesh
    from peergrad.parallel.policy import Policy

    config = Config(
        model=ModelConfig(path=path, dtype=Dtype[dtype], weights=weights),
        parallel=ParallelConfig(spec=Spec[spec], **{"micro_batch_tokens": 48, **layout}),
        # A large eps: rounding of a gradient near 0 moves little.
        optim=OptimConfig(lr=1e-2, eps=1e-2, clip_grad=1.0),
        **sections,
    )
    return Policy(config, init_mesh(config.parallel, seed=0))


def objective() -> Any:
    from peergrad.algo.objective import Objective
    from peergrad.config import AlgoConfig, KlConfig

    return Objective(AlgoConfig(kl=KlConfig(coef=0.0)))


def learn(path: str, spec: str, layout: Layout) -> dict[str, Any]:
    """Weights as loaded, logprobs, the first gradient, and weights after two updates."""
    from peergrad.parallel.mesh import leave_layout

    policy = make(path, spec, layout)
    found: dict[str, Any] = {"loaded": {name: x.clone() for name, x in policy.weights()}}
    found["logp"] = np.concatenate(policy.score(samples()).logp)
    found["norms"] = [policy.update(samples(), objective()).metrics["optim/grad_norm"]]
    found["gradient"] = exported_gradient(policy)
    found["norms"] += [policy.update(samples(), objective()).metrics["optim/grad_norm"]]
    found["learnt"] = {name: x.clone() for name, x in policy.weights()}
    leave_layout()
    return found


def both(
    paths: list[str], layouts: list[Layout]
) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    found = []
    for layout in layouts:
        for path in paths:
            found.append((path, *(learn(path, spec, layout) for spec in ("torch", "te"))))
    return found


def check(path: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    original = load_file(Path(path) / "model.safetensors")
    assert theirs["loaded"].keys() == original.keys()
    assert all(torch.equal(theirs["loaded"][name], x) for name, x in original.items())
    np.testing.assert_allclose(theirs["logp"], ours["logp"], rtol=0, atol=5e-6)
    assert theirs["norms"] == pytest.approx(ours["norms"], rel=5e-6)
    assert distance(theirs["gradient"], ours["gradient"]) < 5e-6
    for name, x in ours["learnt"].items():
        torch.testing.assert_close(theirs["learnt"][name], x, rtol=0, atol=5e-6)


def test_one_rank(tmp_path: Path) -> None:
    path = str(make_hf_model(tmp_path / "a", layers=2, vocab=100, **VARIED["qwen3"]))
    ((found,),) = run_ranks(1, both, [path], [{}])
    check(*found)
