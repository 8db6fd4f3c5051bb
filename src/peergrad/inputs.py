"""What a run is fed with: prompts, held-out prompts, rewards.

A module of its own, because the collector process imports it and must not load Megatron.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from peergrad.config import Config, Replay
from peergrad.data import Prompt
from peergrad.parallel.hf.config import Shape, read_shape
from peergrad.prompts import Prompts, load_prompts, load_tokenizer
from peergrad.rewards import RewardPool
from peergrad.rollout.collector import Parts
from peergrad.rollout.engine import Routes
from peergrad.rollout.text import Decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def collector_parts(config: Config, heard: Callable[[str], None] = lambda text: None) -> Parts:
    """What the collector process works with; runs in that process. ``heard`` is told how far the
    prompts are read."""
    return _parts(config, heard, trains=True)


def evaluation_parts(config: Config, heard: Callable[[str], None] = lambda text: None) -> Parts:
    """The same for an evaluation alone, which does not read data.source."""
    return _parts(config, heard, trains=False)


def _parts(config: Config, heard: Callable[[str], None], *, trains: bool) -> Parts:
    tokenizer = load_tokenizer(config.model.path)
    data, seed, shape = config.data, config.run.seed, read_shape(config.model.path)
    vocab = shape.vocab

    def load(source: str | Sequence[str], split: str, seed: int) -> Sequence[Prompt]:
        return load_prompts(
            data, source, split=split, tokenizer=tokenizer, seed=seed, vocab=vocab, heard=heard
        )

    # A seed of its own kind: the held-out order must not change with run.seed.
    held_out = [] if data.held_out is None else load(data.held_out, "test", 0)
    records = load(data.source, "train", seed) if trains else held_out
    return Parts(
        prompts=Prompts(records, shuffle=data.shuffle, seed=seed),
        held_out=held_out,
        scorer=RewardPool(config.reward),
        stop_token_ids=(tokenizer.eos_token_id,),
        decode=answer_decoder(tokenizer),
        vocab_size=vocab,
        routes=routes_of(config, shape) if trains else None,
    )


def routes_of(config: Config, shape: Shape) -> Routes | None:
    """What servers are asked of the experts; None of a model without, or if they are not taken
    again."""
    if (experts := shape.experts) is None or not config.moe.replays:
        return None
    return Routes(
        layers=shape.layers,
        chosen=experts.chosen,
        experts=experts.number,
        required=config.moe.replay is Replay.on,
    )


def answer_decoder(tokenizer: "PreTrainedTokenizerBase") -> Decode:
    """What makes texts of token sequences: every token of them, special or not, and nothing tidied
    up. A million tokens take a core 0.3 s; through transformers' own ``batch_decode`` half as much
    again."""
    ids = np.fromiter(tokenizer.get_vocab().values(), np.int64)
    known = np.zeros(int(ids.max()) + 1, bool)
    known[ids] = True
    if tokenizer.is_fast:
        said: Decode = partial(tokenizer.backend_tokenizer.decode_batch, skip_special_tokens=False)
    else:
        said = partial(
            tokenizer.batch_decode,
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
            spaces_between_special_tokens=False,
        )
    return partial(_decode, said, known)


def _decode(said: Decode, known: np.ndarray, sequences: list[list[int]]) -> list[str]:
    """What ``said`` gives, with U+FFFD for the tokens that the model has and its tokenizer does
    not, which it would leave out without a word."""
    ids = np.fromiter(chain.from_iterable(sequences), np.int64)
    if known.take(ids, mode="clip").all() and ids.max(initial=0) < len(known):
        return said(sequences)
    texts = []
    for tokens in sequences:
        parts: list[list[int]] = [[]]
        for token in tokens:
            if token < len(known) and known[token]:
                parts[-1].append(token)
            else:
                parts.append([])
        texts.append("\ufffd".join(said(parts)))
    return texts
