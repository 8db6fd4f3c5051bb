"""Many prompts in little memory: token ids in one flat array, texts packed by the dozen."""

import json
from array import array
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import zstandard

from peergrad.data import Prompt

BLOCK = 32
"""Prompts whose texts are packed together, and unpacked when one of them is asked for, which takes
0.1 to 0.3 ms."""


class _Texts:
    """Rows of ``COLUMNS`` texts without NUL characters. A prompt's text and the messages that it
    was made of take little more room than one of the two."""

    COLUMNS = 3

    def __init__(self) -> None:
        self._packed: list[bytes] = []
        self._open: list[str] = []
        self._last: tuple[int, list[str]] = (-1, [])  # number and texts of the block read last
        self._compressor = zstandard.ZstdCompressor(level=3)
        self._decompressor = zstandard.ZstdDecompressor()

    def append(self, *texts: str) -> None:
        self._open += texts
        if len(self._open) == BLOCK * self.COLUMNS:
            packed = self._compressor.compress("\0".join(self._open).encode("utf-8"))
            self._packed.append(bytes(memoryview(packed)))  # its buffer is that of the text
            self._open = []

    def __getitem__(self, index: int) -> list[str]:
        block, row = divmod(index, BLOCK)
        if block == len(self._packed):
            texts = self._open
        else:
            if block != self._last[0]:
                unpacked = self._decompressor.decompress(self._packed[block]).decode("utf-8")
                self._last = block, unpacked.split("\0")
            texts = self._last[1]
        return texts[row * self.COLUMNS : (row + 1) * self.COLUMNS]


class _Made(Sequence[Prompt]):
    """Prompts that are made when they are asked for, by ``_prompt``."""

    def _prompt(self, index: int) -> Prompt:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...

    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        chosen = range(len(self))[index]  # IndexError beyond either end
        if isinstance(chosen, int):
            return self._prompt(chosen)
        return [self._prompt(i) for i in chosen]


class Table(_Made):
    """Prompts that can be added at the end; each is made when it is asked for.

    The prompt of row 17 has the id ``train-17``; that of the second file ``train-1-17``: more rows
    or more files rename none.

    Example:
        >>> table = Table("train")
        >>> table.append(0, 17, [5, 3, 9], "1+2=", "3", "")
        >>> table[0].id, table[0].tokens
        ('train-17', array([5, 3, 9], dtype=int32))
    """

    def __init__(self, split: str) -> None:
        self._split = split
        self._files, self._rows = array("i"), array("q")
        self._tokens, self._ends = array("i"), array("q", [0])
        self._texts = _Texts()

    def append(
        self, file: int, row: int, tokens: Sequence[int], text: str, answer: str, extra: str
    ) -> None:
        """One more; texts must be such that UTF-8 can hold them, and hold no NUL character.
        ``extra``: a JSON object, or nothing."""
        self._files.append(file)
        self._rows.append(row)
        self._tokens.extend(tokens)
        self._ends.append(len(self._tokens))
        self._texts.append(text, answer, extra)

    def __len__(self) -> int:
        return len(self._rows)

    def _prompt(self, index: int) -> Prompt:
        text, answer, extra = self._texts[index]
        return Prompt(
            id=self._id(index),
            tokens=np.frombuffer(self._content(index), np.int32).copy(),  # that can be written to
            text=text,
            answer=answer,
            extra=json.loads(extra) if extra else {},
        )

    def _id(self, index: int) -> str:
        file = f"{self._files[index]}-" if self._files[index] else ""
        return f"{self._split}-{file}{self._rows[index]}"

    def _content(self, index: int) -> bytes:
        return self._tokens[self._ends[index] : self._ends[index + 1]].tobytes()

    def part(self, file: int) -> Sequence[Prompt]:
        """The prompts of one file."""
        first, last = np.searchsorted(np.frombuffer(self._files, np.int32), [file, file + 1])
        return _Part(self, range(first, last))

    def identities(self) -> Iterator[tuple[str, str, bytes]]:
        """(id, answer, tokens as bytes) of each: what tells one set of prompts from another."""
        for index in range(len(self)):
            yield self._id(index), self._texts[index][1], self._content(index)

    def lengths(self) -> np.ndarray:
        """Tokens of each prompt, [N] int64."""
        return np.diff(np.frombuffer(self._ends, np.int64))

    def hashes(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers that are equal where tokens are, and where tokens and answer are: each [N]
        int64, of use in this process alone."""
        tokens = np.empty(len(self), np.int64)
        both = np.empty(len(self), np.int64)
        for index, (_, answer, content) in enumerate(self.identities()):
            tokens[index] = hash(content)
            both[index] = hash((content, answer))
        return tokens, both


class _Part(_Made):
    """Some prompts of a table."""

    def __init__(self, table: Table, chosen: range) -> None:
        self._table, self._chosen = table, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def _prompt(self, index: int) -> Prompt:
        return self._table[self._chosen[index]]
