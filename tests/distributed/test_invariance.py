"""The same recorded groups on every layout give the gradient that one process computes in float64.

Every choice of ``kernels.logprob`` is on the grid. The oracle is transformers' model, autograd and
``tests/oracle.py``; the subject is the path of a whole step: grading, weights, packing, Megatron's
schedule, all-reduces. A learning rate of 1e-30 leaves the weights alone, so that each optimizer
step of a batch has a gradient to compare.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch

from peergrad.config import Recompute
from tests.gradients import distance, exported_gradient
from tests.models import MIXTURES, make_hf_model, unfused
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
BALANCED = {
    "balanced": [
        *("algo=dr_grpo", "algo.minibatches=2"),
        *("moe.aux_loss_coef=0.02", "moe.z_loss_coef=0.003"),
    ]
}
"""Of a mixture of experts alone."""
# fields of parallel, order of the answers, kernels.logprob
Layout = tuple[dict[str, Any], int, str]
FUSED, LOGITS, PLAIN = "fused_linear", "from_logits", "reference"
FULL = {"recompute": Recompute.full}
PARTS = {"recompute": Recompute.selective, "recompute_modules": ["core_attn", "mlp"]}
VIRTUAL = {"pipeline": 2, "virtual_pipeline": 2}
BESIDE = {"overlap_grad_reduce": True, "ddp_bucket_size": 9000}
EXPERTS_AGAIN = {"recompute": Recompute.selective, "recompute_modules": ["core_attn", "moe"]}
SPREAD: dict[str, Any] = {"tensor": 2, "sequence": True, "expert": 2}
SHALLOW, DEEP, EXPERTS = "2 layers", "4 layers", "experts"
# Tied: two pipeline stages hold a copy of the embedding each and add up its gradient. With every
# bias that there is. Of moderate weights: float32's rounding alone moves the gradient of wide ones
# by 2e-6.
DENSE: dict[str, Any] = {"tied": True, "attention_bias": True, "spread": 0.03}
MODELS: dict[str, dict[str, Any]] = {
    SHALLOW: {**DENSE, "layers": 2},
    DEEP: {**DENSE, "layers": 4},
    EXPERTS: {
        **{"layers": 2, "family": "qwen3_moe", "spread": 0.03, **MIXTURES["qwen3_moe"]},
        **{"rope_parameters": None, "num_key_value_heads": 2},  # YaRN costs a digit
    },
}
# Every objective on one rank, and on two that share matrices, sequences, layers in turn or experts
# (and data). The others meet some that need all there is: whole batches, whole answers, a pass
# before the update.
GRID: dict[tuple[str, int], list[Layout]] = {
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
        ({**VIRTUAL, "micro_batch_tokens": 160, **PARTS, **BESIDE}, 2, FUSED),
        ({**VIRTUAL, "context": 2, "micro_batch_tokens": 100, **FULL, **BESIDE}, 0, FUSED),
        ({"context": 4, "micro_batch_tokens": 80, **PARTS, **BESIDE}, 0, LOGITS),
    ],
    (EXPERTS, 2): [
        ({"expert": 2, "micro_batch_tokens": 250, **BESIDE}, 1, FUSED),
        ({**SPREAD, "expert_tensor": 1, "micro_batch_tokens": 300, **EXPERTS_AGAIN}, 2, FUSED),
        ({"tensor": 2, "sequence": True, "micro_batch_tokens": 100}, 0, LOGITS),
        ({"context": 2, "expert": 2, "micro_batch_tokens": 50}, 3, FUSED),
    ],
    (EXPERTS, 4): [
        ({**SPREAD, "micro_batch_tokens": 160, **BESIDE}, 1, FUSED),
        # Two ranks share each key-value head.
        ({**SPREAD, "tensor": 4, "expert_tensor": 1, "micro_batch_tokens": 160, **FULL}, 0, FUSED),
        ({"expert": 2, "pipeline": 2, "micro_batch_tokens": 160, **FULL}, 2, FUSED),
        (
            {"context": 2, "expert": 2, "micro_batch_tokens": 100, **EXPERTS_AGAIN, **BESIDE},
            3,
            LOGITS,
        ),
    ],
}
SOME = ("dapo", "gspo_token", "icepop")


def objectives_of(model: str, ranks: int, layout: Layout | None = None) -> tuple[str, ...]:
    """Those that meet ``layout``; None: those that meet any."""
    balanced = tuple(BALANCED) if model == EXPERTS else ()
    first = layout is None or layout == GRID[model, ranks][0]
    shared = model == SHALLOW and layout is not None and "context" in layout[0]
    every = ranks == 1 or (ranks == 2 and (first or shared))
    return (*(OBJECTIVES if every else SOME), *balanced)


def configure(path: str, name: str) -> Any:
    config = composed(name)
    return replace(config, model=replace(config.model, path=path))


@cache
def composed(name: str) -> Any:
    """Of any model."""
    from peergrad.running.compose import compose_config

    config, _ = compose_config(
        [
            *("model.path=m", "model.dtype=float32", *{**OBJECTIVES, **BALANCED}[name]),
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


@dataclass(frozen=True)
class Passed:
    """What a model says of all answers in float64, from one pass over them."""

    model: Any
    logp: list[torch.Tensor]
    entropy: list[torch.Tensor]
    router: list[list[torch.Tensor]]  # of each answer, of each layer: [tokens before it, experts]


def load(path: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, experts_implementation="eager"
    )


def pass_over(model: Any, groups: Any) -> Passed:
    """Padding is on the right, where nothing sees it."""
    pairs = [(group.prompt.tokens, r.tokens) for group in groups for r in group.rollouts]
    rows = [torch.from_numpy(np.concatenate(pair)).long() for pair in pairs]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mixed = hasattr(model.config, "num_experts")
    output = model(ids, **({"output_router_logits": True} if mixed else {}))
    layers = [x.view(*ids.shape, -1) for x in output.router_logits] if mixed else []
    found = Passed(model, [], [], [])
    for row, logits, (prompt, tokens) in zip(range(len(ids)), output.logits, pairs, strict=True):
        before = slice(prompt.size - 1, prompt.size - 1 + tokens.size)
        log_p = (logits[before] / TEMPERATURE).log_softmax(-1)
        targets = torch.from_numpy(tokens).long()[:, None]
        found.logp.append(log_p.gather(1, targets)[:, 0])
        found.entropy.append(-(log_p.exp() * log_p).sum(-1))
        found.router.append([x[row, : before.stop] for x in layers if tokens.size])
    return found


def oracle(
    policy: Passed, reference: Passed, config: Any, groups: Any, old: Any
) -> list[dict[str, torch.Tensor]]:
    """Gradient of each optimizer step by HF name."""
    found = losses(
        groups,
        config.algo,
        max_tokens=MAX_TOKENS,
        logp=policy.logp,
        entropy=policy.entropy,
        logp_old=[torch.from_numpy(x).double() for x in old],
        logp_ref=reference.logp,
    )
    if config.moe.aux_loss_coef:
        size = len(policy.router) // config.algo.minibatches
        parts = [policy.router[i : i + size] for i in range(0, len(policy.router), size)]
        found = [
            loss + router_loss(policy.model, part, config.moe)
            for loss, part in zip(found, parts, strict=True)
        ]
    names, parameters = zip(*policy.model.named_parameters(), strict=True)
    every = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in found]
    return [unfused(dict(zip(names, gradient, strict=True))) for gradient in every]


def router_loss(model: Any, router: list[list[torch.Tensor]], moe: Any) -> torch.Tensor:
    """Of the tokens that the answers' are predicted from."""
    balance, z = [], []
    for logits in (logits for layers in router for logits in layers):
        chosen = logits.topk(model.config.num_experts_per_tok).indices
        part = torch.bincount(chosen.flatten(), minlength=logits.shape[1]) / chosen.numel()
        balance.append(logits.shape[1] * (part * logits.softmax(-1).mean(0)).sum())
        z.append(logits.logsumexp(-1).square().sum())
    answers = [layers for layers in router if layers]
    tokens = sum(len(layers[0]) for layers in answers)
    return moe.aux_loss_coef * sum(balance) / len(answers) + moe.z_loss_coef * sum(z) / tokens


def gradients(
    reference: str,
    configs: dict[str, Any],
    layouts: list[Layout],
    recorded: Any,
    broken: str = "",
    meeting: list[tuple[str, ...]] | None = None,
) -> dict[tuple[str, str], list[dict[str, torch.Tensor]]]:
    """What the package computes under each configuration on each layout, on rank 0. ``meeting``:
    under which of them on each; None: under all."""
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
    if broken == "expert":  # one in the place of another
        from peergrad.parallel import weights

        local = weights.local_parameters
        weights.local_parameters = lambda model: (  # type: ignore[assignment]
            (re.sub(r"(experts)\.([01])\.", lambda m: f"{m[1]}.{1 - int(m[2])}.", name), x)
            for name, x in local(model)
        )
    if broken == "expert sum":  # over the ranks that add up all else
        from megatron.core.distributed import DistributedDataParallel

        make = DistributedDataParallel.__init__

        def init(self: Any, config: Any, ddp: Any, module: Any) -> None:
            for parameter in module.parameters():
                parameter.allreduce = True
            make(self, config, ddp, module)

        DistributedDataParallel.__init__ = init  # type: ignore[method-assign]
    if broken == "balance":  # over the samples of each micro-batch by itself
        from peergrad.parallel import policy as policy_module
        from peergrad.parallel.routing import routed

        def told(batch: Any, *, coefficients: Any, **others: Any) -> Any:
            own = replace(coefficients, sample=0.02 / max(1, batch.sequences))
            return routed(batch, coefficients=own, **others)

        policy_module.routed = told  # type: ignore[assignment]
    groups, old = recorded
    found: dict[tuple[str, str], list[dict[str, torch.Tensor]]] = {}
    for names, layout in zip(meeting or [tuple(configs)] * len(layouts), layouts, strict=True):
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
        for name in names:
            given = configs[name]
            algo, policy.config = given.algo, replace(config, moe=given.moe)
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
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Of MODELS."""
    folder = tmp_path_factory.mktemp("models")

    @cache
    def build(model: str) -> Case:

        made = [make_hf_model(folder / f"{model}-{s}", seed=s, **MODELS[model]) for s in (0, 1)]
        path, reference = map(str, made)
        model_of = {which: load(which) for which in (path, reference)}
        recorded = record(model_of[path])
        policy = pass_over(model_of[path], recorded[0])
        with torch.no_grad():
            frozen = pass_over(model_of[reference], recorded[0])
        configs = {name: configure(path, name) for name in objectives_of(model, 1)}
        wanted = {name: oracle(policy, frozen, c, *recorded) for name, c in configs.items()}
        return Case(reference, configs, recorded, wanted)

    return build


@pytest.mark.parametrize(
    ("model", "ranks"),
    [pytest.param(*one, marks=[pytest.mark.slow] if one[1] == 4 else []) for one in GRID],
)
def test_every_layout_gives_the_gradient_of_one_process(
    cases: Callable[[str], Case], model: str, ranks: int
) -> None:
    case, layouts = cases(model), GRID[model, ranks]
    meeting = [objectives_of(model, ranks, layout) for layout in layouts]
    ours = (case.reference, case.configs, layouts, case.recorded, "", meeting)
    found = run_ranks(ranks, gradients, *ours, timeout=500)[0]
    assert len(found) == sum(map(len, meeting))
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
        ("expert", "dapo", {"expert": 2, "micro_batch_tokens": 100}),
        ("expert sum", "dapo", {"expert": 2, "micro_batch_tokens": 100}),
        ("balance", "balanced", {"expert": 2, "micro_batch_tokens": 100}),
    ],
)
def test_what_is_left_out_turns_it_red(
    cases: Callable[[str], Case], broken: str, objective: str, layout: dict[str, Any]
) -> None:
    case = cases(EXPERTS if "expert" in layout else SHALLOW)
    configs, layouts = {objective: case.configs[objective]}, [(layout, 0, FUSED)]
    found = run_ranks(2, gradients, case.reference, configs, layouts, case.recorded, broken)[0]
    for steps in found.values():
        pairs = zip(steps, case.expected[objective], strict=True)
        assert min(distance(ours, theirs) for ours, theirs in pairs) > 0.05
