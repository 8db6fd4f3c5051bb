"""Every preset's objective written out again: loops, float64, one process, nothing shared with the
package but the configuration that says which formula is meant."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from peergrad.config import AlgoConfig
from peergrad.data import Group

Rows = Sequence[Tensor]  # one [R] float64 tensor per rollout, groups in order


def losses(
    groups: Sequence[Group],
    algo: AlgoConfig,
    *,
    max_tokens: int,
    logp: Rows,
    entropy: Rows,
    logp_old: Rows,
    logp_ref: Rows,
) -> list[Tensor]:
    """The loss of each optimizer step of one pass."""
    rollouts = [(g, r) for g, group in enumerate(groups) for r in group.rollouts]
    keep = [_kept(groups[g], r, algo) for g, r in rollouts]
    advantages = _advantages(groups, rollouts, keep, algo, max_tokens, logp_old, logp_ref)
    engine = [torch.from_numpy(r.logprobs).double() for _, r in rollouts]
    found = []
    for part in np.array_split(np.arange(len(groups)), algo.minibatches):
        rows = [i for i, (g, _) in enumerate(rollouts) if g in part]
        masks, terms = {}, {}
        for i in rows:
            mask, terms[i] = _tokens(
                algo, advantages[i], logp[i], entropy[i], logp_old[i], logp_ref[i], engine[i]
            )
            masks[i] = [keep[i] and m for m in mask]
        total = torch.zeros((), dtype=torch.float64)
        for i in rows:
            for t, kept in enumerate(masks[i]):
                if kept:
                    total = total + terms[i][t] / _denominator(
                        i, rows, rollouts, masks, algo, max_tokens
                    )
        found.append(total)
    return found


def _kept(group: Group, rollout, algo: AlgoConfig) -> bool:
    rewards = [r.reward for r in group.rollouts]
    drop_flat = algo.sampling.dynamic or algo.sampling.flat_groups.name == "drop"
    if drop_flat and min(rewards) == max(rewards):
        return False
    return not (algo.shaping.overlong_filter and rollout.finish == "length")


def _denominator(i, rows, rollouts, masks, algo: AlgoConfig, max_tokens: int) -> float:
    def count(j: int) -> int:
        return sum(masks[j]) if algo.denominator.name == "kept" else len(masks[j])

    counted = [j for j in rows if count(j)]  # an answer without a token counts nowhere
    mode = algo.aggregation.name
    if mode == "token_mean":
        return sum(count(j) for j in rows)
    if mode == "group_token_mean":
        mine = sum(count(j) for j in rows if rollouts[j][0] == rollouts[i][0])
        return mine * len({rollouts[j][0] for j in counted})
    per_answer = {
        "seq_mean_token_mean": count(i),
        "seq_mean_token_sum": 1,
        "token_sum_const": max_tokens,
    }
    return per_answer[mode] * len(counted)


def _std(values: list[float], unbiased: bool) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - unbiased))


def _advantages(groups, rollouts, keep, algo: AlgoConfig, max_tokens, logp_old, logp_ref):
    config, shaping = algo.advantage, algo.shaping
    shaped: list[list[float]] = []
    for group in groups:
        row = []
        for r in group.rollouts:
            value = r.reward
            if shaping.overlong_tokens:
                over = r.tokens.size - (max_tokens - shaping.overlong_tokens)
                value -= shaping.overlong_factor * max(0, over) / shaping.overlong_tokens
            value = (value + shaping.bias) * shaping.scale
            row.append(
                value if shaping.clip is None else max(-shaping.clip, min(shaping.clip, value))
            )
        shaped.append(row)
    tokens: list[list[float]] = []
    flat = [value for row in shaped for value in row]
    for i, (g, r) in enumerate(rollouts):
        peers, mine = shaped[g], flat[i]
        value = mine
        if config.leave_one_out:
            value -= (sum(peers) - mine) / (len(peers) - 1)
        elif config.mean.name == "group":
            value -= sum(peers) / len(peers)
        if config.std.name == "group":
            same = min(peers) == max(peers)
            value = 0.0 if same else value / (_std(peers, config.unbiased) + config.eps)
        row = []
        for t in range(r.tokens.size):
            credit = value * shaping.discount ** (r.tokens.size - 1 - t)
            if algo.kl.coef and algo.kl.place.name == "reward":
                for u in range(t, r.tokens.size):
                    d = float(logp_old[i][u] - logp_ref[i][u])
                    kl = {"k1": d, "k2": d * d / 2}[algo.kl.estimator.name]
                    credit -= algo.kl.coef * kl * shaping.discount ** (u - t)
            row.append(credit)
        tokens.append(row)
    kept = [a for row, k in zip(tokens, keep, strict=True) if k for a in row]
    if config.token_mean.name == config.token_std.name == "batch":
        mean, scale = (
            sum(kept) / len(kept),
            _std(kept, config.unbiased_over_tokens) + config.token_eps,
        )
        tokens = [[(a - mean) / scale for a in row] for row in tokens]
    if config.clip is not None:
        tokens = [[max(-config.clip, min(config.clip, a)) for a in row] for row in tokens]
    return tokens


def _tokens(algo: AlgoConfig, advantage, logp, entropy, old, ref, engine):
    """(which tokens the correction keeps, loss of each token) of one rollout."""
    size, correction = len(advantage), algo.correction
    k = [math.exp(float(old[t] - engine[t])) for t in range(size)]
    geometric = math.exp(sum(math.log(x) for x in k) / max(1, size))
    weight, mask = [1.0] * size, [True] * size
    kind, level = correction.kind.name, correction.level.name
    if kind != "none":
        low, high = correction.bounds
        of = {"token": k, "geometric": [geometric] * size, "sequence": [geometric**size] * size}
        seen = {"seq_mask_tis": of["geometric"], "icepop": k}.get(kind, of[level])
        if kind == "tis":
            weight = [min(max(x, low), high) for x in seen]
        else:
            mask = [low <= x <= high for x in seen]
            weight = k if kind == "seq_mask_tis" else seen
    if correction.dppo is not None:
        for t in range(size):
            moved = math.exp(float(logp[t].detach())) - math.exp(float(engine[t]))
            if moved * np.sign(advantage[t]) > correction.dppo:
                mask[t] = False
    losses = []
    mean = sum((logp[t] - old[t] for t in range(size)), start=torch.zeros((), dtype=torch.float64))
    for t in range(size):
        losses.append(
            weight[t] * _surrogate(algo, advantage[t], logp[t], logp[t] - old[t], mean / size)
            + _kl(algo, logp[t] - ref[t])
            - algo.entropy_coef * entropy[t]
        )
    return mask, losses


def _surrogate(algo: AlgoConfig, a: float, logp: Tensor, token: Tensor, sequence: Tensor) -> Tensor:
    config = algo.surrogate
    kind = config.kind.name
    if kind == "gspo_token":
        rho = (sequence.detach() + token - token.detach()).exp()
    else:
        rho = (sequence if kind == "gspo" else token).exp()
    low, high = 1 - config.clip_low, 1 + config.clip_high
    if kind == "cispo":
        return -rho.detach().clamp(max(low, 0), high) * a * logp
    if kind == "sapo":
        tau = config.tau_positive if a > 0 else config.tau_negative
        return -a * 4 / tau * torch.sigmoid(tau * (rho - 1))
    loss = -torch.minimum(rho * a, rho.clamp(low, high) * a)
    if config.dual_clip is not None and a < 0:
        loss = torch.minimum(loss, torch.tensor(-config.dual_clip * a, dtype=torch.float64))
    return loss


def _kl(algo: AlgoConfig, d: Tensor) -> Tensor | float:
    if algo.kl.coef == 0 or algo.kl.place.name == "reward":
        return 0.0
    value = {"k2": d**2 / 2, "k3": (-d).exp() + d - 1}[algo.kl.estimator.name]
    return algo.kl.coef * (value if algo.kl.clamp is None else value.clamp(max=algo.kl.clamp))
