"""Whether the special tokens of prompts are those that a model of this kind begins with."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from peergrad.prompts.files import Row
from peergrad.prompts.rows import BadRow, Key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEAD = 12
"""Tokens of a prompt that a warning shows."""
BEHIND = 4
"""Last tokens of a prompt among which the end token is looked for."""
Encoded = list[list[int]]


@dataclass
class _Seen:
    """Prompts that are perhaps not as they were meant."""

    count: int = 0
    where: str = ""
    tokens: tuple[int, ...] = ()

    def add(self, row: Row, tokens: list[int], at: int = 0) -> None:
        self.count += 1
        if self.count == 1:
            self.where, self.tokens = row.where, tuple(tokens[at : at + HEAD])


class Special:
    """Looks at the token ids of prompts, some rows at a time."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", key: Key, *, vocab: int | None, chat: bool
    ) -> None:
        """``vocab``: ids that the model knows; None: not asked. ``chat``: whether the chat template
        has written the special tokens."""
        self._tokenizer, self._key, self._vocab, self._chat = tokenizer, key, vocab, chat
        self._begin, self._end = tokenizer.bos_token_id, tokenizer.eos_token_id
        unknown = tokenizer.unk_token_id
        self._unknown = None if unknown in (self._begin, self._end) else unknown
        sample = tokenizer("0")["input_ids"]
        bare = tokenizer("0", add_special_tokens=False)["input_ids"]
        # What the tokenizer puts behind every text. It may be the end token of another model.
        self._appended = sample[-1] if not chat and sample[-1:] != bare[-1:] else None
        begins = sample[:1] == [self._begin] and bare[:1] != [self._begin]
        # A tokenizer that has such a token and never writes it means another thing by it.
        self._wanted = self._begin is not None and (begins or (chat and self._begin != self._end))
        self._total, self._twice, self._absent, self._strange = 0, _Seen(), _Seen(), _Seen()

    def check(self, rows: list[Row], encoded: Encoded) -> None:
        """Raises BadRow for a prompt without tokens, with an id that the model does not know, or
        with the end token at its end."""
        self._total += len(rows)
        for row, tokens in zip(rows, encoded, strict=True):
            if not tokens:
                rule = f"{row.where} has a prompt of no tokens"
                remedy = "correct it: the first answer token is predicted from the prompt's last"
                raise self._key.refusal(rule, remedy)
            if self._is_ended(tokens):
                raise self._ended(row, tokens)
            if self._wanted:
                if tokens[0] != self._begin:
                    self._absent.add(row, tokens)
                elif tokens[1:2] == [self._begin]:
                    self._twice.add(row, tokens)
        ids = np.fromiter(chain.from_iterable(encoded), np.int64)
        if self._vocab is not None and (ids.min() < 0 or ids.max() >= self._vocab):
            raise self._outside(rows, encoded)
        if self._unknown is not None and (ids == self._unknown).any():
            for row, tokens in zip(rows, encoded, strict=True):
                if self._unknown in tokens:
                    self._strange.add(row, tokens, max(0, tokens.index(self._unknown) - HEAD // 2))

    def _is_ended(self, tokens: list[int]) -> bool:
        """Whether the end token comes last, but for white space, as in templates that end every
        message with a line break and never open an answer."""
        if tokens[-1] in (self._end, self._appended):
            return True
        tail = tokens[-BEHIND:]
        return self._end in tail and self._decoded(tail[tail.index(self._end) + 1 :]).isspace()

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens)))

    def _outside(self, rows: list[Row], encoded: Encoded) -> BadRow:
        vocab = self._vocab or 0
        row, token = next(
            (row, token)
            for row, tokens in zip(rows, encoded, strict=True)
            for token in tokens
            if not 0 <= token < vocab
        )
        known = self._tokenizer.convert_ids_to_tokens(token) if token >= 0 else None
        name = f" ({known!r})" if known is not None else ""
        rule = f"{row.where} has token {token}{name}, but the model (vocab_size) knows only {vocab}"
        return self._key.refusal(rule, "use the model's own tokenizer")

    def _ended(self, row: Row, tokens: list[int]) -> BadRow:
        token = f"the end token {self._tokenizer.eos_token!r}"
        rule = f"{row.where} has a prompt that ends with {token}, after which nothing is answered"
        if self._chat:
            rule = f"the chat template ends {row.where} with {token}"
            remedy = "correct the template: it must end with the opening of an answer"
            return BadRow("data.chat", True, rule, remedy)
        if tokens[-1] != self._appended:
            return self._key.refusal(rule, "remove it from the text")
        token = token if self._appended == self._end else repr(self._decoded(tokens[-1:]))
        flag = bool(getattr(self._tokenizer, "add_eos_token", False))
        remedy = "take it out of post_processor in tokenizer.json"
        remedy = "set add_eos_token=false in tokenizer_config.json" if flag else remedy
        where = self._tokenizer.name_or_path
        rule = f"its tokenizer appends {token} to every text, so to the prompt in {row.where}"
        return BadRow("model.path", where, rule, remedy)

    def notes(self, source: str) -> list[str]:
        """What is allowed, and perhaps not meant: a line of each kind."""
        token = self._tokenizer.bos_token
        twice = "the template or the messages" if self._chat else "the text"
        lines = (
            (self._twice, f"begin with {token!r} twice: take one out of {twice}"),
            (self._absent, f"begin without {token!r}: the chat template leaves it out"),
            (self._strange, f"hold what the tokenizer knows only as {self._tokenizer.unk_token!r}"),
        )
        return [
            f"{seen.count} of {self._total} prompts of {source} {what} "
            f"({seen.where}: {self._decoded(seen.tokens)!r})"
            for seen, what in lines
            if seen.count
        ]
