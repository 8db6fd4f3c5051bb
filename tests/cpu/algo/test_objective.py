"""The whole loss against its formula, written out again token by token in float64."""

import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from peergrad.algo.objective import Grpo
from peergrad.algo.packing import MicroBatch

OBJECTIVE = Grpo(clip_low=0.2, clip_high=0.3, kl_coef=0.5)
ENTROPY = torch.tensor([1.0, 2.0, 0.5])


def new_batch(
    advantage: list[float],
    weight: list[float],
    logp_old: list[float] | None,
    logp_ref: list[float] | None,
) -> MicroBatch:
    def tensor(values: list[float] | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.float64)

    size = len(advantage)
    return MicroBatch(
        tokens=torch.zeros(size + 1, dtype=torch.int64),
        positions=torch.arange(size + 1),
        cu_seqlens=torch.tensor([0, size + 1], dtype=torch.int32),
        max_seqlen=size + 1,
        rows=torch.arange(size),
        targets=torch.zeros(size, dtype=torch.int64),
        advantage=torch.tensor(advantage, dtype=torch.float64),
        weight=torch.tensor(weight, dtype=torch.float64),
        logp_engine=torch.zeros(size, dtype=torch.float64),
        logp_old=tensor(logp_old),
        logp_ref=tensor(logp_ref),
    )


def test_three_tokens_by_hand() -> None:
    """ratios 1.5 (clipped at 1.3), .5 (not clipped: A > 0), 1; reference q = 2, 1, .5."""
    logp = [-1.0, -2.0, -0.5]
    batch = new_batch(
        advantage=[1.0, 2.0, -1.0],
        weight=[0.5, 0.25, 0.25],
        logp_old=[-1.0 - math.log(1.5), -2.0 + math.log(2), -0.5],
        logp_ref=[-1.0 + math.log(2), -2.0, -0.5 - math.log(2)],
    )
    leaf = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    loss, metrics = OBJECTIVE(leaf, ENTROPY, batch)
    loss.backward()

    # policy: .5 * -1.3 + .25 * -(.5 * 2) + .25 * 1 = -.65 - .25 + .25
    # k3: 2 - log 2 - 1, 0, .5 + log 2 - 1, times .5 and the weights
    kl = [1 - math.log(2), 0.0, math.log(2) - 0.5]
    total = -0.65 + 0.5 * (0.5 * kl[0] + 0.25 * kl[2])
    assert loss.item() == pytest.approx(total, abs=1e-12)
    # d/dlogp: weight * (-A rho where not clipped + .5 * (1 - q))
    gradient = [0.5 * (0 - 0.5), 0.25 * (-1.0 + 0.0), 0.25 * (1.0 + 0.25)]
    assert leaf.grad is not None
    assert leaf.grad.tolist() == pytest.approx(gradient, abs=1e-12)

    found = {key: (value.item(), count) for key, (value, count) in metrics.items()}
    assert found == {
        "loss/policy": (pytest.approx(-0.65), 0),  # sums already: their weights are global
        "loss/total": (pytest.approx(total), 0),
        "policy/clip_low": (0.0, 3),
        "policy/clip_high": (1.0, 3),
        "policy/ratio": (pytest.approx(3.0), 3),
        "policy/entropy": (3.5, 3),
        "policy/kl": (pytest.approx(sum(kl)), 3),
    }
    for value, _ in metrics.values():
        assert value.dtype == torch.float64 and not value.requires_grad


@pytest.mark.parametrize("kl_coef", [0.0, 0.04, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_against_the_formula(seed: int, kl_coef: float) -> None:
    rng = np.random.default_rng(seed)
    size = 40
    logp, advantage = -rng.exponential(2, size), rng.normal(size=size)
    old, ref = logp + rng.normal(0, 0.4, size), logp + rng.normal(0, 0.6, size)
    weight = rng.uniform(0.001, 0.1, size)
    low, high = 0.15, 0.35

    total, gradient = 0.0, []
    for t in range(size):
        rho, q = math.exp(logp[t] - old[t]), math.exp(ref[t] - logp[t])
        plain, held = rho * advantage[t], min(max(rho, 1 - low), 1 + high) * advantage[t]
        total += weight[t] * (-min(plain, held) + kl_coef * (q - math.log(q) - 1))
        slope = -plain if plain <= held else 0.0
        gradient.append(weight[t] * (slope + kl_coef * (1 - q)))

    leaf = torch.tensor(logp, requires_grad=True)
    batch = new_batch(list(advantage), list(weight), list(old), list(ref) if kl_coef else None)
    objective = Grpo(clip_low=low, clip_high=high, kl_coef=kl_coef)
    loss, metrics = objective(leaf, torch.zeros(size), batch)
    loss.backward()
    assert loss.item() == pytest.approx(total, abs=1e-12)
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad, gradient, rtol=1e-10, atol=1e-14)
    assert ("policy/kl" in metrics) == (kl_coef > 0)


def test_without_old_logprobs_the_ratio_is_exactly_one() -> None:
    leaf = torch.tensor([-0.1, -7.3, -2.2], dtype=torch.float64, requires_grad=True)
    batch = new_batch([1.0, -1.0, 0.5], [0.3, 0.3, 0.4], None, None)
    loss, metrics = Grpo(clip_low=0.2, clip_high=0.2, kl_coef=0.0)(leaf, ENTROPY, batch)
    loss.backward()
    assert metrics["policy/ratio"][0].item() == 3.0
    assert metrics["policy/clip_low"][0].item() == metrics["policy/clip_high"][0].item() == 0.0
    assert loss.item() == pytest.approx(-(0.3 - 0.3 + 0.2), abs=1e-15)  # -sum weight * A
    torch.testing.assert_close(leaf.grad, -batch.advantage * batch.weight, rtol=0, atol=0)


def test_entropy_is_reported_not_trained_on() -> None:
    leaf, entropy = torch.ones(2, 1, requires_grad=True)
    loss, _ = OBJECTIVE(leaf, entropy, new_batch([1.0], [1.0], [-1.1], [-0.9]))
    assert torch.autograd.grad(loss, [leaf, entropy], allow_unused=True)[1] is None


def test_an_empty_micro_batch_still_has_a_backward() -> None:
    """A rank without work must run backward too, with the same metrics as the others."""
    leaf = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    loss, metrics = OBJECTIVE(leaf, torch.zeros(0), new_batch([], [], None, []))
    loss.backward()
    assert loss.item() == 0.0
    assert "policy/kl" in metrics
    assert all((value.item(), count) == (0.0, 0) for value, count in metrics.values())


def test_loss_and_metrics_add_up_over_micro_batches() -> None:
    rng = np.random.default_rng(3)
    columns = [list(column) for column in rng.normal(size=(4, 12))]
    logp, entropy = torch.tensor(rng.normal(size=12)), torch.tensor(rng.uniform(size=12))

    def run(part: slice) -> tuple[float, dict[str, tuple[float, int]]]:
        batch = new_batch(*(column[part] for column in columns))
        loss, metrics = OBJECTIVE(logp[part], entropy[part], batch)
        return loss.item(), {key: (value.item(), n) for key, (value, n) in metrics.items()}

    loss, metrics = run(slice(None))
    parts = [run(slice(0, 5)), run(slice(5, 5)), run(slice(5, 12))]
    assert sum(part[0] for part in parts) == pytest.approx(loss, abs=1e-12)
    for key, whole in metrics.items():
        assert np.sum([part[1][key] for part in parts], axis=0) == pytest.approx(whole, abs=1e-12)


def test_a_kl_coefficient_needs_a_reference() -> None:
    with pytest.raises(AssertionError, match="reference"):
        OBJECTIVE(torch.zeros(1), torch.zeros(1), new_batch([1.0], [1.0], None, None))


def test_shapes_are_checked_in_tests() -> None:
    """The pytest flag --jaxtyping-packages is at work: a wrong shape would broadcast otherwise."""
    with pytest.raises(TypeCheckError):
        OBJECTIVE(torch.zeros(3), torch.zeros(1), new_batch([1.0] * 3, [1.0] * 3, None, [0.0] * 3))
