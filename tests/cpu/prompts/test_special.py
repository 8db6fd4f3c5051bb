"""Special tokens: what a prompt may begin and end with, and ids that the model does not know."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peergrad.config import DataConfig
from peergrad.prompts import Loaded, read_prompts
from tests.models import CHAT_TEMPLATE, make_tokenizer

BEGIN = "<pad>"  # any special token will do
SIZE = len(make_tokenizer())
CHAT = CHAT_TEMPLATE.replace(":", "")  # which the tokenizer does not know


def tokenizer(single: str = "$A", **changes: Any) -> PreTrainedTokenizerFast:
    """One that makes ``single`` of a text."""
    made = make_tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<eos>", 1), (BEGIN, 0), ("<far>", 500)]
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def read(folder: Path, made: Any, *prompts: Any, split: str = "train", **options: Any) -> Loaded:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "answer": "1"}) + "\n" for p in prompts))
    config = DataConfig(**options)
    return read_prompts(config, str(path), split=split, tokenizer=made, seed=0, vocab=SIZE)


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        read(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    """The tokenizer's own list says nothing of what its post-processor adds."""
    rule = f"row 1 of rows.jsonl has token 500, but the model (vocab_size) knows only {SIZE}"
    for split in ("train", "test"):
        found = refusal(tmp_path, tokenizer("<far> $A"), "1+2=", split=split)
        assert found == f"data.prompt_key = 'prompt': {rule}; use the model's own tokenizer"
    made = make_tokenizer()
    made.add_tokens(["<tool>"])
    found = refusal(tmp_path, made, "1+2=", "3<tool>")
    assert f"row 2 of rows.jsonl has token {SIZE} ('<tool>'), but the model" in found
    assert len(read(tmp_path, made, "1+2=", "3").prompts) == 2  # nothing else is wrong with it


def test_a_tokenizer_that_ends_every_prompt(tmp_path: Path) -> None:
    made = tokenizer("$A <eos>")
    made.save_pretrained(tmp_path / "model")
    made = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert refusal(tmp_path, made, "1+2=") == (
        f"model.path = '{tmp_path}/model': its tokenizer appends the end token '<eos>' to every "
        "text, so to the prompt in row 1 of rows.jsonl; take it out of post_processor in "
        "tokenizer.json"
    )
    made.add_eos_token = True  # those that have this flag build their post-processor of it
    assert refusal(tmp_path, made, "1").endswith(
        "; set add_eos_token=false in tokenizer_config.json"
    )
    read(tmp_path, made, "1+2=", chat=True)  # the template writes the special tokens


def test_a_tokenizer_that_appends_another_token(tmp_path: Path) -> None:
    """As one whose end token was replaced by that of chats."""
    made = tokenizer(f"$A {BEGIN}")
    assert f"its tokenizer appends {BEGIN!r} to every text" in refusal(tmp_path, made, "1+2=")
    read(tmp_path, made, "1+2=", chat=True)


def test_a_prompt_that_is_ended(tmp_path: Path) -> None:
    assert refusal(tmp_path, make_tokenizer(), "1<eos>+2=", "1+2=<eos>") == (
        "data.prompt_key = 'prompt': row 2 of rows.jsonl has a prompt that ends with the end token "
        "'<eos>', after which nothing is answered; remove it from the text"
    )
    made = tokenizer(chat_template="{{ messages[0].content }}<eos>")
    assert refusal(tmp_path, made, "1+2=", chat=True).startswith(
        "data.chat = True: the chat template ends row 1 of rows.jsonl with the end token '<eos>'; "
    )


@pytest.mark.parametrize("chat", [True, False])
def test_white_space_behind_the_end(tmp_path: Path, chat: bool) -> None:
    """As of a template that ends every message with a line break and opens no answer."""
    made = tokenizer(chat_template="{% for m in messages %}{{ m.content }}<eos>\n{% endfor %}")
    text = "1+2=" if chat else "1+2=<eos>\n"
    assert "with the end token '<eos>'" in refusal(tmp_path, made, text, chat=chat)
    read(tmp_path, made, "1+2=<eos>\n3+4=", "1<eos> 2")


def test_two_begin_tokens(tmp_path: Path) -> None:
    made = tokenizer(f"{BEGIN} $A", bos_token=BEGIN)
    assert read(tmp_path, made, "1+2=", "5").notes == ()
    assert read(tmp_path, made, "1", f"{BEGIN}1+2=", f"{BEGIN}5").notes == (
        f"2 of 3 prompts of {tmp_path}/rows.jsonl begin with '<pad>' twice: take one out of the "
        "text (row 2 of rows.jsonl: '<pad><pad>1+2=')",
    )


def test_no_begin_token(tmp_path: Path) -> None:
    made = tokenizer(f"{BEGIN} $A", bos_token=BEGIN, chat_template=CHAT)
    assert read(tmp_path, made, "1+2=", "1", chat=True).notes == (
        f"2 of 2 prompts of {tmp_path}/rows.jsonl begin without '<pad>': the chat template "
        "leaves it out (row 1 of rows.jsonl: 'user 1+2=\\nas')",
    )
    made.chat_template = "{{ bos_token }}" + CHAT
    assert read(tmp_path, made, "1+2=", chat=True).notes == ()
    # One that writes none of its own accord knows why.
    assert read(tmp_path, tokenizer(bos_token=BEGIN), "1+2=").notes == ()
    same = tokenizer(bos_token="<eos>", chat_template=CHAT)  # as GPT-2's, which is no beginning
    assert read(tmp_path, same, "1+2=", chat=True).notes == ()


def test_characters_without_a_token(tmp_path: Path) -> None:
    assert read(tmp_path, make_tokenizer(), "1+2=", "1#2=").notes == (
        f"1 of 2 prompts of {tmp_path}/rows.jsonl hold what the tokenizer knows only as '<unk>' "
        "(row 2 of rows.jsonl: '1<unk>2=')",
    )
