"""What matrix products in 8 bits change of the policy's logprobs, measured while it learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from peergrad.algo.samples import Sample
from peergrad.config import Config, Fp8

if TYPE_CHECKING:
    from peergrad.parallel.policy import Policy

SAMPLES = 64
"""Scored in both ways at a time, at most."""


class Rounding:
    """The last measurement: ``mean`` of ``|difference|`` and ``rms``, nats a token; 0 of a policy
    whose logprobs are not taken in 8 bits."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.mean = self.rms = 0.0
        self._measured = False  # not since this process started

    def measure(self, policy: Policy, samples: Sequence[Sample], *, step: int) -> dict[str, float]:
        """Score some samples with the same weights in 8 bits and in bfloat16, every
        ``parallel.fp8_gap_every`` steps; nothing in between. Collective.

        ``logprob_gap/fp8`` is the mean of ``|difference|``, ``fp8_rms`` its root mean square, and
        ``fp8_share`` the part of the energy (sum of squares) of the gap to the engine that is gone
        in bfloat16; negative if it grows, as where the engine computes in 8 bits, too.
        """
        parallel = self._config.parallel
        if parallel.fp8 is Fp8.off or not parallel.fp8_gap_every:
            return {}
        if self._measured and step % parallel.fp8_gap_every:
            return {}
        random = np.random.default_rng((self._config.run.seed, step))
        chosen = random.permutation(len(samples))[:SAMPLES]
        some = [samples[i] for i in sorted(chosen)]
        ways = [policy.score(some, in_8_bits=way).logp for way in (True, False)]
        eight, plain = (
            np.concatenate([x[s.scored] for x, s in zip(logp, some, strict=True)]).astype(float)
            for logp in ways
        )
        if not eight.size:
            return {}
        self._measured = True
        engine = np.concatenate([s.logp_engine[s.scored] for s in some]).astype(float)
        difference, gap = eight - plain, float(np.square(eight - engine).sum())
        mean, rms = float(np.abs(difference).mean()), float(np.sqrt(np.square(difference).mean()))
        if parallel.fp8_score:
            self.mean, self.rms = mean, rms
        share = 1 - float(np.square(plain - engine).sum()) / gap if gap else 0.0
        row = {"fp8": mean, "fp8_rms": rms, "fp8_share": share}
        return {f"logprob_gap/{key}": value for key, value in row.items()}
