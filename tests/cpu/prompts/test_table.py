"""Prompts in flat arrays are the prompts that went in."""

import numpy as np
import pytest

from peergrad.data import Prompt
from peergrad.prompts import Prompts, Table
from peergrad.prompts.table import BLOCK

ROWS = [
    (0, 0, [5, 3, 9], "1+2=", "3", ""),
    (0, 7, [5], "\u00e4\n", "", '{"level": null, "tags": ["\u00e4"]}'),
    (2, 0, [5, 3, 9], "", "4", ""),
]


@pytest.fixture
def table() -> Table:
    table = Table("train")
    for row in ROWS:
        table.append(*row)
    return table


def test_what_went_in_comes_out(table: Table) -> None:
    assert [prompt.id for prompt in table] == ["train-0", "train-7", "train-2-0"]
    assert [prompt.tokens.tolist() for prompt in table] == [tokens for _, _, tokens, *_ in ROWS]
    assert [(prompt.text, prompt.answer) for prompt in table] == [row[3:5] for row in ROWS]
    assert [prompt.extra for prompt in table] == [{}, {"level": None, "tags": ["\u00e4"]}, {}]
    assert table[0].tokens.dtype == np.int32 and table[0].tokens.flags.writeable
    assert table.lengths().tolist() == [3, 1, 3]


def test_it_is_a_sequence(table: Table) -> None:
    assert len(table) == 3 and table[-1].id == table[2].id
    assert [prompt.id for prompt in table[1:9]] == ["train-7", "train-2-0"]
    for index in (3, -4):
        with pytest.raises(IndexError):
            table[index]


def test_the_prompts_of_one_file(table: Table) -> None:
    files = [[prompt.id for prompt in table.part(file)] for file in range(4)]
    assert files == [["train-0", "train-7"], [], ["train-2-0"], []]
    assert table.part(0)[-1].id == table.part(0)[1:][0].id == "train-7"
    assert len(table.part(0)) == 2 and table.part(2)[0].answer == "4"


def test_equal_tokens_have_equal_hashes(table: Table) -> None:
    tokens, both = table.hashes()
    assert tokens[0] == tokens[2] != tokens[1]
    assert len(set(both.tolist())) == 3


def test_the_order_knows_them_as_it_knows_a_list(table: Table) -> None:
    """A checkpoint's position holds for the same prompts, however they are kept."""
    listed: list[Prompt] = list(table)
    for shuffle in (True, False):
        one, other = (Prompts(records, shuffle=shuffle, seed=3) for records in (table, listed))
        assert one.state_dict() == other.state_dict()
        assert [next(one).id for _ in range(7)] == [next(other).id for _ in range(7)]


def test_texts_are_found_in_any_order() -> None:
    """Across packed blocks, in the open one, and between additions."""
    table, seen = Table("test"), 0
    for index in range(3 * BLOCK + 5):
        table.append(0, index, [index], f"{index} \U0001f600", str(-index), f'{{"i": {index}}}')
        seen = (7 * seen + 3) % (index + 1)
        prompt = table[seen]
        assert (prompt.id, prompt.text) == (f"test-{seen}", f"{seen} \U0001f600")
        assert (prompt.answer, prompt.extra) == (str(-seen), {"i": seen})
    assert [prompt.extra["i"] for prompt in table] == list(range(len(table)))
    assert [answer for _, answer, _ in table.identities()] == [str(-i) for i in range(len(table))]
