"""From a step's rewards to the advantage of every token, and what is not to be learned from."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from peergrad.algo import advantage as adv
from peergrad.algo.correction import m2po_keep
from peergrad.algo.kl import estimate_kl
from peergrad.algo.samples import Sample, pieces
from peergrad.algo.sampling import selects
from peergrad.algo.shaping import (
    Moments,
    adapted_coef,
    discounted_sum,
    overlong_penalty,
    shape_reward,
)
from peergrad.config import LARGEST_REWARD, AlgoConfig, KlPlace, Level, TokenLevel, require
from peergrad.data import Group


@dataclass(frozen=True)
class AlgoState:
    """What the objective remembers from step to step; part of every checkpoint."""

    kl_coef: float  # moves with algo.kl.target
    rewards: Moments = field(default_factory=Moments)
    reference_step: int = 0  # the reference is the policy after this step; 0: as configured

    def to_json(self) -> dict[str, object]:
        return {**vars(self), "rewards": vars(self.rewards)}

    @staticmethod
    def from_json(record: dict[str, object]) -> "AlgoState":
        rewards = Moments(**record["rewards"])  # type: ignore[arg-type]
        return AlgoState(**{**record, "rewards": rewards})  # type: ignore[arg-type]


def grade(
    groups: Sequence[Group],
    samples: Sequence[Sample],
    algo: AlgoConfig,
    state: AlgoState,
    *,
    max_tokens: int,
) -> tuple[list[Sample], AlgoState, dict[str, float]]:
    """Give every answer token its advantage, and weight 0 to what is not to be learned from.

    ``groups`` and ``samples`` are everything that a step trains on, over all ranks. In order:
    shaping of the rewards; mean and standard deviation of groups, batch or run; KL in the reward
    and discount; whitening over tokens; clip. Returns the samples, the state for the next step and
    metrics. Raises ValueError for a reward beyond what rewards may be: a record may hold one.
    """
    _check_rewards(groups)
    rewards = torch.from_numpy(np.concatenate([g.rewards for g in groups])).double()
    lengths = torch.tensor([s.logp_engine.size for s in samples])
    cut = np.array([r.finish == "length" for g in groups for r in g.rollouts])
    shaped = _shape(rewards, lengths, algo, max_tokens)
    state = replace(state, rewards=state.rewards.merge(shaped))
    of = torch.tensor([s.group for s in samples])
    per_answer = _per_answer(shaped, of, algo, state.rewards)
    per_token, kl = _credit(per_answer, samples, lengths, algo, state.kl_coef)
    keep = _keep(groups, samples, lengths, cut, algo)
    per_token = _whiten(per_token, of, lengths, keep, algo)
    if algo.advantage.clip is not None:
        per_token = adv.clip_advantage(per_token, algo.advantage.clip)
    rows = (_split(x, lengths) for x in (per_token, keep))
    graded = [
        s.having(advantage=advantage, weight=weight)
        for s, advantage, weight in zip(samples, *rows, strict=True)
    ]
    metrics = {"reward/shaped": float(shaped.mean()), "sampling/kept": _mean(keep)}
    if kl is not None:
        metrics |= {"policy/kl_reward": kl, "policy/kl_coef": state.kl_coef}
        if algo.kl.target is not None:
            state = replace(
                state,
                kl_coef=adapted_coef(
                    state.kl_coef,
                    kl,
                    target=algo.kl.target,
                    horizon=algo.kl.horizon,
                    rollouts=len(samples),
                ),
            )
    return graded, state, metrics


def _check_rewards(groups: Sequence[Group]) -> None:
    """Squares of huge rewards overflow, and every advantage is NaN or 0."""
    for group in groups:
        bad = group.rewards[~(np.abs(group.rewards) <= LARGEST_REWARD)]
        require(
            not bad.size,
            "reward",
            float(bad[0]) if bad.size else 0.0,
            f"of an answer of group {group.id} must be at most {LARGEST_REWARD:g} in size",
            "scale the rewards down, or use another recording",
        )


def _shape(rewards: Tensor, lengths: Tensor, algo: AlgoConfig, max_tokens: int) -> Tensor:
    shaping = algo.shaping
    if shaping.overlong_tokens:
        rewards = rewards + overlong_penalty(
            lengths,
            max_tokens=max_tokens,
            cache=shaping.overlong_tokens,
            factor=shaping.overlong_factor,
        )
    return shape_reward(rewards, bias=shaping.bias, scale=shaping.scale, clip=shaping.clip)


def _per_answer(reward: Tensor, group: Tensor, algo: AlgoConfig, running: Moments) -> Tensor:
    """Mean and standard deviation, each of its own level."""
    config = algo.advantage
    sets = {Level.group: group, Level.batch: torch.zeros_like(group)}
    value = reward
    if config.mean is Level.running:
        value = adv.running_centre(value, running)
    elif config.mean is not Level.none:
        value = adv.centre(value, sets[config.mean], leave_one_out=config.leave_one_out)
    unbiased, eps = config.unbiased, config.eps
    if config.std is Level.running:
        value = adv.running_divide(value, running, unbiased=unbiased, eps=eps)
    elif config.std is not Level.none:
        value = adv.divide_by_std(value, reward, sets[config.std], unbiased=unbiased, eps=eps)
    return value


def _credit(
    per_answer: Tensor,
    samples: Sequence[Sample],
    lengths: Tensor,
    algo: AlgoConfig,
    kl_coef: float,
) -> tuple[Tensor, float | None]:
    """Advantage per token, all answers in a row, and the mean KL if it is in the reward."""
    in_reward = algo.kl.coef > 0 and algo.kl.place is KlPlace.reward
    if not in_reward and algo.shaping.discount == 1:
        return per_answer.repeat_interleave(lengths), None
    parts, kls = [per_answer.new_zeros(0)], [per_answer.new_zeros(0)]
    for outcome, sample in zip(per_answer, samples, strict=True):
        reward = torch.zeros(sample.logp_engine.size, dtype=torch.float64)
        if reward.numel():
            reward[-1] = outcome
        if in_reward:
            kl = _reward_kl(sample, algo)
            kls.append(kl)
            reward = reward - kl_coef * kl
        parts.append(discounted_sum(reward, discount=algo.shaping.discount))
    return torch.cat(parts), _mean(torch.cat(kls)) if in_reward else None


def _reward_kl(sample: Sample, algo: AlgoConfig) -> Tensor:
    """KL per token of the policy that the step starts from (or, where only the engine's logprobs
    are known, that sampled) against the reference."""
    assert sample.logp_ref is not None, "a KL in the reward needs reference logprobs"
    pair = (sample.logp_before, sample.logp_ref)
    logp, logp_ref = (torch.from_numpy(x).double() for x in pair)
    return estimate_kl(
        logp,
        logp_ref,
        algo.kl.estimator,
        clamp_log_ratio=algo.kl.clamp_log_ratio,
        clamp=algo.kl.clamp,
    ).value


def _keep(
    groups: Sequence[Group],
    samples: Sequence[Sample],
    lengths: Tensor,
    cut: np.ndarray,
    algo: AlgoConfig,
) -> Tensor:
    """Whether each token is trained on, all answers in a row."""
    good = np.array([selects(group.rewards, algo.sampling) for group in groups])
    answers = good[[s.group for s in samples]]
    if algo.shaping.overlong_filter:
        answers &= ~cut
    keep = torch.from_numpy(answers).repeat_interleave(lengths)
    if algo.correction.m2po is not None:
        log_k = np.concatenate([_old(s) - s.logp_engine for s in samples])
        mine = keep.clone()
        keep[mine] = m2po_keep(torch.from_numpy(log_k)[mine], threshold=algo.correction.m2po)
    return keep


def _old(sample: Sample) -> np.ndarray:
    assert sample.logp_old is not None, "m2po needs the old policy's logprobs"
    return sample.logp_old


def _whiten(
    value: Tensor, group: Tensor, lengths: Tensor, keep: Tensor, algo: AlgoConfig
) -> Tensor:
    """Mean and standard deviation over the kept tokens of groups or batch; others get 0."""
    config = algo.advantage
    if config.token_mean is TokenLevel.none and config.token_std is TokenLevel.none:
        return value
    whole = group.repeat_interleave(lengths)[keep]
    sets = {TokenLevel.group: whole, TokenLevel.batch: torch.zeros_like(whole)}
    white = kept = value[keep]
    if config.token_mean is not TokenLevel.none:
        white = adv.centre(white, sets[config.token_mean])
    if config.token_std is not TokenLevel.none:
        white = adv.divide_by_std(
            white,
            kept,
            sets[config.token_std],
            unbiased=config.unbiased_over_tokens,
            eps=config.token_eps,
        )
    return torch.zeros_like(value).masked_scatter(keep, white)


def _split(values: Tensor, lengths: Tensor) -> Sequence[np.ndarray]:
    """Float32, a part for each length. In NumPy: a thousand tensors take far longer."""
    return pieces(values.float().numpy(), lengths.tolist())


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else 0.0
