"""From a row to the text that the model reads: messages, roles, templates."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from peergrad.config import DataConfig
from peergrad.prompts import Loaded, read_prompts
from tests.models import CHAT_TEMPLATE, make_tokenizer

USER = {"role": "user", "content": "1+2="}
BEGUN = {"role": "assistant", "content": "it is "}
THINKING = CHAT_TEMPLATE + "{% if enable_thinking is false %}no thinking{% endif %}"


def read(path: Path, *prompts: Any, template: str = CHAT_TEMPLATE, **options: Any) -> Loaded:
    if path.is_dir():
        path = path / "rows.jsonl"
        path.write_text("".join(json.dumps({"prompt": p, "answer": "1"}) + "\n" for p in prompts))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    config = DataConfig(**{"chat": True, **options})
    return read_prompts(config, str(path), split="train", tokenizer=tokenizer, seed=0)


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        read(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def texts(*arguments: Any, **options: Any) -> list[str]:
    return [prompt.text for prompt in read(*arguments, **options).prompts]


def test_messages_reach_the_rewards(tmp_path: Path) -> None:
    prompts = read(tmp_path, "1+2=", [USER, BEGUN, USER], system="be brief").prompts
    system = {"role": "system", "content": "be brief"}
    assert [p.extra["messages"] for p in prompts] == [[system, USER], [system, USER, BEGUN, USER]]
    assert "messages" not in read(tmp_path, "1+2=", chat=False).prompts[0].extra


def test_a_column_named_messages_is_the_files(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"prompt": "1", "answer": "2", "messages": [3]}))
    assert read(path).prompts[0].extra == {"messages": [3]}


def test_messages_stored_as_text(tmp_path: Path) -> None:
    stored = json.dumps([USER, BEGUN, USER])
    assert texts(tmp_path, stored, " [1, 2] ", "[") == [
        "user: 1+2=\nassistant: it is \nuser: 1+2=\nassistant: ",
        "user:  [1, 2] \nassistant: ",  # a text like any other
        "user: [\nassistant: ",
    ]
    assert refusal(tmp_path, "1+2=", stored, chat=False).startswith(
        "data.prompt_key = 'prompt': row 2 of rows.jsonl holds messages as text, '[{"
    )
    for chat in (True, False):
        assert "row 1 of rows.jsonl holds" in refusal(tmp_path, str([USER]), chat=chat)
    bad = json.dumps([{"role": "user", "content": 5}])
    assert "row 1 of rows.jsonl (message 1) must hold text as its content" in refusal(tmp_path, bad)


@pytest.mark.parametrize(
    ("stored", "rule"),
    [
        (json.dumps(USER), "must hold text or a list of {role, content} there, not {'role':"),
        (json.dumps({"messages": [USER]}), "must hold text or a list of {role, content} there"),
        (json.dumps([{"from": "human", "value": "?"}]), "(message 1) has the role None"),
        (str(USER), "holds messages as Python prints them"),
        ("array([{'content': '?', 'role': 'user'}], dtype=object)", "holds messages as Python"),
    ],
)
def test_messages_stored_in_another_form(tmp_path: Path, stored: str, rule: str) -> None:
    assert f"row 1 of rows.jsonl {rule}" in refusal(tmp_path, stored)
    assert "row 1 of rows.jsonl holds messages as text, " in refusal(tmp_path, stored, chat=False)


def test_messages_stored_twice_as_text(tmp_path: Path) -> None:
    twice = json.dumps(json.dumps([USER]))
    assert texts(tmp_path, twice, '"1"') == ["user: 1+2=\nassistant: ", 'user: "1"\nassistant: ']
    assert "holds messages as text" in refusal(tmp_path, twice, chat=False)
    assert texts(tmp_path, '{"role": "admin"}', chat=False) == ['{"role": "admin"}']


def test_a_message_may_be_calls_alone(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    template = CHAT_TEMPLATE.replace("m.content", "m.content or m.tool_calls[0].function.name")
    found = texts(tmp_path, [USER, call, {"role": "tool", "content": "3"}], template=template)
    assert found == ["user: 1+2=\nassistant: add\ntool: 3\nassistant: "]


@pytest.mark.parametrize("chat", [True, False])
def test_white_space_is_no_prompt(tmp_path: Path, chat: bool) -> None:
    assert "not ' \\n'; correct it" in refusal(tmp_path, " \n", chat=chat)


@pytest.mark.parametrize(
    ("message", "rule"),
    [
        ({"role": "human", "content": "?"}, "has the role 'human'; use one of system, developer, "),
        ({"role": None, "content": "?"}, "has the role None; use one of "),
        ({"from": "human", "value": "?"}, "has the role None; use one of "),
        ({"role": "user", "content": None}, "must hold text as its content, not None; correct it"),
        ({"role": "user", "content": ""}, "must hold text as its content, not ''; correct it"),
        ({"role": "user", "content": 7}, "must hold text as its content, not 7; correct it"),
        ({"role": "user", "content": []}, "must hold text as its content, not ''; correct it"),
        (
            {"role": "user", "content": [{"type": "text", "text": "?"}, {"type": "image"}]},
            "has a part that is no text, 'image'; leave such rows out",
        ),
        ({"role": "user", "content": ["?"]}, "has a part that is no text, '?'; leave such rows"),
        ("?", "must be {role, content}, not '?'; correct it"),
    ],
)
def test_messages_that_are_none(tmp_path: Path, message: Any, rule: str) -> None:
    start = "data.prompt_key = 'prompt': row 2 of rows.jsonl (message 2) "
    assert refusal(tmp_path, "1", [USER, message, USER]).startswith(start + rule)


def test_a_role_of_the_template_is_known(tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'ipython' %}{% endif %}" + CHAT_TEMPLATE
    output = {"role": "ipython", "content": "3"}
    assert texts(tmp_path, [USER, output], template=template) == [
        "user: 1+2=\nipython: 3\nassistant: "
    ]


def test_text_in_parts_is_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "2="}]
    assert texts(tmp_path, [{"role": "user", "content": parts}]) == ["user: 1+2=\nassistant: "]


def test_what_is_null_in_a_message_is_absent(tmp_path: Path) -> None:
    """A parquet column of messages has every field in every message."""
    messages = [{**USER, "name": None}, {"role": "tool", "content": "3", "name": "sum"}]
    table = pyarrow.Table.from_pylist([{"prompt": messages, "answer": "3"}])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    template = "{% for m in messages %}{{ m.role }}{{ ' named' if 'name' in m }} {% endfor %}="
    assert texts(tmp_path / "rows.parquet", template=template) == ["user tool named ="]


def test_an_answer_that_is_begun(tmp_path: Path) -> None:
    assert refusal(tmp_path, "1+2=", [USER, BEGUN]) == (
        "data.prompt_key = 'prompt': row 2 of rows.jsonl ends with a message of the assistant, "
        "which another would follow; remove that message, or set "
        "data.continue_final_message=true to continue it"
    )
    known = CHAT_TEMPLATE.replace(":", "")  # the tokenizer has no colon
    options = {"continue_final_message": True, "template": known}
    begun = read(tmp_path, "1+2=", [USER, BEGUN], **options)
    assert [prompt.text for prompt in begun.prompts] == [
        "user 1+2=\nassistant ",
        "user 1+2=\nassistant it is ",
    ]
    assert begun.notes == ()
    assert read(tmp_path, "1+2=", **options).notes == (
        "data.continue_final_message=true has no effect: no conversation of "
        f"{tmp_path}/rows.jsonl ends with the assistant",
    )


def test_messages_that_the_template_leaves_out(tmp_path: Path) -> None:
    template = "{% for m in messages if m.role != 'developer' %}{{ m.content | trim }} {% endfor %}"
    order = {"role": "developer", "content": "be brief"}
    plain = {"role": "user", "content": " 1+2= "}  # templates may trim
    assert read(tmp_path, [plain], [order, USER], [order, USER], template=template).notes == (
        f"2 prompts of {tmp_path}/rows.jsonl lose a message in the chat template, which does not "
        "write it as it is (row 2 of rows.jsonl: message 1, role 'developer')",
    )


def test_what_a_template_sets_or_takes_out_of_messages_is_no_argument(tmp_path: Path) -> None:
    template = "{% set date = date or 'today' %}{% set own = 1 %}{{ date }}" + CHAT_TEMPLATE
    found = texts(tmp_path, "1", template=template, template_args={"date": "now"})
    assert found[0].startswith("now")
    for name in ("own", "m", "content", "role", "today"):
        assert "reads no such" in refusal(tmp_path, "1", template=template, template_args={name: 1})
    tagged = "{% generation %}{{ date }}{% endgeneration %}" + CHAT_TEMPLATE
    texts(tmp_path, "1", template=tagged, template_args={"date": "now"})


def test_arguments_of_the_template(tmp_path: Path) -> None:
    for value, end in ((False, "no thinking"), (True, "")):
        found = texts(tmp_path, "1", template=THINKING, template_args={"enable_thinking": value})
        assert found == [f"user: 1\nassistant: {end}"]
    comment = "{# enable_thinking #}enable_thinking{{ 'enable_thinking' }}" + CHAT_TEMPLATE
    for template in (CHAT_TEMPLATE, comment):
        assert refusal(
            tmp_path, "1", template=template, template_args={"enable_thinking": False}
        ) == (
            "data.template_args.enable_thinking = False: the tokenizer's chat template reads no "
            "such variable; remove it, or correct its name"
        )


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"template_args": {"a": 1}}, "data.template_args = {'a': 1}: has no effect without data"),
        ({"continue_final_message": True}, "data.continue_final_message = True: has no effect "),
        (
            {"system": ""},
            "data.system = '': has no effect without data.chat; set data.chat=true, or "
            "data.system=null",
        ),
        (
            {"chat": True, "template_args": {"add_generation_prompt": False}},
            "data.template_args = {'add_generation_prompt': False}: add_generation_prompt is set",
        ),
        ({"chat": True, "system": "\udce9"}, "data.system = '\\udce9': must be text without NUL"),
        ({"chat": True, "system": "\0"}, "data.system = '\\x00': must be text without NUL"),
        ({"source": []}, "data.source = []: must be the path of a file, or a list of such; "),
        ({"source": ["a.jsonl", 5]}, "data.source = ['a.jsonl', 5]: must be the path of a file, "),
        ({"source": None}, "data.source = None: must be the path of a file"),
        ({"held_out": {}}, "data.held_out = {}: must be the path of a file"),
    ],
)
def test_configuration(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError) as caught:
        DataConfig(**options)
    assert str(caught.value).startswith(rule)
