"""Weight gradients that a kernel adds to ``main_grad``, with a stand-in for apex's on the CPU."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.distributed.test_overlap import BOTH, MODELS, PLAIN, TENSOR, build, objective, samples
from tests.models import make_hf_model
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

CASES: list[tuple[str, dict[str, Any], int]] = [  # model, fields of parallel, matrices of a rank
    ("tied", {**TENSOR, "sequence": True}, 2 * 4),
    ("experts", {**PLAIN, **BOTH, "expert": 2}, 2 * (2 + 4 * 2)),
]


@contextmanager
def stand_in() -> Iterator[list[int]]:
    """What Megatron would have found, had it been there when Megatron was imported; the calls."""
    from megatron.core.tensor_parallel import layers

    calls: list[int] = []

    def add(rows: Tensor, gradients: Tensor, total: Tensor) -> None:
        calls.append(len(rows))
        total.add_(gradients.t().matmul(rows))

    kernel: Any = ModuleType("fused_weight_gradient_mlp_cuda")
    kernel.wgrad_gemm_accum_fp32 = add
    with (
        mock.patch.dict(sys.modules, {kernel.__name__: kernel}),
        mock.patch.object(layers, kernel.__name__, kernel, create=True),
        mock.patch("peergrad.parallel.fused.has_gpu", lambda: True),
    ):
        yield calls


def two_steps(path: str, fields: dict[str, Any]) -> tuple[list[float], list[Tensor]]:
    """Norms of two updates, and what these leave."""
    from peergrad.parallel.mesh import leave_layout

    policy = build(path, fields)
    norms = [policy.update(samples(), objective()).metrics["optim/grad_norm"] for _ in range(2)]
    found = norms, [tensor.clone() for _, tensor in policy.weights()]
    leave_layout()
    return found


def both_ways(cases: list[tuple[str, dict[str, Any]]]) -> list[tuple[bool, bool, int, str]]:
    """Of each case: equal norms, equal weights, calls of the kernel, and what the log says."""
    found = []
    for path, fields in cases:
        plain = two_steps(path, fields)
        with stand_in() as calls, mock.patch("peergrad.parallel.policy.log.info") as told:
            fused = two_steps(path, fields)
        same = len(plain[1]) == len(fused[1]) and all(map(torch.equal, plain[1], fused[1]))
        found.append((plain[0] == fused[0], same, len(calls), told.call_args[0][0]))
    return found


def test_the_gradients_are_those_without(tmp_path_factory: pytest.TempPathFactory) -> None:
    def model(name: str) -> str:
        folder: Path = make_hf_model(tmp_path_factory.mktemp(name), seed=2, **MODELS[name])
        return str(folder)

    asked = [(model(name), fields) for name, fields, _ in CASES]
    for found in run_ranks(2, both_ways, asked):
        for (_, _, matrices), (norms, weights, calls, said) in zip(CASES, found, strict=True):
            assert norms and weights
            assert calls >= 2 * matrices  # in each micro-batch, but for experts without a token
            assert said == (
                "fused paths: optimizer by PyTorch, gradient norms by PyTorch, weight gradients "
                f"added up in float32 by apex in {matrices} matrices"
            )


def unfused(path: str) -> tuple[str, str, set[bool]]:
    """What is said without the kernel and without a GPU; and whether a reference would use it."""
    from peergrad.parallel.fused import fuse_weight_gradients
    from peergrad.parallel.policy import Scorer

    policy = build(path, PLAIN)
    absent = fuse_weight_gradients(policy.model)
    with stand_in():
        with mock.patch("peergrad.parallel.fused.has_gpu", lambda: False):
            idle = fuse_weight_gradients(policy.model)
        scorer = Scorer(policy.config, policy.mesh, path=path)
        marks = {
            module.gradient_accumulation_fusion
            for model in (policy.model, scorer.model)
            for module in model.modules()
            if hasattr(module, "gradient_accumulation_fusion")
        }
    return absent, idle, marks


def test_no_other_model_adds_to_what_it_has_not(tmp_path: Path) -> None:
    path = str(make_hf_model(tmp_path, layers=1))
    ((absent, idle, marks),) = run_ranks(1, unfused, path)
    assert absent == "apart (fused_weight_gradient_mlp_cuda is not installed)"
    assert idle == "apart (no GPU)" and marks == {False}
