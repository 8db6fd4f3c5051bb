"""Loading prompts: ids, rendering, dropped rows, and one clear line for each mistake."""

import datetime
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from peergrad.config import DataConfig
from peergrad.data import Prompt
from peergrad.prompts import arithmetic, load_prompts, read_prompts
from tests.models import make_tokenizer

GSM8K = Path(__file__).parents[3] / "../shared/data/gsm8k"
TOKENIZER = make_tokenizer()
ROW = b'{"prompt": "?", "answer": "1"}\n'


def load(source: str, split: str = "train", seed: int = 0, **options: Any) -> list[Prompt]:
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
    (tmp_path / "train.jsonl").mkdir()
    for path in (tmp_path, tmp_path / "train.jsonl"):
        with pytest.raises(ValueError, match=r"^data.held_out = .*: is a folder, not a file; name"):
            load(str(path), "test")


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
