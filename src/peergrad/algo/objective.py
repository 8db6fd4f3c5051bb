"""The loss of one micro-batch, put together from the pieces."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from peergrad.algo import correction as corr
from peergrad.algo import surrogate as sur
from peergrad.algo.kl import Kl, estimate_kl
from peergrad.algo.packing import MicroBatch
from peergrad.config import (
    SEQUENCE_RATIO,
    AlgoConfig,
    CorrectionKind,
    CorrectionLevel,
    KlPlace,
    SurrogateKind,
)

Metrics = dict[str, tuple[Tensor, Tensor | int]]
"""Name -> (sum as a float64 scalar, count): both add up over micro-batches and ranks, and the mean
is taken at the end. Count 0 marks a quantity that is a sum itself. Left on the device: reading a
value here would stall the GPU once per micro-batch."""


@dataclass(frozen=True)
class Objective:
    """``loss = sum_s weight_s * (c_s * surrogate_s + kl.coef * kl_s - entropy_coef * entropy_s)``

    over the kept tokens, c the correction's weight: a plain sum over everything an optimizer step
    sees. ``tools/explain.py`` prints the formula with the numbers in it.
    """

    algo: AlgoConfig

    def __call__(
        self, logp: Float[Tensor, " S"], entropy: Float[Tensor, " S"], batch: MicroBatch
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """Loss (differentiable in ``logp`` and ``entropy``) and metrics of one micro-batch.

        Without ``batch.logp_old`` the old policy is the present one: its logprobs are this
        forward's own and the ratio is exactly 1; with ``batch.proximal`` it lies between that and
        the engine's.
        """
        algo = self.algo
        factor, keep, metrics = self._correct(logp.detach(), _old(logp, batch), batch)
        if keep is not None:  # before anything is computed: 0 times infinity is no number
            logp, entropy, batch = _without(logp, entropy, batch, keep)
        count: Tensor | int = logp.numel() if keep is None else keep.sum()
        log_ratio = self._log_ratio(logp, _old(logp, batch), batch)
        surrogate = self._surrogate(logp, log_ratio, batch.advantage)
        policy = surrogate.loss if factor is None else factor * surrogate.loss
        per_token = policy
        metrics |= {
            "loss/policy": (_total(policy * batch.weight), 0),
            "policy/clip_low": (_total(surrogate.low), count),
            "policy/clip_high": (_total(surrogate.high), count),
            "policy/ratio": (_total(_of_kept(log_ratio.detach().exp(), keep)), count),
            "policy/entropy": (_total(entropy), count),
        }
        if algo.kl.coef > 0 and algo.kl.place is KlPlace.loss:
            kl = self._kl(logp, batch)
            per_token = per_token + algo.kl.coef * kl.value
            metrics["policy/kl"] = (_total(kl.value), count)
            if algo.kl.clamp is not None or algo.kl.clamp_log_ratio is not None:
                metrics["policy/kl_clamped"] = (_total(kl.clamped), count)
        if algo.entropy_coef > 0:
            per_token = per_token - algo.entropy_coef * entropy
        loss = (per_token * batch.weight).sum()
        metrics["loss/total"] = (_total(loss), 0)
        return loss, metrics

    @property
    def per_token(self) -> bool:
        """Whether a token's loss depends on no other token, so that a micro-batch may be given in
        parts, whose losses and metrics add up."""
        correction = self.algo.correction
        whole = correction.opsm is not None or (
            correction.kind not in (CorrectionKind.none, CorrectionKind.icepop)
            and (
                correction.kind is CorrectionKind.seq_mask_tis
                or correction.level is not CorrectionLevel.token
            )
        )
        return self.algo.surrogate.kind not in SEQUENCE_RATIO and not whole

    def refusal(self, metrics: dict[str, float]) -> str | None:
        """Why an optimizer step with these metrics must not be made; None if it may."""
        limit = self.algo.surrogate.max_mean_ratio
        if limit is not None and not metrics["policy/ratio"] <= limit:
            return f"mean ratio {metrics['policy/ratio']:.3g} > max_mean_ratio {limit}"
        return None

    def kept(self, logp: Float[Tensor, " S"], batch: MicroBatch) -> Bool[Tensor, " S"]:
        """Which tokens the correction keeps, with ``logp`` the present policy's."""
        keep = self._correct(logp, _old(logp, batch), batch)[1]
        return torch.ones_like(logp, dtype=torch.bool) if keep is None else keep

    def _correct(
        self, logp: Tensor, logp_old: Tensor, batch: MicroBatch
    ) -> tuple[Tensor | None, Tensor | None, Metrics]:
        """(weight of the surrogate, tokens kept, metrics); None where nothing is changed."""
        config = self.algo.correction
        factor, keeps = self._weigh(logp_old - batch.logp_engine, batch)
        if config.dppo is not None:
            keeps.append(
                corr.dppo_keep(logp, batch.logp_engine, batch.advantage, bound=config.dppo)
            )
        if config.opsm is not None:
            keeps.append(
                corr.opsm_keep(
                    logp,
                    logp_old,
                    batch.advantage,
                    batch.sequence,
                    batch.sequences,
                    delta=config.opsm,
                )
            )
        keep = torch.stack(keeps).all(0) if keeps else None
        metrics: Metrics = {}
        if factor is not None:
            factor = _of_kept(factor, keep)
            metrics["correction/weight"] = (_total(factor), factor.numel())
        if keep is not None:
            metrics["correction/dropped"] = (_total(~keep), keep.numel())
        return factor, keep, metrics

    def _weigh(self, log_k: Tensor, batch: MicroBatch) -> tuple[Tensor | None, list[Tensor]]:
        config, token = self.algo.correction, CorrectionLevel.token
        low, high = config.bounds
        sequence, sequences = batch.sequence, batch.sequences
        if config.kind is CorrectionKind.none:
            return None, []
        if config.kind is CorrectionKind.seq_mask_tis:
            factor, keep = corr.sequence_masked(log_k, sequence, sequences, low=low, high=high)
            return factor, [keep]
        level = token if config.kind is CorrectionKind.icepop else config.level
        log_k = corr.at_level(log_k, sequence, sequences, level)
        if config.kind is CorrectionKind.tis:
            return corr.truncated(log_k, low=low, high=high), []
        factor, keep = corr.masked(log_k, low=low, high=high)
        return factor, [keep]

    def _log_ratio(self, logp: Tensor, logp_old: Tensor, batch: MicroBatch) -> Tensor:
        config = self.algo.surrogate
        log_ratio = sur.clip_log_ratio(
            logp - logp_old, low=config.log_ratio_low, high=config.log_ratio_high
        )
        if config.kind is SurrogateKind.gspo:
            return sur.sequence_mean(log_ratio, batch.sequence, batch.sequences)
        if config.kind is SurrogateKind.gspo_token:
            return sur.sequence_token_log_ratio(log_ratio, batch.sequence, batch.sequences)
        return log_ratio

    def _surrogate(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor) -> sur.Clipped:
        config = self.algo.surrogate
        clips = {"clip_low": config.clip_low, "clip_high": config.clip_high}
        if config.kind is SurrogateKind.reinforce:
            return sur.reinforce(logp, advantage)
        if config.kind is SurrogateKind.cispo:
            return sur.cispo(logp, log_ratio, advantage, **clips, unified_mask=config.unified_mask)
        if config.kind is SurrogateKind.sapo:
            return sur.sapo(
                log_ratio,
                advantage,
                tau_positive=config.tau_positive,
                tau_negative=config.tau_negative,
            )
        if config.kind is SurrogateKind.icepop:
            return sur.icepop_ratio(log_ratio, advantage, **clips)
        return sur.clipped_ratio(log_ratio, advantage, **clips, dual_clip=config.dual_clip)

    def _kl(self, logp: Tensor, batch: MicroBatch) -> Kl:
        assert batch.logp_ref is not None, "a KL coefficient needs reference logprobs"
        config = self.algo.kl
        return estimate_kl(
            logp,
            batch.logp_ref,
            config.estimator,
            clamp_log_ratio=config.clamp_log_ratio,
            clamp=config.clamp,
        )


def _old(logp: Tensor, batch: MicroBatch) -> Tensor:
    """The old policy's logprobs, constant."""
    if batch.logp_old is not None:
        return batch.logp_old
    if batch.proximal is not None:  # log-linear by version: AReaL's approximation
        return batch.logp_engine + batch.proximal * (logp.detach() - batch.logp_engine)
    return logp.detach()


def _without(
    logp: Tensor, entropy: Tensor, batch: MicroBatch, keep: Tensor
) -> tuple[Tensor, Tensor, MicroBatch]:
    """The micro-batch with every number of the dropped tokens 0, their weight among them. The one
    place where tokens are dropped inside the loss."""

    def only(values: Tensor) -> Tensor:
        return torch.where(keep, values, 0.0)

    kept = replace(
        batch,
        advantage=only(batch.advantage),
        weight=only(batch.weight),
        logp_engine=only(batch.logp_engine),
        logp_old=None if batch.logp_old is None else only(batch.logp_old),
        logp_ref=None if batch.logp_ref is None else only(batch.logp_ref),
    )
    return only(logp), only(entropy), kept


def _of_kept(values: Tensor, keep: Tensor | None) -> Tensor:
    return values if keep is None else torch.where(keep, values, 0.0)


def _total(values: Tensor) -> Tensor:
    return values.detach().sum(dtype=torch.float64)
