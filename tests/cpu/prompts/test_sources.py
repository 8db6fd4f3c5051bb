"""Loading prompts: ids, rendering, dropped rows, and one clear line for each mistake."""

import datetime
import gc
import json
import logging
import pickle
import re
from collections.abc import Sequence
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from peergrad.config import DataConfig
from peergrad.data import Prompt
from peergrad.prompts import arithmetic, load_prompts, read_prompts
from peergrad.prompts.files import read_rows
from tests.models import make_tokenizer

GSM8K = Path(__file__).parents[3] / "../shared/data/gsm8k"
TOKENIZER = make_tokenizer()
ROW = b'{"prompt": "?", "answer": "1"}\n'


def load(source: Any, split: str = "train", seed: int = 0, **options: Any) -> Sequence[Prompt]:
    return load_prompts(DataConfig(**options), source, split=split, tokenizer=TOKENIZER, seed=seed)


def jsonl(folder: Path, *rows: Any) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(prompt: Any = "1+2=", answer: Any = "3", **extra: Any) -> dict[str, Any]:
    return {"prompt": prompt, "answer": answer, **extra}


@pytest.mark.parametrize("split", ["train", "test"])
def test_arithmetic(split: str) -> None:
    prompts = load("arithmetic", split, seed=3)
    problems = arithmetic.problems(split, 3)
    assert [(p.text, p.answer) for p in prompts] == problems
    assert [p.id for p in prompts[:2]] == [f"{split}-0", f"{split}-1"]
    for prompt in prompts[:20]:
        assert prompt.tokens.dtype == np.int32
        assert TOKENIZER.decode(prompt.tokens.tolist()) == prompt.text


def test_jsonl_and_parquet_agree(tmp_path: Path) -> None:
    rows = [row(level=1), row("3+4=", "7", level=None), row("5*5=", "25", level=3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "prompts.parquet")
    lines, table = load(jsonl(tmp_path, *rows)), load(str(tmp_path / "prompts.parquet"))
    for a, b in zip(lines, table, strict=True):
        assert (a.id, a.text, a.answer, a.extra) == (b.id, b.text, b.answer, b.extra)
        assert a.tokens.tolist() == b.tokens.tolist()
    assert [p.extra for p in lines] == [{"level": 1}, {"level": None}, {"level": 3}]


def test_columns_of_any_type_can_be_recorded(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([row(day=datetime.date(2025, 1, 2), raw=b"x", many=[1, 2])])
    pyarrow.parquet.write_table(table, tmp_path / "prompts.parquet")
    (prompt,) = load(str(tmp_path / "prompts.parquet"))
    assert json.loads(json.dumps(prompt.extra))["day"] == "2025-01-02"
    assert prompt.extra["many"] == [1, 2]


def test_chat(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "1+2="},
    ]
    path = jsonl(tmp_path, row(), row(turns))
    plain, several = load(path, chat=True)
    assert plain.text == "user: 1+2=\nassistant: "
    assert several.text == "user: 1+1=\nassistant: 2\nuser: 1+2=\nassistant: "
    assert plain.tokens.tolist() == TOKENIZER(plain.text)["input_ids"]
    assert load(path, chat=True, system="be brief")[0].text == f"system: be brief\n{plain.text}"


def test_long_prompts_are_left_out_and_keep_the_ids_of_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = jsonl(tmp_path, row(), row("1+2+3+4="), row("12345"), row("9="))
    with caplog.at_level(logging.WARNING):
        assert [p.id for p in load(path, max_prompt_tokens=5)] == ["train-0", "train-2", "train-3"]
    assert "left out 1 of 4 prompts" in caplog.text
    with pytest.raises(ValueError, match=r"max_prompt_tokens = 1: the shortest of the 4 .* 2 tok"):
        load(path, max_prompt_tokens=1)


def test_numbers_are_answers_and_blank_lines_keep_row_numbers(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(row(answer=3)) + "\n\n" + json.dumps(row(answer=0.5)))
    assert [(p.id, p.answer) for p in load(str(path))] == [("train-0", "3"), ("train-2", "0.5")]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "data.source = .* holds no rows"),
        ([row(), 5], {}, "data.source = .* row 2 of prompts.jsonl is no object"),
        ([{"question": "?", "answer": "1"}], {}, "data.prompt_key = 'prompt': row 1 .*'question'"),
        ([row(), {"prompt": "?"}], {}, "data.answer_key = 'answer': row 2 of prompts.jsonl has no"),
        ([row(answer=None)], {}, "data.answer_key = 'answer': row 1 .* not None"),
        ([row(answer=float("nan"))], {}, "data.answer_key = 'answer': row 1 .* not nan"),
        ([row(answer=["3"])], {}, "data.answer_key = 'answer': row 1 .* not .'3'.; correct"),
        ([row(), row(7)], {}, "data.prompt_key = 'prompt': row 2 .* must hold text there, not 7"),
        ([row("")], {}, "data.prompt_key = 'prompt': row 1 .* must hold text there, not ''"),
        ([row([{"role": "user", "content": "?"}])], {}, "data.prompt_key.* set data.chat=true"),
        ([row([])], {"chat": True}, "data.prompt_key = 'prompt': row 1 .* {role, content} there"),
        ([row([{"role": "user"}])], {"chat": True}, "data.prompt_key = 'prompt': row 1"),
        (
            [row([{"role": "system", "content": "?"}])],
            {"chat": True, "system": "be brief"},
            "data.system = 'be brief': row 1 .* a system message of its own",
        ),
    ],
)
def test_mistakes_in_rows(
    tmp_path: Path, rows: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        load(jsonl(tmp_path, *rows), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "there is no such file; correct the path"),
        ("none", None, "must be arithmetic or a .jsonl or .parquet file; convert it"),
        ("table.csv", b"a,b", "must be arithmetic or a .jsonl or .parquet file; convert it"),
        ("rows.json", b"[]", "must be arithmetic or a .jsonl or .parquet file; convert it"),
        ("rows.jsonl.gz", b"", "must be arithmetic or a .jsonl or .parquet file; unpack it"),
        ("x" * 300 + ".jsonl", None, "File name too long; correct the path"),
        ("bad.jsonl", ROW + b'{"prompt', "row 2 of bad.jsonl is not JSON"),
        ("bad.jsonl", b"[" * 100_000, "row 1 of bad.jsonl is not JSON"),
        ("bad.jsonl", ROW + b'{"prompt": "\xff"}', "row 2 of bad.jsonl is not UTF-8"),
        ("bad.jsonl", ROW.decode().encode("utf-16"), "row 1 of bad.jsonl is not UTF-8"),
        (
            "bad.jsonl",
            b'{"prompt": "?", "answer": "\\uD83D"}',  # half of a pair, cut from an emoji
            "row 1 of bad.jsonl is not UTF-8",
        ),
        ("empty.jsonl", b"\n", "holds no rows"),
        ("bad.parquet", b"PAR1 no", "is not readable as parquet"),
        ("empty.parquet", b"", "is not readable as parquet"),
    ],
)
def test_mistakes_in_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    for split, option in (("train", "data.source"), ("test", "data.held_out")):
        with pytest.raises(ValueError) as caught:
            load(str(path), split)
        assert str(caught.value).startswith(f"{option} = {str(path)!r}: {message}")
        assert re.fullmatch(r".+; .+", str(caught.value))  # one line


def test_a_folder_is_no_source(tmp_path: Path) -> None:
    folder = tmp_path / "set.jsonl"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"folder, not a file; name a .*: there is none in it"):
        load(str(folder), "test")
    (folder / "data").mkdir()
    (folder / "data" / "train-0.parquet").touch()
    example = f"as in data.held_out={folder}/data/train-0.parquet$"
    with pytest.raises(ValueError, match=f"^data.held_out = .*, not a file; .*{example}"):
        load(str(folder), "test")


def test_a_byte_order_mark_and_whole_pairs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "1", "answer": "\\ud83d\\ude00"}')
    assert load(str(path))[0].answer == "\U0001f600"


def test_rows_left_out_are_counted(tmp_path: Path) -> None:
    path = jsonl(tmp_path, row(), row("1+2+3+4="), row("9="))
    loaded = read_prompts(
        DataConfig(max_prompt_tokens=5), path, split="train", tokenizer=TOKENIZER, seed=0
    )
    assert ([p.id for p in loaded.prompts], loaded.left_out) == (["train-0", "train-2"], 1)


def test_a_template_that_fails_names_the_row(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    path = jsonl(tmp_path, row())
    for template in (None, "{{ raise_exception('roles must alternate') }}"):
        tokenizer.chat_template = template
        with pytest.raises(
            ValueError, match=r"data.chat = True: .* fails on row 1 of prompts.jsonl"
        ):
            load_prompts(DataConfig(chat=True), path, split="train", tokenizer=tokenizer, seed=0)


@pytest.mark.parametrize(("split", "count"), [("test", 1319), ("train", 7473)])
def test_gsm8k(split: str, count: int) -> None:
    if not GSM8K.is_dir():
        pytest.skip("no GSM8K here")
    prompts = load(str(GSM8K / f"{split}.jsonl"), split, prompt_key="question")
    assert len(prompts) == count
    assert prompts[-1].id == f"{split}-{count - 1}"
    assert all("#### " in prompt.answer and not prompt.extra for prompt in prompts)


def table(folder: Path, *columns: Any, **named: Any) -> str:
    """A parquet file of the given (name, array) columns."""
    path = folder / "prompts.parquet"
    arrays = dict(columns) | named
    pyarrow.parquet.write_table(pyarrow.table(arrays), path)
    return str(path)


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        (pyarrow.array([b"1+2=", b"3+4="]), "bytes b'1+2='; store the column as text"),
        (pyarrow.array([b"1+2="], pyarrow.large_binary()), "bytes b'1+2='; store the column"),
        (pyarrow.array([{"text": "1+2="}]), "{'text': '1+2='}; "),
        (pyarrow.array([["1+2="]]), "['1+2=']; "),
        (pyarrow.array([True]), "True; "),
        (pyarrow.array([1.5]), "1.5; "),
        (pyarrow.array([None], pyarrow.string()), "None; "),
        (pyarrow.array([datetime.date(2025, 1, 2)]), "date datetime.date(2025, 1, 2); "),
    ],
)
def test_columns_that_are_no_text(tmp_path: Path, prompt: Any, found: str) -> None:
    answers = pyarrow.array(["1"] * len(prompt))
    path = table(tmp_path, prompt=prompt, answer=answers)
    with pytest.raises(ValueError) as caught:
        load(path)
    start = "data.prompt_key = 'prompt': row 1 of prompts.parquet must hold text there, not "
    assert str(caught.value).replace(" (1 more like it)", "").startswith(start + found)
    with pytest.raises(ValueError, match=r"row 1 of prompts.parquet must hold text or a number|^$"):
        path = table(tmp_path, prompt=pyarrow.array(["1+2="] * len(prompt)), answer=prompt)
        if "1.5" not in found:
            load(path)
        else:
            assert [p.answer for p in load(path)] == ["1.5"]
            raise ValueError("")


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("18.0", "18"),
        ("-0.0", "0"),
        ("2.50", "2.5"),
        ("1e-05", "0.00001"),
        ("3e+08", "300000000"),
        ("1e23", "1" + "0" * 23),
        ("12345678901234567890123", "12345678901234567890123"),
        ("-7", "-7"),
        ("9" * 401, "9" * 401),  # beyond any float
        ('"18.0"', "18.0"),
    ],
)
def test_numbers_in_jsonl(tmp_path: Path, written: str, text: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "1", "answer": {written}}}\n')
    assert load(str(path))[0].answer == text


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (pyarrow.array([18.0]), "18"),
        (pyarrow.array([0.1], pyarrow.float32()), "0.1"),
        (pyarrow.array([np.float16(0.1)], pyarrow.float16()), "0.1"),
        (pyarrow.array([2**64 - 1], pyarrow.uint64()), "18446744073709551615"),
        (pyarrow.array([Decimal("18.00")]), "18"),
        (pyarrow.array([Decimal("12345678901234567890.120")]), "12345678901234567890.12"),
        (pyarrow.array(["18"]).dictionary_encode(), "18"),
    ],
)
def test_numbers_in_parquet(tmp_path: Path, values: Any, text: str) -> None:
    prompts = pyarrow.array(["1+2="])
    assert load(table(tmp_path, prompt=prompts, answer=values))[0].answer == text
    inside = pyarrow.StructArray.from_arrays([values], ["right"])
    path = table(tmp_path, prompt=prompts, graded=inside)
    assert load(path, answer_key="graded.right")[0].answer == text


@pytest.mark.parametrize("answer", [True, None, float("inf"), {"a": 1}])
def test_answers_that_are_neither(tmp_path: Path, answer: Any) -> None:
    with pytest.raises(ValueError) as caught:
        load(jsonl(tmp_path, row(), row(answer=answer), row(), row(answer=answer)))
    assert str(caught.value) == (
        "data.answer_key = 'answer': row 2 of prompts.jsonl must hold text or a number there, not "
        f"{answer!r} (1 more like it); correct it, or store it as the text that it is to be "
        "compared with"
    )


@pytest.mark.parametrize("key", ["prompt", "answer"])
def test_a_nul_character(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=rf"^data.{key}_key = .*: row 2 of .* a NUL character"):
        load(jsonl(tmp_path, row(), {**row(), key: "1\0"}))


def test_half_a_character_in_stored_messages(tmp_path: Path) -> None:
    stored = '[{"role": "user", "content": "\\ud83d"}]'
    with pytest.raises(ValueError, match=r"^data.prompt_key = .*: row 1 .* holds '.ud83d' in mes"):
        load(jsonl(tmp_path, row(stored)), chat=True)


def test_text_in_parquet_that_is_none(tmp_path: Path) -> None:
    """Parquet stores bytes and says that they are text; nobody has looked."""
    raw = pyarrow.array([b"1", b"2", b"\xff"])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    path = table(tmp_path, prompt=text, answer=pyarrow.array(["1"] * 3))
    with pytest.raises(ValueError) as caught:
        load(path)
    assert str(caught.value).startswith(
        f"data.source = {path!r}: column 'prompt' is not UTF-8 in row 3 ("
    )


def test_columns_of_one_name(tmp_path: Path) -> None:
    columns = [pyarrow.array(["1"])] * 3
    pyarrow.parquet.write_table(
        pyarrow.table(columns, names=["prompt", "answer", "prompt"]), tmp_path / "p.parquet"
    )
    with pytest.raises(ValueError, match=r"has two columns 'prompt'; rename one of them$"):
        load(str(tmp_path / "p.parquet"))


def test_bytes_beside_the_prompt_are_counted_only(tmp_path: Path) -> None:
    columns = {"prompt": ["1"], "answer": ["1"], "image": [{"bytes": b"12345"}]}
    path = table(tmp_path, **{name: pyarrow.array(values) for name, values in columns.items()})
    assert load(path)[0].extra == {"image": {"bytes": "<5 bytes>"}}


def test_what_is_no_number_beside_the_prompt_is_null(tmp_path: Path) -> None:
    given = {"a": [float("nan"), float("-inf")], "b": "NaN"}
    assert load(jsonl(tmp_path, row(**given)))[0].extra == {"a": [None, None], "b": "NaN"}


def test_singles_in_lists_are_what_was_meant(tmp_path: Path) -> None:
    singles = pyarrow.array([[0.1, None], None], pyarrow.list_(pyarrow.float32()))
    path = table(tmp_path, prompt=["1", "2"], answer=["1", "2"], singles=singles)
    assert [prompt.extra["singles"] for prompt in load(path)] == [[0.1, None], None]


@pytest.mark.parametrize("kind", ["date32", "timestamp", "duration"])
def test_times_farther_than_pythons(tmp_path: Path, kind: str) -> None:
    made = {
        "date32": pyarrow.array([2**30], pyarrow.int32()).cast(pyarrow.date32()),
        "timestamp": pyarrow.array([2**62], pyarrow.timestamp("us")),
        "duration": pyarrow.array([2**61], pyarrow.duration("ms")),
    }
    with pytest.raises(ValueError, match="column 'when' holds what cannot be read"):
        load(table(tmp_path, prompt=["1"], answer=["1"], when=made[kind]))


def test_times_finer_than_pythons(tmp_path: Path) -> None:
    """As pandas writes them."""
    answers = {"prompt": pyarrow.array(["1"]), "answer": pyarrow.array(["1"])}
    times = pyarrow.array([1], pyarrow.timestamp("ns"))
    (prompt,) = load(table(tmp_path, **answers, at=times))
    assert prompt.extra == {"at": "1970-01-01 00:00:00.000000001"}
    if find_spec("pandas") is not None:  # which has times that are fine enough
        return
    inside = pyarrow.StructArray.from_arrays([times], ["at"])
    with pytest.raises(ValueError, match=r"^data.source = .*: column 'x' holds what .*; store it"):
        load(table(tmp_path, **answers, x=inside))


def test_keys_inside_of_columns(tmp_path: Path) -> None:
    rows = [
        {"extra_info": {"question": "1+2="}, "reward_model": {"ground_truth": "3", "style": "r"}},
        {"extra_info": {"question": "3+4="}, "reward_model": {"ground_truth": "7", "style": "r"}},
    ]
    keys = {"prompt_key": "extra_info.question", "answer_key": "reward_model.ground_truth"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "prompts.parquet")
    for path in (jsonl(tmp_path, *rows), str(tmp_path / "prompts.parquet")):
        prompts = load(path, **keys)
        assert [(p.text, p.answer) for p in prompts] == [("1+2=", "3"), ("3+4=", "7")]
        assert [p.extra for p in prompts] == rows  # nothing of a column is lost
    path = jsonl(tmp_path, {"a.b": "1", "answer": "2", "a": {"b": "3"}})
    assert load(path, prompt_key="a.b")[0].text == "1"  # a column of this very name


@pytest.mark.parametrize(
    ("columns", "rule"),
    [
        ({"a": {"c": 1, "d": 2}}, "row 1 of prompts.jsonl has no 'b' in 'a', only 'c', 'd'; "),
        ({"a": None}, "row 1 of prompts.jsonl holds None in 'a', which has no 'b'; "),
        ({"c": 1}, "row 1 of prompts.jsonl has no such column, only 'c'; "),
    ],
)
def test_keys_that_lead_nowhere(tmp_path: Path, columns: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError) as caught:
        load(jsonl(tmp_path, columns), prompt_key="a.b")
    assert str(caught.value).startswith(f"data.prompt_key = 'a.b': {rule}")


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    path = tmp_path / "twice.jsonl"
    outer, inner = '{"prompt": "1", "prompt": "2"}', '{"x": [{"prompt": 1, "prompt": 1}]}'
    for line in (outer, inner):
        path.write_text(line)
        with pytest.raises(ValueError, match="an object has the key 'prompt' twice"):
            load(str(path))


def test_bytes_as_python_prints_them(tmp_path: Path) -> None:
    for printed in ("b'1+2='", 'b"it\'s"'):
        with pytest.raises(ValueError, match=r"row 1 of prompts\.jsonl holds bytes"):
            load(jsonl(tmp_path, row(printed)))
        assert load(jsonl(tmp_path, row(answer=printed)))[0].answer == printed  # of code, perhaps
    assert load(jsonl(tmp_path, row("b'1' + b'2'")))[0].text == "b'1' + b'2'"


def test_several_files(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first, second = jsonl(tmp_path, row(), row("3+4=")), jsonl(tmp_path / "other", row("5*5="))
    prompts = load([first, second])
    assert [p.id for p in prompts] == ["train-0", "train-1", "train-1-0"]
    assert [p.text for p in prompts] == ["1+2=", "3+4=", "5*5="]
    jsonl(tmp_path, row(), row("3+4="), row("9="))  # a file that grows renames no other's rows
    assert [p.id for p in load([first, second])] == ["train-0", "train-1", "train-2", "train-1-0"]
    jsonl(tmp_path / "other", row(), row(7))
    with pytest.raises(ValueError, match=f": row 2 of {second} must hold"):  # of two
        load([first, second])


@pytest.mark.parametrize(
    ("names", "rule"),
    [
        (["a.jsonl", "none.jsonl"], "none.jsonl': there is no such file; correct the path"),
        (["a.jsonl", "./a.jsonl"], "a.jsonl twice; name every file once"),
        (["arithmetic", "a.jsonl"], "is generated and stands alone; name either it or files"),
        (["a.jsonl", "empty.jsonl"], "empty.jsonl': holds no rows; give a file with at least one "),
    ],
)
def test_lists_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], rule: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_bytes(ROW)
    Path("empty.jsonl").write_bytes(b"")
    with pytest.raises(ValueError) as caught:
        load(names, "test")
    assert str(caught.value).startswith("data.held_out = ") and rule in str(caught.value)


def test_rows_like_the_first_bad_one_are_counted(tmp_path: Path) -> None:
    path = jsonl(tmp_path, row(), row(7), row(answer=None), row(8), row(), row(9))
    with pytest.raises(
        ValueError, match=r"row 2 of .*, not 7 \(2 more like it\); correct it, or"
    ) as e:
        load(path)
    assert str(pickle.loads(pickle.dumps(e.value))) == str(e.value)
    Path(path).write_text(Path(path).read_text() + "{")
    with pytest.raises(ValueError, match=r"not 7 \(at least 2 more like it\); correct it, or"):
        load(path)


def test_repeated_prompts_are_counted(tmp_path: Path) -> None:
    options = {"split": "train", "tokenizer": TOKENIZER, "seed": 0}
    path = jsonl(tmp_path, row(), row("2"), row(), row(answer="4"), row("5"))
    loaded = read_prompts(DataConfig(), path, **options)
    assert (loaded.repeated, loaded.contradicting) == (2, 1)
    (tmp_path / "other").mkdir()
    other = jsonl(tmp_path / "other", row("2", answer="0"), row("9"), row("1+2= "))
    assert read_prompts(DataConfig(), other, **options).shared(loaded) == 1


def test_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("peergrad.prompts.sources.time.monotonic", lambda: next(clock))
    said: list[str] = []
    path = jsonl(tmp_path, *(row() for _ in range(4096)))
    read_prompts(DataConfig(), path, split="train", tokenizer=TOKENIZER, seed=0, heard=said.append)
    assert said == [
        "0 rows, 0% of prompts.jsonl",
        "1,024 rows, 25% of prompts.jsonl",
        "2,048 rows, 50% of prompts.jsonl",
        "3,072 rows, 75% of prompts.jsonl",
        "",
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_are_read_a_part_at_a_time(tmp_path: Path, kind: str) -> None:
    """Of 5000 rows, as many as a part are made before the first is used, and none is kept."""
    path = tmp_path / f"many.{kind}"
    rows = [row(f"{i}", str(i)) for i in range(5000)]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows) + "{")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    del rows
    load(jsonl(tmp_path, row()))  # whatever is imported is imported now
    gc.collect()
    before, most = count_dicts(), 0
    reading = read_rows(path, "data.source", str)
    for index in range(5000):  # the mistake after them has not been found
        assert next(reading).columns == row(str(index), str(index))
        if index % 1000 == 0:
            most = max(most, count_dicts() - before)
    assert most < 1100


def count_dicts() -> int:
    return sum(type(thing) is dict for thing in gc.get_objects())
