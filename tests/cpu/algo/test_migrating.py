"""Other trainers' formulas, written out, against the keys that docs/migrating.md gives for them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from peergrad.algo.grading import AlgoState, grade
from peergrad.algo.kl import estimate_kl
from peergrad.algo.objective import Objective
from peergrad.algo.packing import pack
from peergrad.algo.plan import make_plan
from peergrad.algo.samples import make_samples, with_logp
from peergrad.config import AlgoConfig, Config, KlEstimator, RolloutConfig
from peergrad.data import Group, Prompt, Rollout
from peergrad.learning import learn, old_policy
from peergrad.running.preset import read_preset

MAX_TOKENS = 12


@dataclass(frozen=True)
class Data:
    """Two groups of four answers, one of them cut off; logprobs row by row, float64."""

    groups: list[Group]
    rewards: Tensor  # [B]
    now: list[Tensor]
    old: list[Tensor]
    engine: list[Tensor]

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([row.numel() for row in self.now], dtype=torch.float64)


def data() -> Data:
    rng = np.random.default_rng(3)
    groups, rows, rewards = [], {"now": [], "old": [], "engine": []}, []
    for g in range(2):
        rollouts = []
        for i in range(4):
            n = int(rng.integers(2, 9))
            now = -rng.uniform(0.05, 2.5, n)
            old, engine = now + rng.normal(0, 0.4, n), now + rng.normal(0, 0.6, n)
            for name, row in (("now", now), ("old", old), ("engine", engine)):
                rows[name].append(torch.from_numpy(row.astype(np.float32)).double())
            reward = [0.0, 1.0, 0.25, -1.0, 1.0, 1.0, 0.0, 0.5][4 * g + i]
            rewards.append(reward)
            finish = "length" if (g, i) == (1, 2) else "stop"
            tokens = np.full(n, 7, np.int32)
            spans = ((0, 0, n),)
            rollouts.append(Rollout(tokens, engine.astype(np.float32), spans, finish, "", reward))
        prompt = Prompt(str(g), np.array([3], np.int32), "", "")
        groups.append(Group(str(g), prompt, tuple(rollouts)))
    return Data(groups, torch.tensor(rewards, dtype=torch.float64), **rows)


def config(keys: str = "", preset: str | None = None) -> Config:
    """The keys as the document writes them, over the defaults without a KL, or over a preset."""
    base = read_preset(preset) if preset else OmegaConf.structured(AlgoConfig)
    own = ["kl.coef=0"] if preset is None and "kl.coef" not in keys else []
    algo = OmegaConf.to_object(OmegaConf.merge(base, OmegaConf.from_dotlist([*own, *keys.split()])))
    assert isinstance(algo, AlgoConfig)
    return Config(algo=algo, rollout=RolloutConfig(max_new_tokens=MAX_TOKENS))


class Policy:
    """Recorded logprobs; keeps the gradient of the one update, a slope per token."""

    def __init__(self, given: Data) -> None:
        self.given = given
        self.slopes: list[Tensor] = []

    def score(self, samples: Any, **_: Any) -> Any:
        return SimpleNamespace(logp=[row.float().numpy() for row in self.given.old])

    def update(self, samples: Any, objective: Objective) -> None:
        flat = torch.cat([x[s.scored] for x, s in zip(self.given.now, samples, strict=True)])
        leaf = flat.clone().requires_grad_()
        batch = pack(samples)
        wide = {
            k: v.double()
            for k, v in vars(batch).items()
            if torch.is_tensor(v) and v.is_floating_point()
        }
        loss, _ = objective(leaf, torch.zeros_like(leaf), type(batch)(**{**vars(batch), **wide}))
        loss.backward()
        assert leaf.grad is not None
        parts = iter(torch.split(leaf.grad, [s.scored.size for s in samples]))
        for sample in samples:
            slope = torch.zeros(sample.logp_engine.size, dtype=torch.float64)
            slope[torch.from_numpy(sample.scored)] = next(parts)
            self.slopes.append(slope)


def ours(given: Data, chosen: Config) -> tuple[list[Tensor], list[Tensor]]:
    """(advantages, gradient of the loss by logprob), row by row. More than one optimizer step's
    old policy is recorded, so that a plan without a pass gets it as well."""
    policy: Any = Policy(given)
    plan = make_plan(chosen)
    samples, _ = old_policy(make_samples(given.groups), plan, policy, version=0)
    if samples[0].logp_old is None:
        samples = with_logp(samples, "logp_old", policy.score(samples).logp)
    state = AlgoState(0.0)
    graded, _, _ = grade(given.groups, samples, chosen.algo, state, max_tokens=MAX_TOKENS)
    learn(chosen, plan, Objective(chosen.algo), policy, graded, step=1)
    return [torch.from_numpy(s.advantage).double() for s in graded], policy.slopes


def gradient(given: Data, loss: Callable[[list[Tensor]], Tensor]) -> list[Tensor]:
    leaves = [row.clone().requires_grad_() for row in given.now]
    loss(leaves).backward()
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def same(a: list[Tensor], b: list[Tensor], rel: float = 1e-5) -> None:
    for left, right in zip(a, b, strict=True):
        assert left.tolist() == pytest.approx(right.tolist(), rel=rel, abs=1e-6)


def grouped(values: Tensor) -> Tensor:
    return values.view(2, 4)


def spread(given: Data, values: Tensor) -> list[Tensor]:
    return [v.expand(row.numel()) for v, row in zip(values, given.now, strict=True)]


def normalised(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """(r - mean) / (std + eps) of each group, over n - 1."""
    r = grouped(rewards)
    return ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + eps)).flatten()


# --- advantages ----------------------------------------------------------------------------------


def areal(rewards: Tensor, *, leave_one_out: bool, std: bool) -> Tensor:
    """AReaL's ``Normalization`` at group level: the deviation is that from the chosen mean."""
    found = []
    for r in grouped(rewards):
        others = torch.stack([torch.cat([r[:i], r[i + 1 :]]).mean() for i in range(4)])
        centred = r - (others if leave_one_out else r.mean())
        deviation = (centred.square().sum() / 3).sqrt() if std else torch.tensor(1 - 1e-5)
        found.append(centred / (deviation + 1e-5))
    return torch.cat(found)


@pytest.mark.parametrize(
    ("leave_one_out", "std", "keys"),
    [
        (False, True, ""),
        (True, True, ""),  # the factor G / (G - 1) cancels
        (True, False, "advantage.std=none advantage.leave_one_out=true"),
        (False, False, "advantage.std=none"),
    ],
)
def test_areal_reward_norm(leave_one_out: bool, std: bool, keys: str) -> None:
    given = data()
    found, _ = ours(given, config(f"advantage.eps=1e-5 {keys}"))
    theirs = areal(given.rewards, leave_one_out=leave_one_out, std=std)
    same(found, spread(given, theirs), rel=3e-5)


def test_a_leave_one_out_mean_with_a_deviation_is_larger_here() -> None:
    given = data()
    found, _ = ours(given, config("advantage.eps=1e-5 advantage.leave_one_out=true"))
    theirs = areal(given.rewards, leave_one_out=True, std=True)
    same(found, spread(given, theirs * 4 / 3), rel=3e-5)


def whitened(
    values: list[Tensor], *, unbiased: bool, eps: float, inside: float = 0
) -> list[Tensor]:
    flat = torch.cat(values)
    deviation = (flat.var(correction=int(unbiased)) + inside).sqrt()
    return [(row - flat.mean()) / (deviation + eps) for row in values]


def test_rlinf_whitens_over_n() -> None:
    given = data()
    found, _ = ours(given, config("minibatches=1", "rlinf"))
    first = whitened(spread(given, normalised(given.rewards)), unbiased=True, eps=1e-5)
    same(found, whitened(first, unbiased=False, eps=1e-5), rel=3e-5)


def test_roll_whitens_over_n_minus_1_and_clips() -> None:
    given = data()
    found, _ = ours(given, config("kl.coef=0 kl.clamp=null", "roll"))
    white = whitened(spread(given, normalised(given.rewards)), unbiased=True, eps=0, inside=1e-8)
    same(found, [row.clamp(-2, 2) for row in white])


def test_verl_opo_is_the_mean_over_the_tokens_of_the_group() -> None:
    given = data()
    keys = "advantage.mean=none advantage.std=none advantage.token_mean=group"
    found, _ = ours(given, config(keys))
    weight, r = grouped(given.lengths), grouped(given.rewards)
    baseline = (weight * r).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
    same(found, spread(given, (r - baseline).flatten()))


# --- losses --------------------------------------------------------------------------------------


def test_roll_divides_by_what_is_kept() -> None:
    """Cut-off answers masked: mean over the answers that are left, of each one's mean."""
    given = data()
    chosen = config("shaping.overlong_filter=true kl.coef=0 kl.clamp=null", "roll")
    advantages, found = ours(given, chosen)
    left = [
        i for i, r in enumerate(r for g in given.groups for r in g.rollouts) if r.finish == "stop"
    ]
    assert len(left) == 7

    def loss(now: list[Tensor]) -> Tensor:
        total = []
        for i in left:
            ratio, a = (now[i] - given.old[i]).exp(), advantages[i]
            clipped = torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
            dual = torch.where(a < 0, torch.max(clipped, 1.4 * a), clipped)
            total.append(-dual.mean())
        return torch.stack(total).sum() / len(left)

    same(found, gradient(given, loss))


def test_verl_dppo_tv() -> None:
    """A constant weight of at most 20, and a mask on the difference of probabilities, both to the
    logprobs of the rollouts."""
    given = data()
    keys = (
        "surrogate.kind=cispo surrogate.clip_low=1 surrogate.clip_high=19 correction.dppo=0.1 "
        "old_policy=engine aggregation=token_mean"
    )
    advantages, found = ours(given, config(keys))
    dropped = []

    def loss(now: list[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for logp, mu, a in zip(now, given.engine, advantages, strict=True):
            weight = (logp - mu).clamp(-20, 20).exp().clamp(max=20).detach()
            moved = logp.detach().exp() - mu.exp()
            valid = torch.where(a > 0, moved <= 0.1, moved >= -0.1)
            dropped.append(~valid)
            total = total - (a * weight * logp * valid).sum()
        return total / given.lengths.sum()

    same(found, gradient(given, loss))
    assert 3 < torch.cat(dropped).sum() < 30


def test_trl_luspo() -> None:
    """``importance_sampling_level: sequence``: one loss per answer, times its length, averaged."""
    given = data()
    keys = "surrogate.kind=gspo surrogate.clip_low=0.2 surrogate.clip_high=0.2"
    advantages, found = ours(given, config(f"{keys} aggregation=seq_mean_token_sum"))

    def loss(now: list[Tensor]) -> Tensor:
        rows = []
        for logp, old, a in zip(now, given.old, advantages, strict=True):
            ratio = (logp - old).mean().exp()
            rows.append(-torch.min(ratio * a[0], ratio.clamp(0.8, 1.2) * a[0]) * a.numel())
        return torch.stack(rows).mean()

    same(found, gradient(given, loss))


def test_rlinf_behave_weight_threshold() -> None:
    """Weigh by k, mask what lies above the threshold, divide by what is left."""
    given = data()
    keys = "correction.kind=mis correction.level=token correction.high=1.5 denominator=kept"
    advantages, found = ours(given, config(f"{keys} aggregation=token_mean old_policy=recompute"))

    def loss(now: list[Tensor]) -> Tensor:
        total, count = torch.zeros((), dtype=torch.float64), 0
        for logp, old, mu, a in zip(now, given.old, given.engine, advantages, strict=True):
            k, ratio = (old - mu).exp(), (logp - old).exp()
            mask = k <= 1.5
            surrogate = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
            total, count = total + (surrogate * k * mask).sum(), count + int(mask.sum())
        assert 0 < count < given.lengths.sum()
        return total / count

    same(found, gradient(given, loss))


def test_areal_m2po_divides_by_what_is_left() -> None:
    given = data()
    keys = "correction.m2po=0.04 denominator=kept aggregation=token_mean"
    advantages, found = ours(given, config(keys))
    log_k = torch.cat([o - e for o, e in zip(given.old, given.engine, strict=True)]) ** 2
    order, cut = log_k.argsort(descending=True), 0
    while log_k[order[cut:]].mean() >= 0.04:
        cut += 1
    keep = torch.ones_like(log_k, dtype=torch.bool)
    keep[order[:cut]] = False
    rows = torch.split(keep, [row.numel() for row in given.now])

    def loss(now: list[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for logp, old, a, mask in zip(now, given.old, advantages, rows, strict=True):
            ratio = (logp - old).exp()
            total = total - (torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a) * mask).sum()
        return total / int(keep.sum())

    assert 0 < cut < log_k.numel()
    same(found, gradient(given, loss))


# --- estimates of the KL -------------------------------------------------------------------------


def test_slime_low_var_kl_holds_the_estimate_and_not_the_difference() -> None:
    logp = torch.tensor([-1.0, -2.0, -30.0, -0.5], dtype=torch.float64)
    ref = torch.tensor([-1.5, -1.0, -1.0, -12.0], dtype=torch.float64)
    found = estimate_kl(logp, ref, KlEstimator.k3, clamp_log_ratio=None, clamp=10.0).value
    back = ref - logp
    theirs = (back.exp() - 1 - back).clamp(-10, 10)
    assert found.tolist() == pytest.approx(theirs.tolist())
    assert found[3] == 10 and math.isclose(found[1], math.e - 2)


def test_verl_k3_plus_has_the_value_of_k3_and_the_gradient_of_k2() -> None:
    ref = torch.tensor([-1.5, -1.0, -3.0], dtype=torch.float64)
    mine, other = (torch.tensor([-1.0, -2.0, -2.5], dtype=torch.float64) for _ in range(2))
    mine.requires_grad_()
    other.requires_grad_()
    found = estimate_kl(mine, ref, KlEstimator.k3_unbiased, clamp_log_ratio=None, clamp=None).value
    back = ref - other
    k2, k3 = back.square() / 2, (back.exp() - back - 1).detach()
    theirs = k2 - k2.detach() + k3
    found.sum().backward()
    theirs.sum().backward()
    assert found.tolist() == pytest.approx(theirs.tolist())
    assert mine.grad is not None and other.grad is not None
    assert mine.grad.tolist() == pytest.approx(other.grad.tolist())
