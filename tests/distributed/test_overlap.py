"""Communication beside the computation gives the very bits that it gives after it, and is really
beside it: gradients during the backward pass, parameters where the forward pass needs them."""

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.models import MIXTURES, make_hf_model
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

LENGTHS = (4, 9, 24, 12, 21, 6, 15, 7)
BUCKET = 4000  # parameters: the head has a bucket of its own, and so has every matrix of a layer
MODELS: dict[str, dict[str, Any]] = {
    **{"tied": {"tied": True, "layers": 2}, "untied": {"layers": 2}, "deep": {"tied": True}},
    "experts": {"layers": 2, "family": "qwen3_moe", **MIXTURES["qwen3_moe"]},
}
Layout = tuple[str, dict[str, Any]]  # model, fields of parallel
PLAIN: dict[str, Any] = {"micro_batch_tokens": 40}
TENSOR = {"tensor": 2, "micro_batch_tokens": 40}
STAGES = {"pipeline": 2, "micro_batch_tokens": 40}
GRID: dict[int, list[Layout]] = {
    2: [
        *(("untied", PLAIN), ("tied", PLAIN), ("untied", {**PLAIN, "context": 2})),
        ("experts", {**PLAIN, "expert": 2}),
    ],
    4: [
        *(("untied", TENSOR), ("tied", {**TENSOR, "sequence": True}), ("tied", STAGES)),
        ("deep", {**STAGES, "virtual_pipeline": 2}),
    ],
}
GRADIENTS = {"overlap_grad_reduce": True, "ddp_bucket_size": BUCKET}
BOTH = {**GRADIENTS, "overlap_param_gather": True}
CHOICES: dict[int, list[dict[str, Any]]] = {
    2: [{}, BOTH, {**GRADIENTS, "distributed_optimizer": False}],
    4: [{}, BOTH],
}


def samples(*, some: int = len(LENGTHS), advantage: float = 1.0) -> list[Any]:
    """Of which the first ``some`` have a weight: with one, all but one data-parallel rank have
    nothing to learn from."""
    from peergrad.algo.samples import Sample

    rng = np.random.default_rng(1)
    made = []
    for i, size in enumerate(LENGTHS):
        zero = np.zeros(size - 3, np.float32)
        made.append(
            Sample(
                tokens=rng.integers(3, 100, size).astype(np.int32),
                prompt_length=3,
                logp_engine=zero - 1,
                advantage=advantage * rng.normal(size=size - 3).astype(np.float32),
                weight=zero + (i < some) / 50,
                version=zero.astype(np.int32),
            )
        )
    return made


def build(path: str, fields: dict[str, Any]) -> Any:
    from peergrad.config import (
        Config,
        Dtype,
        KernelsConfig,
        Logprob,
        ModelConfig,
        OptimConfig,
        ParallelConfig,
        RolloutConfig,
    )
    from peergrad.parallel.mesh import init_mesh
    from peergrad.parallel.policy import Policy

    # No clipping: the order in which a norm is added up depends on the buckets.
    config = Config(
        model=ModelConfig(path=path, dtype=Dtype.float32),
        parallel=ParallelConfig(**fields),
        kernels=KernelsConfig(chunk=7, logprob=Logprob.fused_linear),
        rollout=RolloutConfig(temperature=0.8),
        optim=OptimConfig(lr=1e-2, clip_grad=0),
    )
    return Policy(config, init_mesh(config.parallel, seed=0))


def objective(kind: str = "clip") -> Any:
    from peergrad.algo.objective import Objective
    from peergrad.config import AlgoConfig, KlConfig, SurrogateConfig, SurrogateKind

    surrogate = SurrogateConfig(kind=SurrogateKind[kind])
    return Objective(AlgoConfig(kl=KlConfig(coef=0.0), surrogate=surrogate))


def gradients(policy: Any) -> list[torch.Tensor]:
    """Of each parameter, whole: with the distributed optimizer a rank has a part of each bucket."""
    for piece in policy.ddp if policy.config.parallel.distributed_optimizer else []:
        for group in piece.bucket_groups + piece.expert_parallel_bucket_groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                part = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, part, group=ranks)
    return [parameter.main_grad.clone() for parameter in policy.model.parameters()]


def rounds(policy: Any) -> list[torch.Tensor]:
    """Gradients and weights of updates of all kinds: of several micro-batches, with the head's
    gradient taken in either pass, of a rank without tokens, refused, behind a pass that scores."""
    found: list[Any] = []
    for batch, kind in [
        (samples(), "clip"),
        (samples(advantage=np.nan), "clip"),
        (samples(), "gspo"),
        (samples(some=1), "clip"),
    ]:
        update = policy.update(batch, objective(kind))
        assert update.finite == np.isfinite(batch[0].advantage).all() and not update.refusal
        if update.finite:
            found += gradients(policy)
        if kind == "gspo":
            found += [torch.from_numpy(x) for x in policy.score(samples()).logp]
    return [*found, *(tensor.clone() for _, tensor in policy.weights())]


def bits(tensors: list[torch.Tensor]) -> list[bytes]:
    return [tensor.contiguous().numpy().tobytes() for tensor in tensors]


def agree(paths: dict[str, str], ranks: int) -> list[tuple[str, list[bool]]]:
    """Whether each choice has the bits of the first, on each layout."""
    from peergrad.parallel.mesh import leave_layout

    found = []
    for model, fields in GRID[ranks]:
        seen = []
        for more in CHOICES[ranks]:
            seen.append(bits(rounds(build(paths[model], {**fields, **more}))))
            leave_layout()
        found.append((f"{model} {fields}", [seen[0] == one for one in seen]))
    return found


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {name: str(make_hf_model(folder / name, **given)) for name, given in MODELS.items()}


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_bits_are_those_without(paths: dict[str, str], ranks: int) -> None:
    for rank in run_ranks(ranks, agree, paths, ranks):
        assert len(rank) == len(GRID[ranks])
        for layout, same in rank:
            assert all(same) and len(same) == len(CHOICES[ranks]), (layout, same)


@contextmanager
def watched(policy: Any) -> Iterator[list[str]]:
    """What goes on meanwhile, in order: the forward pass of a layer, a parameter whose gradient is
    there, a bucket sent or gathered, the head with all parameters or too early, the end of the last
    backward pass."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Group

    events: list[str] = []

    def told(event: str, function: Any) -> Any:
        def telling(*args: Any, **kwargs: Any) -> Any:
            events.append(event)
            return function(*args, **kwargs)

        return telling

    names = {
        **{"register_grad_ready": "gradient", "start_grad_sync": "send"},
        "start_param_sync": "gather",
    }
    config, head = policy.model.config, policy.head.loss

    def loss(*args: Any) -> Any:
        groups = [group for piece in policy.ddp for group in piece.bucket_groups]
        late = any(group.param_gather_handle is not None for group in groups)
        events.append("early" if late else "head")
        return head(*args)

    policy.head.loss = loss
    hooks = [
        layer.register_forward_hook(lambda *_: events.append("layer"))
        for layer in policy.model.pieces[0].decoder.layers
    ]
    finish = config.finalize_model_grads_func
    config.finalize_model_grads_func = told("end", finish)
    with mock.patch.multiple(Group, **{k: told(v, getattr(Group, k)) for k, v in names.items()}):
        yield events
    config.finalize_model_grads_func, policy.head.loss = finish, head
    for hook in hooks:
        hook.remove()


def second_updates(path: str, choices: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """Of each choice, what went on in the second update, of one micro-batch, and behind it when the
    weights were read; and whether that changed any parameter."""
    from peergrad.parallel.mesh import leave_layout

    found = []
    for fields in choices:
        policy = build(path, {"micro_batch_tokens": 1000, **fields})
        policy.update(samples(), objective())  # Megatron counts gradients in the first
        with watched(policy) as events:
            policy.update(samples(), objective())
            events.append("read")
            before = [parameter.clone() for parameter in policy.model.parameters()]
            deque(policy.weights(), maxlen=0)
        changed = not all(map(torch.equal, before, policy.model.parameters()))
        found.append((" ".join(events), changed))
        leave_layout()
    return found


def test_it_is_beside_the_computation(paths: dict[str, str]) -> None:
    for (beside, late), (after, at_once) in run_ranks(
        2, second_updates, paths["untied"], [BOTH, {}]
    ):
        buckets = beside.count("send")
        passes, rest = beside.split(" end")
        assert passes.count("head") == 1 and "early" not in passes
        assert passes.count("send") == buckets > 5  # none waited for the last gradient of all
        assert passes.rindex("gradient") > passes.index("send") > passes.rindex("layer")
        assert (
            passes.count("gather") == buckets and "gather" not in passes[passes.rindex("layer") :]
        )
        assert passes.rindex("gather") > passes.index("layer")  # nor for the first parameters
        assert rest == " read" + buckets * " gather" and late
        passes, rest = after.split(" end")
        assert "send" not in passes and "gather" not in passes
        assert rest == " send gather read" and not at_once


def repeated(path: str) -> tuple[bool, list[object]]:
    """Whether two trainings have the same bits, and what the process was told for that."""
    from peergrad.parallel.mesh import leave_layout

    fields = {**BOTH, "micro_batch_tokens": 40, "deterministic_mode": True}
    found = []
    for _ in range(2):
        policy = build(path, fields)
        found.append(bits(rounds(policy)))
        leave_layout()
    embedding = policy.model.pieces[0].embedding.word_embeddings
    told = [torch.are_deterministic_algorithms_enabled(), embedding.deterministic_mode]
    names = ("CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO")
    return found[0] == found[1], [*told, *(os.environ[name] for name in names)]


def test_a_deterministic_trainer_repeats_itself(paths: dict[str, str]) -> None:
    for same, told in run_ranks(2, repeated, paths["tied"]):
        assert same and told == [True, True, ":4096:8", "0"]
