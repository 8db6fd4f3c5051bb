"""Who holds what of a sequence that several ranks share. That gradients come out right is on the
grid of tests/distributed/test_invariance.py."""

import numpy as np
import pytest
import torch

from peergrad.algo.packing import pack
from peergrad.parallel.batches import lay_out
from peergrad.parallel.context import hold, shares
from tests.samples import new_sample, random_samples


def test_shares_by_hand() -> None:
    assert shares(np.array([4, 8]), 2).tolist() == [[0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9]]
    assert shares(np.array([6]), 1).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert shares(np.array([6]), 3).tolist() == [[0, 5], [1, 4], [2, 3]]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rank_has_the_same_work(ranks: int) -> None:
    """Of every sequence as many tokens, and as many pairs of a query and a key it sees."""
    lengths = np.array([2, 5, 1]) * 2 * ranks
    found = shares(lengths, ranks)
    assert sorted(found.ravel()) == list(range(lengths.sum()))
    position = np.concatenate([np.arange(n) for n in lengths])
    assert len(set(position[found].sum(1))) == 1


def test_held_by_hand() -> None:
    """Five tokens are padded to eight; the prompt's last token, row 1, is the second of rank 0's
    four, and those that predict the rest are rank 1's."""
    batch = pack([new_sample([5, 3], [7, 1, 2, 9], [0.5, 0.0, 1.0, 1.0])], each=4, multiple=4)
    assert batch.tokens.tolist() == [5, 3, 7, 1, 2, 0, 0, 0]
    assert batch.rows.tolist() == [1, 3, 4] and batch.targets.tolist() == [7, 2, 9]
    first, second = (hold(batch, rank, 2) for rank in range(2))
    assert first.held is not None and second.held is not None
    assert first.held.tokens.tolist() == [0, 1, 6, 7]
    assert second.held.tokens.tolist() == [2, 3, 4, 5]
    assert (first.held.scored.tolist(), first.held.rows.tolist()) == ([0], [1])
    assert (second.held.scored.tolist(), second.held.rows.tolist()) == ([1, 2], [1, 2])
    assert second.here.targets.tolist() == [2, 9] and second.here.weight.tolist() == [1, 1]
    assert second.here.rows.tolist() == [1, 2] and second.tokens is batch.tokens
    assert hold(batch, 0, 1).held is None and batch.here is batch


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_scored_token_is_predicted_once(ranks: int) -> None:
    batch = pack(random_samples(9, seed=1), each=2 * ranks, multiple=4 * ranks)
    assert all(n % (2 * ranks) == 0 for (n,) in batch.families)
    assert batch.tokens.numel() % (4 * ranks) == 0
    held = [hold(batch, rank, ranks).held for rank in range(ranks)]
    scored = torch.cat([h.scored for h in held if h]).sort().values
    assert scored.tolist() == list(range(batch.targets.numel()))
    for h in held:
        assert h is not None
        assert torch.equal(h.tokens[h.rows], batch.rows[h.scored])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_query_meets_the_keys_before_it(ranks: int) -> None:
    """And its own: read from what the layout takes from where."""
    lengths = [n * 2 * ranks for n in (1, 40, 3, 3)]
    families = tuple((n,) for n in lengths)
    parts = shares(np.array(lengths), ranks)
    gathered = parts.ravel()  # the row's token at each place of all ranks' keys
    starts = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    for rank in range(ranks):
        layout = lay_out(families, torch.device("cpu"), rank=rank, ranks=ranks)
        asked = parts[rank] if layout.queries is None else parts[rank][layout.queries.numpy()]
        seen = gathered if layout.keys is None else gathered[layout.keys.numpy()]
        met = {}
        for batch in layout.batches:
            for _ in range(batch.sequences):
                keys, seen = seen[: batch.width], seen[batch.width :]
                queries, asked = np.split(asked, [batch.width - batch.first])
                for i, query in enumerate(queries, batch.first):
                    met[len(met)] = (query, keys[: i + 1].tolist())
        slots = range(parts.shape[1]) if layout.slots is None else layout.slots.tolist()
        for token, slot in zip(parts[rank], slots, strict=True):
            assert met[slot] == (token, list(range(starts[token], token + 1)))
