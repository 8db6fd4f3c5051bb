"""Batches of attention: every query once, few batches, little padding."""

import numpy as np
import pytest
import torch

from peergrad.parallel.batches import PADDING, SMALL, Batch, Unit, alike, lay_out

HOST = torch.device("cpu")


def whole(lengths: list[int]) -> list[Unit]:
    return [Unit(False, 0, n, 0, 0) for n in lengths]


def lengths(runs: list[list[Unit]]) -> list[list[int]]:
    return [[unit.tokens for unit in run] for run in runs]


def test_batches_are_few_and_pad_little() -> None:
    assert lengths(alike(whole([3, 90, 2, 2, 3]))) == [[90], [3, 3, 2, 2]]  # as documented
    assert alike([]) == [] and lengths(alike(whole([4] * 1000))) == [[4] * 1000]
    many = np.random.default_rng(0).integers(64, 256, 1024).tolist()
    runs = lengths(alike(whole(many)))
    assert [n for run in runs for n in run] == sorted(many, reverse=True)
    assert len(runs) < 32
    assert sum(run[0] * len(run) for run in runs) < 1.1 * sum(many)
    # Long ones are taken one by one rather than padded.
    assert lengths(alike(whole([3900, 4096, 4000]))) == [[4096], [4000], [3900]]


def test_answers_are_padded_on_both_sides() -> None:
    """To prompts of 9 and 8: positions 9 to 11 and 8 to 12 are 8 to 12 of both."""
    answers = [Unit(False, 9, 3, 0, 20), Unit(False, 8, 5, 9, 23)]
    assert alike(answers) == [[answers[1], answers[0]]]
    # 100 answers each: one more place for each is too much, as it is for whole sequences
    two = [Unit(False, 9, 3, 0, 0)] * 100 + [Unit(False, 8, 3, 0, 0)] * 100
    assert [len(run) for run in alike(two)] == [100, 100]


def test_plain_sequences_as_they_lie() -> None:
    layout = lay_out(((3,), (3,)), HOST)
    assert layout.batches == [Batch(2, 0, 3, None)]
    assert layout.queries is layout.keys is layout.slots is None


def test_padded_sequences_as_documented() -> None:
    layout = lay_out(((3,), (2,)), HOST)
    assert layout.batches == [Batch(2, 0, 3, None)]
    assert layout.queries is not None and layout.keys is not None and layout.slots is not None
    assert layout.queries.tolist() == layout.keys.tolist() == [0, 1, 2, 3, 4, 4]
    assert layout.slots.tolist() == [0, 1, 2, 3, 4]


def test_a_large_family_by_hand() -> None:
    """A prompt of 70 with answers of 1 and 2, and a sequence of 2 before it."""
    layout = lay_out(((2,), (70, 1, 2)), HOST)
    assert layout.batches == [Batch(1, 0, 70, None), Batch(1, 0, 2, None), Batch(2, 70, 72, None)]
    assert layout.queries is not None and layout.keys is not None and layout.slots is not None
    prompt = list(range(2, 72))
    assert layout.queries.tolist() == [*prompt, 0, 1, 73, 74, 72, 72]
    assert layout.keys.tolist() == [*prompt, 0, 1, *prompt, 73, 74, *prompt, 72, 72]
    assert layout.slots.tolist() == [70, 71, *range(70), 74, 72, 73]


def test_the_mask_of_a_small_family_by_hand() -> None:
    """A prompt of 2 with answers of 1 and 2, beside one of 1 with 1 and 1, which is padded."""
    (batch,) = lay_out(((2, 1, 2), (1, 1, 1)), HOST).batches
    assert (batch.sequences, batch.first, batch.width) == (2, 0, 5) and batch.mask is not None
    assert batch.mask.isneginf().logical_not().int()[:, 0].tolist() == [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]],
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 0, 0]],
    ]
    assert batch.mask.masked_fill(batch.mask.isneginf(), 0).count_nonzero() == 0


@pytest.mark.parametrize("seed", range(8))
def test_every_token_is_asked_once_and_padding_is_bounded(seed: int) -> None:
    rng = np.random.default_rng(seed)
    families = tuple(
        tuple(rng.integers(1, rng.integers(3, 120), rng.integers(1, 9)).tolist()) for _ in range(40)
    )
    layout, total = lay_out(families, HOST), sum(map(sum, families))
    assert layout.queries is not None and layout.slots is not None
    assert torch.equal(layout.queries[layout.slots], torch.arange(total))
    assert layout.slots.unique().numel() == total
    large = [f for f in families if len(f) == 1 or sum(f) > SMALL]
    small = [sum(f) for f in families if len(f) > 1 and sum(f) <= SMALL]
    answers = {(prompt, n) for prompt, *more in large for n in more}
    shapes = len({prompt for prompt, *_ in large}) + len(answers) + len(set(small))
    assert layout.queries.numel() - total <= PADDING * shapes
    assert len(layout.batches) < (len(small) + sum(map(len, large))) / 2
