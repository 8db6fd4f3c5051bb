"""From a generator or files of rows to tokenised prompts, a thousand rows at a time."""

import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peergrad.config import DataConfig, require
from peergrad.config.rules import one_line
from peergrad.prompts import arithmetic
from peergrad.prompts.chat import Messages, Renderer
from peergrad.prompts.files import GENERATED, Heard, Row, check_source, paths, read_rows
from peergrad.prompts.rows import BadRow, Key, answer_text, require_text
from peergrad.prompts.special import Special
from peergrad.prompts.table import Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CHUNK = 1024
"""Rows that are rendered and tokenised at a time."""
SEARCH_SECONDS = 5.0
"""How long rows with the mistake of the first bad one are counted."""


@dataclass(frozen=True)
class Loaded:
    """The prompts of a source, how many of its rows were too long to be among them, and what is
    worth a word.

    Example:
        ``Loaded(Table(...), left_out=12, repeated=3, contradicting=1, notes=(), hashes=...)``
    """

    prompts: Table
    left_out: int
    repeated: int  # prompts whose tokens an earlier one has
    contradicting: int  # those of them with another answer than all earlier ones
    notes: tuple[str, ...]
    hashes: np.ndarray  # [N] int64, equal where tokens are

    def shared(self, other: "Loaded") -> int:
        """How many of these prompts ``other`` has as well, by their tokens."""
        return int(np.isin(self.hashes, other.hashes).sum())


@dataclass(frozen=True)
class _Drawn:
    """A row that can be used, not yet tokenised."""

    row: Row
    text: str
    answer: str
    extra: str


def load_prompts(
    config: DataConfig,
    source: str | Sequence[str],
    *,
    split: str,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    vocab: int | None = None,
    heard: Heard = lambda text: None,
) -> Table:
    """The prompts of ``source``, with a warning in the log if some are too long: ``read_prompts``
    without the counts.

    Example:
        >>> prompts = load_prompts(DataConfig(), "arithmetic", split="test", tokenizer=t, seed=0)
        >>> prompts[0].id, prompts[0].text, prompts[0].answer
        ('test-0', '27+50=', '77')
    """
    loaded = read_prompts(
        config, source, split=split, tokenizer=tokenizer, seed=seed, vocab=vocab, heard=heard
    )
    if loaded.left_out:
        total = len(loaded.prompts) + loaded.left_out
        logger.warning(
            "%s: left out %d of %d prompts, longer than data.max_prompt_tokens = %d",
            source, loaded.left_out, total, config.max_prompt_tokens,
        )  # fmt: skip
    for note in loaded.notes:
        logger.info("%s", note)
    return loaded.prompts


def read_prompts(
    config: DataConfig,
    source: str | Sequence[str],
    *,
    split: str,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    vocab: int | None = None,
    heard: Heard = lambda text: None,
) -> Loaded:
    """Read, check, render and tokenise every prompt of ``source``.

    ``source`` is ``arithmetic`` (``seed`` decides its order), or .jsonl / .parquet files. The first
    row has the id ``"<split>-0"``, and dropping a long prompt renames no other. Columns other than
    prompt and answer go to ``Prompt.extra``, as JSON has them, and so do the ``messages`` of a
    chat, unless there is a column of that name. Token ids must be below ``vocab``.

    Raises ValueError for whatever is wrong with a row.
    """
    option = "data.source" if split == "train" else "data.held_out"
    check_source(source, option)
    reader = _Reader(config, source, option, split, tokenizer, vocab)
    files = _files(config, source, option, split, seed, _now_and_then(heard))
    for file, rows in enumerate(files):
        reader.read(file, rows)
    heard("")  # nothing is being read any more
    return reader.loaded()


def _files(
    config: DataConfig,
    source: str | Sequence[str],
    option: str,
    split: str,
    seed: int,
    heard: Heard,
) -> Iterator[Iterable[Row]]:
    """The rows of one file after the other."""
    if source == GENERATED:
        yield (
            Row(i, f"row {i + 1}", {config.prompt_key: text, config.answer_key: answer})
            for i, (text, answer) in enumerate(arithmetic.problems(split, seed))
        )
        return
    names = [Path(path).name for path in paths(source)]
    for path, name in zip(paths(source), names, strict=True):
        yield read_rows(Path(path), option, heard, path if names.count(name) > 1 else name)


class _Reader:
    """Takes rows, gives prompts."""

    def __init__(
        self,
        config: DataConfig,
        source: str | Sequence[str],
        option: str,
        split: str,
        tokenizer: "PreTrainedTokenizerBase",
        vocab: int | None,
    ) -> None:
        self._config, self._source, self._option = config, source, option
        self._tokenizer = tokenizer
        self._answer = Key("data.answer_key", config.answer_key)
        self._renderer = Renderer(config, tokenizer)
        prompt = Key("data.prompt_key", config.prompt_key)
        self._special = Special(tokenizer, prompt, vocab=vocab, chat=config.chat)
        self._table = Table(split)
        self._rows, self._shortest = 0, 0

    def read(self, file: int, rows: Iterable[Row]) -> None:
        """All prompts of one file. Raises ValueError for the first row that cannot be used."""
        before, drawn = self._rows, self._drawn(iter(rows))
        while chunk := list(islice(drawn, CHUNK)):
            self._add(file, chunk)
        path = paths(self._source)[file]
        remedy = "give a file with at least one prompt"
        require(self._rows > before, self._option, path, "holds no rows", remedy)

    def _drawn(self, rows: Iterator[Row]) -> Iterator[_Drawn]:
        for row in rows:
            try:
                drawn = self._draw(row)
            except BadRow as error:
                raise self._with_more(error, rows) from error.__cause__
            yield drawn

    def _draw(self, row: Row) -> _Drawn:
        text, messages = self._renderer.render(row)
        return _Drawn(row, text, answer_text(self._answer, row), self._extra(row, messages))

    def _extra(self, row: Row, messages: Messages | None) -> str:
        """The other columns as a JSON object; nothing if there are none."""
        used = (self._config.prompt_key, self._config.answer_key)
        extra = {key: value for key, value in row.columns.items() if key not in used}
        if messages is not None:
            extra.setdefault("messages", messages)
        if not extra:
            return ""
        key = Key(self._option, source_name(self._source))
        try:
            written = json.dumps(extra, default=_plain, ensure_ascii=False)
            if "NaN" in written or "Infinity" in written:  # which JSON does not have
                extra = json.loads(written, parse_constant=lambda name: None)
                written = json.dumps(extra, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            rule = f"{row.where} holds what cannot be recorded ({one_line(error)})"
            raise key.refusal(rule, "correct it") from error
        return require_text(key, row, written)

    def _add(self, file: int, drawn: Sequence[_Drawn]) -> None:
        encoded = self._tokenizer(
            [one.text for one in drawn],
            # A chat template writes the special tokens itself.
            add_special_tokens=not self._config.chat,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        self._special.check([one.row for one in drawn], encoded)
        shortest = min(map(len, encoded))
        self._shortest = min(shortest, self._shortest or shortest)
        self._rows += len(drawn)
        for one, tokens in zip(drawn, encoded, strict=True):
            if len(tokens) <= self._config.max_prompt_tokens:
                self._table.append(file, one.row.index, tokens, one.text, one.answer, one.extra)

    def _with_more(self, error: BadRow, rows: Iterator[Row]) -> BadRow:
        """``error`` with the number of further rows of its kind, as far as a moment allows."""
        until, more = time.monotonic() + SEARCH_SECONDS, 0
        try:
            for row in rows:
                if time.monotonic() > until:
                    return error.with_more(more, at_least=True) if more else error
                try:
                    self._draw(row)
                except BadRow as other:
                    more += other.kind == error.kind
        except ValueError:  # the file ends in something else
            return error.with_more(more, at_least=True) if more else error
        return error.with_more(more, at_least=False) if more else error

    def loaded(self) -> Loaded:
        """What was read. Raises ValueError if all of it was too long."""
        name, limit = source_name(self._source), self._config.max_prompt_tokens
        require(
            len(self._table) > 0,
            "data.max_prompt_tokens",
            limit,
            f"the shortest of the {self._rows} prompts of {name} has {self._shortest} tokens",
            "raise it",
        )
        hashes, with_answers = self._table.hashes()
        tokens, both = len(np.unique(hashes)), len(np.unique(with_answers))
        notes = (*self._special.notes(name), *self._renderer.notes(name))
        left_out, repeated = self._rows - len(self._table), len(self._table) - tokens
        return Loaded(self._table, left_out, repeated, both - tokens, notes, hashes)


def source_name(source: str | Sequence[str]) -> str:
    """A source for people: its first file, and how many more there are."""
    first, *more = paths(source)
    return f"{first} and {len(more)} more" if more else first


def _plain(value: Any) -> str:
    """Text in place of what JSON cannot hold: dates and decimals as they are written, bytes as
    their number."""
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)


def _now_and_then(heard: Heard) -> Heard:
    """``heard``, at most once a second."""
    last = time.monotonic()

    def passed_on(text: str) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= 1:
            last = now
            heard(text)

    return passed_on
