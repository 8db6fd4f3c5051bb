"""What 8 bits change, from the two ways in which a policy scores the same samples."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from peergrad.algo.samples import Sample
from peergrad.config import Config, Fp8
from peergrad.rounding import SAMPLES, Rounding


def sample(engine: tuple[float, ...]) -> Sample:
    """A prompt of one token and an answer of which all but the last token are scored."""
    size = len(engine)
    weight = np.append(np.ones(size - 1, np.float32), np.float32(0))
    values = np.array(engine, np.float32)
    tokens, version = np.arange(size + 1, dtype=np.int32), np.zeros(size, np.int32)
    return Sample(tokens, 1, values, np.ones(size, np.float32), weight, version)


def policy(eight: float, plain: float, asked: list[int]) -> Any:
    """Off the engine by so many nats in 8 bits, and by so many in bfloat16."""

    def score(samples: list[Sample], *, in_8_bits: bool) -> Any:
        asked.append(len(samples))
        off = np.float32(eight if in_8_bits else plain)
        return SimpleNamespace(logp=[s.logp_engine + off for s in samples])

    return SimpleNamespace(score=score)


def config(**parallel: Any) -> Config:
    found = Config()
    vars(found.parallel).update({"fp8": Fp8.blockwise, **parallel})
    return found


def test_the_share_of_the_gap_that_is_gone_in_bfloat16() -> None:
    asked: list[int] = []
    rounding = Rounding(config())
    row = rounding.measure(policy(0.5, 0.25, asked), [sample((-1, -2, -3))], step=3)
    # Of each token 0.25 between the two; energies 0.25 and 0.0625: three quarters are gone.
    assert row == pytest.approx(
        {"logprob_gap/fp8": 0.25, "logprob_gap/fp8_rms": 0.25, "logprob_gap/fp8_share": 0.75}
    )
    assert (rounding.mean, rounding.rms) == pytest.approx((0.25, 0.25)) and asked == [1, 1]
    row = Rounding(config()).measure(policy(0.25, 0.5, []), [sample((-1, -2))], step=1)
    assert row["logprob_gap/fp8_share"] == pytest.approx(-3)  # an engine in 8 bits
    row = Rounding(config()).measure(policy(0.0, 0.5, []), [sample((-1, -2))], step=1)
    assert row["logprob_gap/fp8_share"] == 0


def test_it_is_measured_first_and_then_by_schedule() -> None:
    asked: list[int] = []
    rounding, many = Rounding(config(fp8_gap_every=4)), [sample((-1, -1))] * (SAMPLES + 9)
    measured = [
        step for step in range(6, 14) if rounding.measure(policy(1, 0, asked), many, step=step)
    ]
    assert measured == [6, 8, 12] and set(asked) == {SAMPLES}


@pytest.mark.parametrize("parallel", [{"fp8": Fp8.off}, {"fp8_gap_every": 0}])
def test_nothing_is_measured_of_others(parallel: dict[str, Any]) -> None:
    rounding = Rounding(config(**parallel))
    assert rounding.measure(None, [sample((-1, -1))], step=1) == {}  # type: ignore[arg-type]
    assert (rounding.mean, rounding.rms) == (0, 0)


def test_a_sample_without_scored_tokens_says_nothing() -> None:
    rounding = Rounding(config())
    assert rounding.measure(policy(1, 0, []), [sample((-1,))], step=1) == {}
    assert rounding.measure(policy(1, 0, []), [sample((-1, -1))], step=2) != {}


def test_logprobs_that_are_taken_in_bfloat16_have_no_such_rounding() -> None:
    rounding = Rounding(config(fp8_score=False))
    assert rounding.measure(policy(1, 0, []), [sample((-1, -1))], step=1)["logprob_gap/fp8"] == 1
    assert (rounding.mean, rounding.rms) == (0, 0)
