"""The same recorded groups on every layout give the gradient that one process computes in float64.

Every choice of ``kernels.logprob`` is on the grid. The oracle is transformers' model, autograd and
``tests/oracle.py``; the subject is the path of a whole step: grading, weights, packing, Megatron's
schedule, all-reduces. A learning rate of 1e-30 leaves the weights alone, so that each optimizer
step of a batch has a gradient to compare.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch

from peergrad.config import Recompute
from tests.gradients import distance, exported_gradient
from tests.models import make_hf_model
from tests.oracle import losses
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

TEMPERATURE, MAX_TOKENS, TOLERANCE = 0.8, 12, 1e-6
OBJECTIVES: dict[str, list[str]] = {
    **{name: [f"algo={name}"] for name in ("deepseekmath", "dr_grpo", "rloo", "gspo", "rlinf")},
    **{name: [f"algo={name}"] for name in ("roll", "areal")},
    # of 16 groups: 16 mini-batches would be one group each, and nothing global about them
    **{name: [f"algo={name}", "algo.minibatches=4"] for name in ("r1", "dapo", "cispo")},
    "sapo": [
        *("algo=dr_grpo", "algo.surrogate.kind=sapo", "algo.entropy_coef=0.01"),
        *("algo.correction.kind=tis", "algo.correction.level=geometric"),
        *("algo.aggregation=group_token_mean", "algo.minibatches=2"),
    ],
    "gspo_token": [
        *("algo=gspo", "algo.surrogate.kind=gspo_token", "algo.shaping.discount=0.9"),
        *("algo.kl.coef=0.05", "algo.kl.place=reward", "algo.kl.estimator=k1"),
        *("algo.correction.kind=seq_mask_tis", "algo.correction.low=0.8"),
        *("algo.correction.high=1.25", "algo.denominator=kept"),
    ],
    "icepop": [
        *("algo=deepseekmath", "algo.kl.estimator=k2", "algo.minibatches=2"),
        *("algo.correction.kind=icepop", "algo.correction.high=1.3", "algo.correction.low=0.8"),
        *("algo.correction.dppo=0.05", "algo.denominator=kept"),
    ],
    "overlong": [
        *("algo=dr_grpo", "algo.shaping.overlong_tokens=6", "algo.sampling.flat_groups=drop"),
        "algo.denominator=kept",
    ],
}
# fields of parallel, order of the answers, kernels.logprob
Layout = tuple[dict[str, Any], int, str]
FUSED, LOGITS, PLAIN = "fused_linear", "from_logits", "reference"
FULL = {"recompute": Recompute.full}
PARTS = {"recompute": Recompute.selective, "recompute_modules": ["core_attn", "mlp"]}
VIRTUAL = {"pipeline": 2, "virtual_pipeline": 2}
BESIDE = {"overlap_grad_reduce": True, "ddp_bucket_size": 9000}
SHALLOW, DEEP = 2, 4  # layers
# Every objective on up to two ranks and two layers. More of them, and what divides or computes
# layers in another way, meet some that need all there is: whole batches, whole answers, a pass
# before the update.
GRID: dict[tuple[int, int], list[Layout]] = {
    (SHALLOW, 1): [
        ({"micro_batch_tokens": 10_000}, 0, FUSED),
        ({"micro_batch_tokens": 24}, 1, LOGITS),
    ],
    (SHALLOW, 2): [
        ({"tensor": 2, "micro_batch_tokens": 160}, 0, FUSED),
        ({"tensor": 2, "sequence": True, "micro_batch_tokens": 100}, 1, LOGITS),
        ({"pipeline": 2, "micro_batch_tokens": 100}, 2, FUSED),
        ({"context": 2, "micro_batch_tokens": 50, **BESIDE}, 1, FUSED),
        ({"micro_batch_tokens": 100, **BESIDE}, 3, PLAIN),
    ],
    (SHALLOW, 4): [
        ({"tensor": 2, "pipeline": 2, "micro_batch_tokens": 160}, 1, LOGITS),
        ({"tensor": 2, "sequence": True, "micro_batch_tokens": 80, **BESIDE}, 2, FUSED),
        ({"context": 2, "tensor": 2, "sequence": True, "micro_batch_tokens": 80}, 3, LOGITS),
        ({"micro_batch_tokens": 160}, 0, FUSED),
    ],
    (DEEP, 2): [
        ({**VIRTUAL, "micro_batch_tokens": 100}, 2, FUSED),
        ({"pipeline": 2, "first_stage_layers": 3, "micro_batch_tokens": 100, **FULL}, 2, FUSED),
        ({"tensor": 2, "sequence": True, "micro_batch_tokens": 100, **PARTS}, 1, LOGITS),
    ],
    (DEEP, 4): [
        ({**VIRTUAL, "tensor": 2, "sequence": True, "micro_batch_tokens": 160, **FULL}, 1, LOGITS),
        ({**VIRTUAL, "micro_batch_tokens": 80, **PARTS, **BESIDE}, 2, FUSED),
        ({**VIRTUAL, "context": 2, "micro_batch_tokens": 50, **FULL, **BESIDE}, 0, FUSED),
        ({"context": 4, "micro_batch_tokens": 50, **PARTS, **BESIDE}, 0, LOGITS),
    ],
}
SOME = ("dapo", "gspo_token", "icepop")


def objectives_of(layers: int, ranks: int) -> tuple[str, ...]:
    return (
        SOME
        if layers == DEEP
        else (*SOME, "rlinf", "roll", "sapo")
        if ranks == 4
        else tuple(OBJECTIVES)
    )


def configure(path: str, name: str) -> Any:
    from peergrad.running.compose import compose_config

    config, _ = compose_config(
        [
            *(f"model.path={path}", "model.dtype=float32", *OBJECTIVES[name]),
            *("optim.lr=1e-30", "optim.clip_grad=0", f"rollout.temperature={TEMPERATURE}"),
            *("parallel.distributed_optimizer=false", "kernels.chunk=7"),
            *(f"rollout.max_new_tokens={MAX_TOKENS}", "rollout.batch_size=64"),
            *("rollout.group_size=4", "algo.shuffle=false"),
        ]
    )
    return config


def record(model: Any) -> tuple[list[Any], list[np.ndarray]]:
    """16 groups of 4, and old logprobs: those of the model, moved a little. One group is flat, one
    answer in six was cut off, one has no token at all."""
    from peergrad.data import Group, Prompt, Rollout

    rng = np.random.default_rng(5)
    groups, old = [], []
    for g in range(16):
        prompt = rng.integers(3, 100, rng.integers(2, 6)).astype(np.int32)
        rollouts = []
        for i in range(4):
            size = 0 if (g, i) == (3, 1) else int(rng.integers(1, MAX_TOKENS + 1))
            tokens = rng.integers(3, 100, size).astype(np.int32)
            logp = scores(model, prompt, tokens)[0].detach().numpy()
            engine = (logp + rng.normal(0, 0.2, size)).astype(np.float32)
            old.append((logp + rng.normal(0, 0.2, size)).astype(np.float32))
            finish = "length" if rng.random() < 1 / 6 else "stop"
            reward = 1.0 if g == 2 else float(rng.integers(0, 2)) + 0.25 * float(rng.random() < 0.3)
            rollouts.append(Rollout(tokens, engine, ((0, 0, size),), finish, "", reward))
        groups.append(Group(str(g), Prompt(str(g), prompt, "", ""), tuple(rollouts)))
    return groups, old


def scores(model: Any, prompt: np.ndarray, tokens: np.ndarray) -> tuple[Any, Any]:
    """(logp, entropy) of an answer in float64."""
    ids = torch.from_numpy(np.concatenate([prompt, tokens])).long()[None]
    logits = model(ids).logits[0, prompt.size - 1 : -1 if tokens.size else prompt.size - 1]
    log_p = (logits / TEMPERATURE).log_softmax(-1)
    targets = torch.from_numpy(tokens).long()[:, None]
    return log_p.gather(1, targets)[:, 0], -(log_p.exp() * log_p).sum(-1)


def oracle(
    path: str, reference: str, config: Any, groups: Any, old: Any
) -> list[dict[str, torch.Tensor]]:
    """Gradient of each optimizer step by HF name."""
    from transformers import AutoModelForCausalLM

    policy, frozen = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64) for p in (path, reference)
    )
    pairs = [(group.prompt.tokens, r.tokens) for group in groups for r in group.rollouts]
    own = [scores(policy, *pair) for pair in pairs]
    with torch.no_grad():
        ref = [scores(frozen, *pair)[0] for pair in pairs]
    found = losses(
        groups,
        config.algo,
        max_tokens=MAX_TOKENS,
        logp=[x for x, _ in own],
        entropy=[x for _, x in own],
        logp_old=[torch.from_numpy(x).double() for x in old],
        logp_ref=ref,
    )
    names, parameters = zip(*policy.named_parameters(), strict=True)
    return [
        dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))
        for loss in found
    ]


def gradients(
    reference: str, configs: dict[str, Any], layouts: list[Layout], recorded: Any, broken: str = ""
) -> dict[tuple[str, str], list[dict[str, torch.Tensor]]]:
    """What the package computes under each configuration on each layout, on rank 0."""
    from dataclasses import replace

    from peergrad.algo.grading import AlgoState, grade
    from peergrad.algo.objective import Objective
    from peergrad.algo.plan import make_plan
    from peergrad.algo.samples import make_samples, with_logp
    from peergrad.config import Logprob
    from peergrad.learning import learn
    from peergrad.parallel.mesh import init_mesh, leave_layout
    from peergrad.parallel.policy import Policy, Scorer

    if broken == "denominator":  # its own on every rank: what averaging over ranks would do
        from peergrad.algo import packing
        from peergrad.parallel import policy as policy_module

        def pack(part: Any, **options: Any) -> Any:
            batch = packing.pack(part, **options)
            return replace(
                batch, weight=torch.full_like(batch.weight, 1 / (batch.weight.numel() or 1))
            )

        policy_module.pack = pack  # type: ignore[assignment]
    if broken == "context":  # what the other ranks predict counts for nothing
        from peergrad.parallel import head as head_module

        head_module.whole = lambda values, batch, group: values.new_zeros(  # type: ignore[assignment]
            batch.targets.numel()
        ).index_copy(0, batch.held.scored, values)
    groups, old = recorded
    found: dict[tuple[str, str], list[dict[str, torch.Tensor]]] = {}
    for layout in layouts:
        sizes, order, kernel = layout
        given = next(iter(configs.values()))
        parallel = replace(given.parallel, **sizes)
        config = replace(
            given, parallel=parallel, kernels=replace(given.kernels, logprob=Logprob[kernel])
        )
        ranks = init_mesh(parallel, seed=0)
        policy, frozen = Policy(config, ranks), Scorer(config, ranks, path=reference)
        before, update = [p.clone() for p in policy.model.parameters()], policy.update
        fresh = with_logp(make_samples(groups), "logp_old", old)
        fresh = with_logp(fresh, "logp_ref", frozen.score(fresh).logp)
        for name, given in configs.items():
            algo = given.algo
            state = AlgoState(algo.kl.coef)
            samples = grade(groups, fresh, algo, state, max_tokens=MAX_TOKENS)[0]
            # another order of the answers of a group is another packing, and the same gradient
            samples = [
                s for g in range(16) for s in turned([x for x in samples if x.group == g], order)
            ]
            found[name, str(layout)] = steps = []
            policy.update = partial(spy, update, policy, steps)  # type: ignore[method-assign]
            learn(given, make_plan(given), Objective(algo), policy, samples, step=1)
        assert all(map(torch.equal, before, policy.model.parameters()))  # one policy served all
        leave_layout()
    return found if ranks.rank == 0 else {}


def spy(update: Any, policy: Any, steps: list[Any], part: Any, objective: Any) -> Any:
    result = update(part, objective)
    assert result.finite and result.refusal is None
    steps.append(exported_gradient(policy))
    return result


def turned(values: list[Any], by: int) -> list[Any]:
    return values[by:] + values[:by]


@dataclass
class Case:
    """A model and its reference, what is trained on, and the gradients that must come out."""

    reference: str
    configs: dict[str, Any]
    recorded: Any
    expected: dict[str, list[dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Case]:
    """Of so many layers. Tied: two pipeline stages hold a copy of the embedding each and add up its
    gradient. With every bias that there is. Of moderate weights: float32's rounding alone moves the
    gradient of wide ones by 2e-6."""
    folder = tmp_path_factory.mktemp("models")

    @cache
    def build(layers: int) -> Case:
        from transformers import AutoModelForCausalLM

        options: Any = {"tied": True, "attention_bias": True, "layers": layers, "spread": 0.03}
        made = [make_hf_model(folder / f"{layers}-{s}", seed=s, **options) for s in (0, 1)]
        path, reference = map(str, made)
        recorded = record(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64))
        configs = {name: configure(path, name) for name in objectives_of(layers, 1)}
        wanted = {name: oracle(path, reference, c, *recorded) for name, c in configs.items()}
        return Case(reference, configs, recorded, wanted)

    return build


@pytest.mark.parametrize(
    ("layers", "ranks"),
    [pytest.param(*one, marks=[pytest.mark.slow] if one[1] == 4 else []) for one in GRID],
)
def test_every_layout_gives_the_gradient_of_one_process(
    cases: Callable[[int], Case], layers: int, ranks: int
) -> None:
    case, layouts = cases(layers), GRID[layers, ranks]
    configs = {name: case.configs[name] for name in objectives_of(layers, ranks)}
    ours = (case.reference, configs, layouts, case.recorded)
    found = run_ranks(ranks, gradients, *ours, timeout=500)[0]
    assert len(found) == len(configs) * len(layouts)
    worst = {}
    for (name, layout), steps in found.items():
        assert len(steps) == len(case.expected[name])
        pairs = zip(steps, case.expected[name], strict=True)
        worst[name, layout] = max(distance(ours, theirs) for ours, theirs in pairs)
    print("\n".join(f"{d:.2e} {key}" for key, d in sorted(worst.items(), key=lambda x: -x[1])))
    assert max(worst.values()) <= TOLERANCE, worst


@pytest.mark.parametrize(
    ("broken", "objective", "layout"),
    [
        ("denominator", "dapo", {"micro_batch_tokens": 100}),
        ("context", "gspo", {"context": 2, "micro_batch_tokens": 50}),
    ],
)
def test_what_is_left_out_turns_it_red(
    cases: Callable[[int], Case], broken: str, objective: str, layout: dict[str, Any]
) -> None:
    case = cases(SHALLOW)
    configs, layouts = {objective: case.configs[objective]}, [(layout, 0, FUSED)]
    found = run_ranks(2, gradients, case.reference, configs, layouts, case.recorded, broken)[0]
    for steps in found.values():
        pairs = zip(steps, case.expected[objective], strict=True)
        assert min(distance(ours, theirs) for ours, theirs in pairs) > 0.1
