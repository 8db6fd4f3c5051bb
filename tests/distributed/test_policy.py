"""One optimizer step of the real Megatron policy: its scores, its gradient, its refusals, its
checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch

from tests.models import make_hf_model
from tests.spawn import run_ranks

KL_COEF, ENTROPY_COEF, TEMPERATURE = 0.1, 0.3, 0.8
LENGTHS = (4, 9, 30, 12, 5, 21, 6, 15, 7)
UNWEIGHTED = 3  # this sample takes no part, nor do single tokens of others


class Layout(NamedTuple):
    tensor: int
    pipeline: int
    budget: int  # tokens of a micro-batch
    dtype: str = "float32"
    sequence: bool = False
    virtual: int = 1
    overlap: bool = False


LAYOUTS: dict[int, list[Layout]] = {
    1: [Layout(1, 1, 10_000), Layout(1, 1, 16)],
    2: [
        *(Layout(2, 1, 32), Layout(2, 1, 32, sequence=True), Layout(1, 2, 32)),
        *(Layout(1, 2, 32, virtual=2), Layout(1, 1, 32)),
    ],
    4: [
        *(Layout(2, 2, 40, sequence=True), Layout(2, 1, 40)),
        Layout(2, 2, 40, "bfloat16", sequence=True, virtual=2),
    ],
}


def samples() -> list[Any]:
    from peergrad.algo.samples import Sample

    rng = np.random.default_rng(1)

    def sample(index: int, size: int) -> Sample:
        answer = size - 3
        weight = rng.uniform(0.5, 1.5, answer) * (rng.random(answer) > 0.2) / 50
        return Sample(
            tokens=rng.integers(3, 100, size).astype(np.int32),
            prompt_length=3,
            logp_engine=np.full(answer, -1.0, np.float32),
            advantage=rng.normal(size=answer).astype(np.float32),
            weight=(weight * (index != UNWEIGHTED)).astype(np.float32),
            version=np.zeros(answer, np.int32),
        )

    return [sample(index, size) for index, size in enumerate(LENGTHS)]


def oracle_rows(path: str) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
    """(logp, entropy) of every answer token, sample by sample, with transformers in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    logp, entropy = [], []
    for sample in samples():
        ids = torch.from_numpy(sample.tokens).long()[None]
        at, target = slice(sample.prompt_length - 1, -1), ids[0, sample.prompt_length :, None]
        log_p = (model(ids).logits[0, at] / TEMPERATURE).log_softmax(-1)
        logp.append(log_p.gather(1, target)[:, 0])
        entropy.append(-(log_p.exp() * log_p).sum(-1))
    return logp, entropy, model


def oracle(path: str, reference: str) -> dict[str, Any]:
    """Loss and global gradient norm of the same step with autograd, and the scores."""
    logp, entropy, policy = oracle_rows(path)
    ref = [rows.detach() for rows in oracle_rows(reference)[0]]
    total = torch.zeros((), dtype=torch.float64)
    for i, sample in enumerate(samples()):
        advantage, weight = (
            torch.from_numpy(x).double() for x in (sample.advantage, sample.weight)
        )
        log_q = ref[i] - logp[i]
        surrogate = -(logp[i] - logp[i].detach()).exp() * advantage
        kl = log_q.exp() - 1 - log_q
        total = total + (weight * (surrogate + KL_COEF * kl - ENTROPY_COEF * entropy[i])).sum()
    total.backward()
    squares = sum((p.grad**2).sum() for p in policy.parameters())  # a tied one once
    scores = [[r.detach().numpy() for r in rows] for rows in (logp, entropy)]
    return {
        "loss": total.item(),
        "norm": float(squares**0.5),
        "logp": scores[0],
        "entropy": scores[1],
        "reference": [rows.numpy() for rows in ref],
    }


def make(path: str, layout: Layout, **sections: Any) -> tuple[Any, Any]:
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

    config = Config(
        model=ModelConfig(path=path, dtype=Dtype[layout.dtype]),
        parallel=ParallelConfig(
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            virtual_pipeline=layout.virtual,
            sequence=layout.sequence,
            micro_batch_tokens=layout.budget,
            distributed_optimizer=(distributed := sections.get("distributed", True)),
            overlap_grad_reduce=layout.overlap,
            overlap_param_gather=layout.overlap and distributed,
            ddp_bucket_size=9000 if layout.overlap else None,
        ),
        kernels=KernelsConfig(
            chunk=7, logprob=Logprob.fused_linear if layout.dtype == "bfloat16" else Logprob.auto
        ),
        rollout=RolloutConfig(temperature=TEMPERATURE),
        optim=OptimConfig(lr=1e-2, clip_grad=1.0),
    )
    mesh = init_mesh(config.parallel, seed=0)
    return Policy(config, mesh), mesh


def objective(*, entropy_coef: float = 0.0, kl_coef: float = 0.0, **surrogate: Any) -> Any:
    from peergrad.algo.objective import Objective
    from peergrad.config import AlgoConfig, KlConfig, SurrogateConfig

    return Objective(
        AlgoConfig(
            kl=KlConfig(coef=kl_coef),
            entropy_coef=entropy_coef,
            surrogate=SurrogateConfig(**surrogate),
        )
    )


def step(path: str, reference: str, layouts: list[Layout]) -> list[dict[str, Any]]:
    """Scores of policy and reference, refused updates and one that is made, on each layout."""
    from peergrad.algo.samples import with_logp
    from peergrad.parallel.mesh import leave_layout
    from peergrad.parallel.policy import Scorer

    whole, found = objective(entropy_coef=ENTROPY_COEF, kl_coef=KL_COEF), []
    for layout in layouts:
        policy, mesh = make(path, layout)
        frozen = Scorer(policy.config, mesh, path=reference)
        own, theirs = policy.score(samples(), with_entropy=True), frozen.score(samples())
        assert all(np.isnan(x).all() for x in theirs.entropy)  # nothing reads it: see ``loop``
        good = with_logp(samples(), "logp_ref", theirs.logp)
        nan = [replace(s, advantage=np.full_like(s.advantage, np.nan)) for s in good]
        empty = [replace(s, weight=np.zeros_like(s.weight)) for s in good]

        def far(policy: Any = policy) -> list[Any]:  # every ratio is e
            return with_logp(samples(), "logp_old", [x - 1 for x in policy.score(samples()).logp])

        parameters = list(policy.model.parameters())
        before = [parameter.clone() for parameter in parameters]

        def unchanged(parameters: Any = parameters, before: Any = before) -> bool:
            return all(map(torch.equal, before, parameters))

        refused = {}
        for name, batch, judge in [
            ("nan", nan, whole),
            ("empty", empty, whole),
            ("far", far(), objective(max_mean_ratio=2.5)),
        ]:
            result = policy.update(batch, judge)
            refused[name] = (result.finite, result.refusal, unchanged())
        update = policy.update(good, whole)
        assert update.finite and update.refusal is None and not unchanged()
        assert policy.update(far(), objective(max_mean_ratio=3.0)).refusal is None
        found.append(
            {
                "loss": update.metrics["loss/total"],
                "norm": update.metrics["optim/grad_norm"],
                "refused": refused,
                "own": (own.logp, own.entropy),
                "of the update": (update.scores.logp, update.scores.entropy),
                "reference": theirs.logp,
            }
        )
        leave_layout()
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Policy and reference. Tied: two pipeline stages hold a copy of the embedding each and must
    add up its gradient."""
    folder = tmp_path_factory.mktemp("models")
    one, two = (str(make_hf_model(folder / str(s), seed=s, tied=True)) for s in (0, 1))
    return one, two


@pytest.fixture(scope="module")
def expected(models: tuple[str, str]) -> dict[str, Any]:
    return oracle(*models)


@pytest.fixture(scope="module", params=[1, 2, 4])
def found(models: tuple[str, str], request: pytest.FixtureRequest) -> Any:
    """(layout, what every rank found on it), in the order of the layouts."""
    ranks = run_ranks(request.param, step, *models, LAYOUTS[request.param])
    return list(zip(LAYOUTS[request.param], zip(*ranks, strict=True), strict=True))


def tolerance(layout: Layout) -> float:
    # The loss is a small rest of large terms: rounding of 0.03 nats at the one token whose ratio is
    # e^6 moves it by 6 % (one standard deviation), that of the weights by 5 %.
    return 1e-5 if layout.dtype == "float32" else 0.15


@pytest.mark.distributed
def test_scores_equal_transformers(found: Any, expected: dict[str, Any]) -> None:
    """Of policy, reference and the update's own forward: in the order of the samples whatever
    micro-batch and rank they came from, equal on every rank, NaN where a token has no weight."""
    order = samples()
    for layout, ranks in found:
        rows = {
            "logp": [rank["own"][0] for rank in ranks],
            "entropy": [rank["own"][1] for rank in ranks],
            "reference": [rank["reference"] for rank in ranks],
        }
        for kind, per_rank in rows.items():
            for own in per_rank:
                assert [x.dtype for x in own] == [np.float32] * len(order)
                for ours, same, theirs, sample in zip(
                    own, per_rank[0], expected[kind], order, strict=True
                ):
                    np.testing.assert_array_equal(ours, same)
                    np.testing.assert_array_equal(np.isnan(ours), sample.weight == 0)
                    at = sample.scored
                    atol = 1e-4 if layout.dtype == "float32" else 0.3  # nats
                    np.testing.assert_allclose(ours[at], theirs[at], rtol=0, atol=atol)
        for rank in ranks:  # dropout is 0: the training forward says what the other one says
            for before, during in zip(rank["own"], rank["of the update"], strict=True):
                for one, two in zip(before, during, strict=True):
                    np.testing.assert_array_equal(one, two)


@pytest.mark.distributed
def test_gradient_equals_transformers_autograd(found: Any, expected: dict[str, Any]) -> None:
    """With KL and entropy bonus. The gradient norm pins every gradient's size: a wrong denominator,
    a lost all-reduce or a micro-batch counted twice moves it."""
    for layout, ranks in found:
        for rank in ranks:
            assert rank["loss"] == pytest.approx(expected["loss"], rel=tolerance(layout))
            assert rank["norm"] == pytest.approx(expected["norm"], rel=tolerance(layout))


@pytest.mark.distributed
def test_a_refused_update_leaves_the_weights_alone(found: Any) -> None:
    """A NaN advantage, a batch without a token of any weight, an objective's own refusal."""
    for _, ranks in found:
        for rank in ranks:
            assert rank["refused"]["nan"] == (False, None, True)
            assert rank["refused"]["empty"] == (True, "no token to learn from", True)
            finite, refusal, untouched = rank["refused"]["far"]
            assert finite and untouched
            assert refusal == "mean ratio 2.72 > max_mean_ratio 2.5"


def canary_gaps(path: str) -> tuple[float, list[int]]:
    """The gap of three servers, the last of which is off by half a nat at one token, and how many
    rows were scored for it."""
    from peergrad.algo.samples import Sample
    from peergrad.data import Group, Prompt, Rollout

    policy, _ = make(path, Layout(1, 1, 1000))
    tokens = np.arange(3, 40, dtype=np.int32)
    prompt, answer = Prompt("canary", tokens[:1], text="", answer=""), tokens[1:]
    size, zero = answer.size, np.zeros(answer.size, np.float32)
    row = Sample(tokens, 1, zero, zero, zero + 1, zero.astype(np.int32))
    engine = policy.score([row], temperature=1.0).logp[0]
    wrong = engine - 0.5 * (np.arange(size) == 7)
    scored, score = [], policy.score

    def counted(samples: Any, **options: Any) -> Any:
        scored.append(len(samples))
        return score(samples, **options)

    policy.score = counted  # type: ignore[method-assign]
    servers = tuple(
        Rollout(answer, logp.astype(np.float32), ((0, 0, size),), finish="length", text="")
        for logp in (engine, engine, wrong)
    )
    return policy.canary_gap(Group("canary", prompt, servers)), scored


@pytest.mark.distributed
def test_canary_is_scored_once_for_all_servers(models: tuple[str, str]) -> None:
    for gap, scored in run_ranks(2, canary_gaps, models[0]):
        assert gap == pytest.approx(0.5, abs=1e-5) and scored == [1]


def checkpoint_rounds(
    path: str, folder: str, layouts: list[tuple[Layout, bool, int]]
) -> list[list[float]]:
    """Train two steps and save on the first layout, the second step while the third is trained;
    then restore and train a third on each. The vocabulary is padded to a multiple of the last
    number."""
    from peergrad.config import CheckpointConfig
    from peergrad.parallel.checkpoint import Checkpoints
    from peergrad.parallel.mesh import leave_layout

    losses = []
    for i, (layout, distributed, multiple) in enumerate([layouts[0], *layouts]):
        with mock.patch("peergrad.parallel.hf.config.VOCAB_MULTIPLE", multiple):
            policy, mesh = make(path, layout, distributed=distributed)
        assert policy.shape.vocab == 100
        checkpoints = Checkpoints(Path(folder), CheckpointConfig(keep=2), mesh)
        if i == 0:
            for number in (1, 2):
                policy.update(samples(), objective())
                state = policy, b"prompts", {"at": number}, None
                if number == 1:
                    checkpoints.save(*state, step=1)
                else:
                    checkpoints.begin(*state, step=2, aside=True)
        else:
            assert checkpoints.restore(policy) == 2
            assert checkpoints.collector_state(2) == b"prompts"
            assert checkpoints.algo_state(2) == {"at": 2}
        update = policy.update(samples(), objective())
        # The fourth step's gradient shows the third step's Adam state, bias correction included.
        after = policy.update(samples(), objective())
        keys = ("loss/total", "optim/grad_norm", "policy/entropy")
        losses.append([u.metrics[key] for u in (update, after) for key in keys])
        if i == 0:
            checkpoints.finish()
        leave_layout()
    return losses


@pytest.mark.distributed
@pytest.mark.parametrize("distributed", [True, False])
def test_resumed_training_continues_the_same_numbers(tmp_path: Path, distributed: bool) -> None:
    path = str(make_hf_model(tmp_path / "model", vocab=100))
    # Saved at TP 2 with 112 rows of a vocabulary; resumed there, and with 128 on every layout
    first, *others = Layout(2, 1, 40), Layout(2, 1, 40), Layout(1, 2, 40)
    others += [Layout(1, 1, 40, overlap=True), Layout(1, 2, 40, virtual=2)]
    layouts = [(first, distributed, 16), *((layout, distributed, 128) for layout in others)]
    for rank in run_ranks(2, checkpoint_rounds, path, str(tmp_path / "ckpt"), layouts):
        uninterrupted, same_layout, *others = rank
        assert same_layout == uninterrupted  # bit for bit
        for other in others:
            assert other == pytest.approx(uninterrupted, rel=1e-4)


def reference_rounds(path: str, folder: str, layouts: list[Layout]) -> dict[str, Any]:
    """Make the policy of step 1 the reference, save, train on and save again without and with it;
    then read it on each layout. Weights by HF name, as this rank has them, that nothing has read
    between an optimizer step and what is looked at: a copy, a checkpoint."""
    from peergrad.config import CheckpointConfig
    from peergrad.parallel.checkpoint import Checkpoints
    from peergrad.parallel.mesh import leave_layout
    from peergrad.parallel.policy import Scorer

    def weights(model: Any) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in model.weights()}

    policy, mesh = make(path, layouts[0])
    reference = Scorer(policy.config, mesh, path=path)
    checkpoints = Checkpoints(Path(folder), CheckpointConfig(keep=0), mesh)
    seen: dict[str, Any] = {"start": weights(reference), "restored": []}
    policy.update(samples(), objective())
    reference.become(policy)
    checkpoints.save(policy, None, {}, None, step=1)
    seen["policy"] = weights(policy)
    policy.update(samples(), objective())
    checkpoints.begin(policy, None, {"reference_step": 1}, reference, step=2, aside=True)
    seen["policy later"] = weights(policy)
    seen["reference"] = weights(reference)
    policy.update(samples(), objective())  # the reference of a checkpoint does not learn
    checkpoints.finish()
    for layout in layouts:
        leave_layout()
        policy, mesh = make(path, layout)
        checkpoints = Checkpoints(Path(folder), CheckpointConfig(keep=0), mesh)
        frozen = Scorer(policy.config, mesh, path=path)
        assert checkpoints.restore(policy) == 2
        checkpoints.restore_reference(frozen, 2)
        seen["restored"].append((weights(policy), weights(frozen)))
    saved = str(Path(folder) / "step_000002")  # of which a run may take the weights alone
    seen["weights"] = weights(Scorer(policy.config, mesh, path=path, weights=saved))
    seen["algo"] = [checkpoints.algo_state(step) for step in (1, 2, 3)]
    return seen


@pytest.mark.distributed
def test_a_checkpoint_keeps_a_replaced_reference(tmp_path: Path) -> None:
    path = str(make_hf_model(tmp_path / "model"))
    folder = tmp_path / "ckpt"
    layouts = [Layout(1, 1, 40, overlap=True), Layout(1, 2, 40, virtual=2), Layout(2, 1, 40)]
    first, second = run_ranks(2, reference_rounds, path, str(folder), layouts)
    assert not same(first["policy"], first["start"])
    assert same(first["reference"], first["policy"])
    assert not same(first["policy later"], first["policy"])
    assert same(first["weights"], first["policy later"])
    for policy, reference in first["restored"]:
        assert same(policy, first["policy later"])
        assert same(reference, first["reference"])
    assert not (folder / "step_000001" / "reference").exists()
    assert first["algo"] == second["algo"] == [{}, {"reference_step": 1}, None]


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are equal bit for bit."""
    assert one.keys() == two.keys() and one
    return all(torch.equal(one[name], two[name]) for name in one)


def failing_share() -> str:
    from peergrad.config import ParallelConfig
    from peergrad.parallel.mesh import init_mesh

    mesh = init_mesh(ParallelConfig(), seed=0)
    assert mesh.share(lambda: mesh.rank) == 0

    def fail() -> None:
        raise KeyError("the cause")

    try:
        mesh.share(fail)
    except Exception as error:
        return f"{type(error).__name__} {error}"
    return "nothing raised"


@pytest.mark.distributed
def test_an_error_on_rank_0_reaches_every_rank() -> None:
    first, second = run_ranks(2, failing_share)
    assert first == "KeyError 'the cause'"
    assert second.startswith("OtherRankFailed rank 0 failed: KeyError")
