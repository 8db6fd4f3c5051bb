"""The endless, resumable order of prompts."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from peergrad.config import require
from peergrad.data import Prompt
from peergrad.prompts.table import Table


class Prompts(Iterator[Prompt]):
    """Prompts without end: every epoch shows each of ``records`` once, in an order of its own.

    The order is a function of (seed, epoch) alone, so the whole state is two numbers. Resuming with
    another ``seed`` or ``shuffle`` keeps them and goes on through the new order.

    Example:
        >>> prompts = Prompts(records, shuffle=True, seed=1)
        >>> [next(prompts).id for _ in range(3)]
        ['train-2', 'train-0', 'train-1']
        >>> prompts.state_dict()
        {'epoch': 0, 'position': 3, 'count': 3, 'digest': 'dd8a6310b6d87f22'}
    """

    def __init__(self, records: Sequence[Prompt], *, shuffle: bool, seed: int) -> None:
        assert records, "an endless order needs at least one prompt"
        self._records = records
        self._shuffle = shuffle
        self._seed = seed
        self._fingerprint = {"count": len(records), "digest": _digest(records)}
        self._epoch = self._position = 0
        self._order = self._epoch_order()

    def __next__(self) -> Prompt:
        if self._position == len(self._records):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._epoch_order()
        prompt = self._records[int(self._order[self._position])]
        self._position += 1
        return prompt

    def _epoch_order(self) -> Sequence[int] | np.ndarray:
        if not self._shuffle:
            return range(len(self._records))
        # numpy keeps raw bits the same in every version, which it does not promise of permutation()
        bits = np.random.Philox(np.random.SeedSequence([self._seed, self._epoch]))
        return np.argsort(bits.random_raw(len(self._records)), kind="stable")

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to go on from here; plain JSON."""
        return {"epoch": self._epoch, "position": self._position, **self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises ValueError if it belongs to other prompts."""
        saved = {key: state[key] for key in self._fingerprint}
        require(
            saved == self._fingerprint,
            "data.source",
            self._fingerprint,
            f"the checkpoint was written with other prompts or another tokenizer ({saved})",
            "resume with the same data settings, or start a new run",
        )
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._epoch_order()


def _digest(records: Sequence[Prompt]) -> str:
    """Ids alone would not tell two files of the same length apart, so tokens and answers count."""
    digest = hashlib.sha256()
    listed = ((prompt.id, prompt.answer, prompt.tokens.tobytes()) for prompt in records)
    for id, answer, tokens in records.identities() if isinstance(records, Table) else listed:
        digest.update(repr((id, answer)).encode() + tokens)
    return digest.hexdigest()[:16]
