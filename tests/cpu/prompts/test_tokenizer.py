"""Tokenizers that cannot serve a run are refused in one line."""

import json
import shutil
from pathlib import Path

import pytest

from peergrad.prompts import TokenizerFacts, load_tokenizer, tokenizer_facts
from tests.models import CHARACTERS, make_tokenizer

SIZE = 3 + len(CHARACTERS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, **changes: object) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load_tokenizer(str(folder))
    start, message = f"model.path = {str(folder)!r}: ", str(caught.value)
    assert message.startswith(start) and "\n" not in message and "; " in message
    return message.removeprefix(start)


def test_what_a_run_needs_to_know(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    facts = tokenizer_facts(tokenizer, "x", vocab=SIZE, chat=True)
    assert facts == TokenizerFacts(size=SIZE, end=1, chat=True)


def test_no_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert refusal(folder).startswith("the folder holds no tokenizer; copy ")


@pytest.mark.parametrize("text", ["{", "", "[]", "{}"])
def test_files_that_are_no_tokenizer(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    assert refusal(folder).startswith("its tokenizer cannot be loaded (")


def test_a_pointer_instead_of_the_file(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid 1")
    assert refusal(folder).startswith("tokenizer.json is a Git-LFS pointer; fetch the real file")


def test_no_end_token(folder: Path) -> None:
    edit(folder, eos_token=None)
    assert refusal(folder).startswith("its tokenizer has no end token, so no answer would ever end")


def test_more_ids_than_the_model_has(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    with pytest.raises(ValueError) as caught:
        tokenizer_facts(tokenizer, str(folder), vocab=SIZE - 1, chat=False)
    rule = f"its tokenizer knows {SIZE} ids, but the model (vocab_size) only {SIZE - 1}; use the "
    assert str(caught.value).startswith(f"model.path = {str(folder)!r}: {rule}")


def test_a_chat_needs_a_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(str(folder))
    assert not tokenizer_facts(tokenizer, "x", vocab=SIZE, chat=False).chat
    with pytest.raises(ValueError, match=r"^data.chat = True: the tokenizer of x has no chat temp"):
        tokenizer_facts(tokenizer, "x", vocab=SIZE, chat=True)
