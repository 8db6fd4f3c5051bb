"""The text of an answer, from the very tokens that were sampled.

An engine's own text lacks special tokens and the token that ended the answer, so that a reward
would take ``L<pad>Us`` for ``LUs`` and never see a ``</answer>``; one without a detokenizer has
none at all.
"""

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np

from peergrad.data import Rollout
from peergrad.rollout.engine import Engine, Sampling

THREAD_TOKENS = 1024
"""Tokens from which on a group is decoded beside the loop that reads answers: half of what a large
step's tokens cost here is decoding, and tokenizers do it without holding Python's lock."""
Decode = Callable[[list[list[int]]], list[str]]
"""The texts of token sequences, special tokens and all."""


class Decoding:
    """An engine whose answers have the text that ``decode`` gives their tokens, but for the last
    token if it is one of ``ends``, the tokenizer's own, and ended the answer."""

    def __init__(self, engine: Engine, decode: Decode, ends: Collection[int]) -> None:
        self._engine = engine
        self._decode = decode
        self._ends = frozenset(ends)

    async def generate(
        self, prompt_tokens: Sequence[int] | np.ndarray, sampling: Sampling, *, request_id: str
    ) -> list[Rollout]:
        """See ``Engine``."""
        rollouts = await self._engine.generate(prompt_tokens, sampling, request_id=request_id)
        said = [self._said(rollout) for rollout in rollouts]
        if sum(map(len, said)) < THREAD_TOKENS:
            texts = self._decode(said)
        else:
            texts = await asyncio.to_thread(self._decode, said)
        return [replace(r, text=text) for r, text in zip(rollouts, texts, strict=True)]

    def _said(self, rollout: Rollout) -> list[int]:
        tokens: list[int] = rollout.tokens.tolist()
        ended = rollout.finish == "stop" and tokens and tokens[-1] in self._ends
        return tokens[:-1] if ended else tokens
