"""From what a row holds as its prompt to the text that the model reads."""

import json
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from peergrad.config import DataConfig, require
from peergrad.config.rules import one_line
from peergrad.prompts.files import Row
from peergrad.prompts.rows import BadRow, Key, require_text, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "developer", "user", "assistant", "tool")
PYTHON_MESSAGES = re.compile(
    r"\s*(array\()?\[?\s*\{\s*'(role|content|from)'\s*:.*[\])}]\s*", re.DOTALL
)
"""Messages as Python or numpy prints them, as a CSV file in between leaves them."""
PYTHON_BYTES = re.compile(r"""b'[^'\n]*'|b"[^"\n]*\"""")
"""What ``str`` makes of bytes."""

Messages = list[dict[str, Any]]


class Renderer:
    """Renders the prompts of one source: as they are, or through the tokenizer's chat template."""

    def __init__(self, config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raises ValueError for a template argument that the template does not read."""
        self._config, self._tokenizer = config, tokenizer
        self._key = Key("data.prompt_key", config.prompt_key)
        self._template = _template(tokenizer) if config.chat else ""
        self._continued = 0
        self._lost, self._lost_where = 0, ""  # messages that the template left out
        for name, value in config.template_args.items():
            require(
                name in _variables(self._template),
                f"data.template_args.{name}",
                value,
                "the tokenizer's chat template reads no such variable",
                "remove it, or correct its name",
            )

    def render(self, row: Row) -> tuple[str, Messages | None]:
        """The text, and the messages that it was made of, if it is a chat. Raises BadRow."""
        prompt = self._key.of(row)
        if isinstance(prompt, str) and PYTHON_BYTES.fullmatch(prompt):
            rule = f"{row.where} holds bytes as Python prints them, {prompt!r:.60}"
            raise self._key.refusal(rule, "store the text that they encode")
        if self._config.chat:
            messages = self._with_system(row, self._messages(row, prompt))
            text = self._chat(row, messages)
            self._look_for(row, messages, text)
            return require_text(self._key, row, text), messages
        correct = "correct it, or set data.chat=true for lists of messages"
        if not isinstance(prompt, str) or not prompt.strip():
            rule = f"{row.where} must hold text there, not {shown(prompt)}"
            binary = isinstance(prompt, bytes)
            raise self._key.refusal(rule, "store the column as text" if binary else correct)
        if _stored(prompt) is not None or PYTHON_MESSAGES.fullmatch(prompt):
            rule = f"{row.where} holds messages as text, {prompt!r:.60}"
            raise self._key.refusal(rule, "set data.chat=true, or store the text itself")
        return require_text(self._key, row, prompt), None

    def _messages(self, row: Row, prompt: Any) -> Messages:
        if isinstance(prompt, str):
            if PYTHON_MESSAGES.fullmatch(prompt):
                rule = f"{row.where} holds messages as Python prints them, {prompt!r:.60}"
                raise self._key.refusal(rule, "store them as a list, or as JSON")
            stored = _stored(prompt)
            prompt = stored if stored is not None else [{"role": "user", "content": prompt}]
        if not isinstance(prompt, list) or not prompt:
            rule = f"{row.where} must hold text or a list of {{role, content}} there"
            raise self._key.refusal(f"{rule}, not {shown(prompt)}", "correct it")
        return [self._message(row, number, message) for number, message in enumerate(prompt, 1)]

    def _message(self, row: Row, number: int, message: Any) -> dict[str, Any]:
        """One message, its text in one piece; what is null in it is as good as absent."""
        where = f"{row.where} (message {number})"
        if not isinstance(message, dict):
            rule = f"{where} must be {{role, content}}, not {shown(message)}"
            raise self._key.refusal(rule, "correct it")
        role, content = message.get("role"), message.get("content")
        named = isinstance(role, str) and any(f"{q}{role}{q}" in self._template for q in "'\"")
        if role not in ROLES and not named:
            rule = f"{where} has the role {shown(role)}"
            raise self._key.refusal(rule, f"use one of {', '.join(ROLES)}")
        if isinstance(content, list):
            content = self._joined(where, content)
        if not content and message.get("tool_calls"):
            content = ""  # the calls are the message, and the template writes them
        elif not isinstance(content, str) or not content.strip():
            rule = f"{where} must hold text as its content, not {shown(content)}"
            raise self._key.refusal(rule, "correct it")
        require_text(self._key, row, content, f" in message {number}")
        kept = {name: value for name, value in message.items() if value is not None}
        return {**kept, "content": content}

    def _joined(self, where: str, parts: list[Any]) -> str:
        for part in parts:
            if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, dict) else None
                rule = f"{where} has a part that is no text, {shown(kind or part)}"
                raise self._key.refusal(rule, "leave such rows out: models here read text alone")
        return "".join(part["text"] for part in parts)

    def _with_system(self, row: Row, messages: Messages) -> Messages:
        system = self._config.system
        if system is None:
            return messages
        if messages[0]["role"] == "system":
            rule = f"{row.where} brings a system message of its own"
            raise BadRow("data.system", system, rule, "unset it, or remove the message of the data")
        return [{"role": "system", "content": system}, *messages]

    def _chat(self, row: Row, messages: Messages) -> str:
        going_on = messages[-1]["role"] == "assistant"
        if going_on and not self._config.continue_final_message:
            rule = f"{row.where} ends with a message of the assistant, which another would follow"
            remedy = "remove that message, or set data.continue_final_message=true to continue it"
            raise self._key.refusal(rule, remedy)
        self._continued += going_on
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=not going_on,
                    continue_final_message=going_on,
                    **self._config.template_args,
                )
            )
        except Exception as error:  # a template is a program: it may raise anything
            rule = f"the tokenizer's chat template fails on {row.where} ({one_line(error)})"
            remedy = "correct the row, or use the tokenizer of a chat model"
            raise BadRow("data.chat", True, rule, remedy) from error

    def _look_for(self, row: Row, messages: Messages, text: str) -> None:
        """Answers may lose their thoughts, and results of tools their form; the rest is meant to
        be read."""
        for number, message in enumerate(messages, 1):
            meant = message["role"] not in ("assistant", "tool")
            if meant and message["content"].strip() not in text:
                self._lost += 1
                where = f"{row.where}: message {number}, role {message['role']!r}"
                self._lost_where = self._lost_where or where
                return

    def notes(self, source: str) -> list[str]:
        """What is allowed, and perhaps not meant: a line of each kind."""
        found = []
        if self._config.continue_final_message and not self._continued:
            found.append(
                "data.continue_final_message=true has no effect: no conversation of "
                f"{source} ends with the assistant"
            )
        if self._lost:
            found.append(
                f"{self._lost} prompts of {source} lose a message in the chat template, which "
                f"does not write it as it is ({self._lost_where})"
            )
        return found


def _stored(text: str) -> Any:
    """What ``text`` is the JSON of, if that is messages, or one, or an object around them; None if
    it is just text."""
    if not text.lstrip().startswith(("[", "{", '"')):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, str):  # written as JSON twice
        return _stored(found)
    inner = found.get("messages", [found]) if isinstance(found, dict) else found
    return found if isinstance(inner, list) and inner and all(map(_is_message, inner)) else None


def _is_message(found: Any) -> bool:
    """Whether it is one, also in the form of ShareGPT, which is refused by name."""
    known = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
    return isinstance(found, dict) and any(keys <= found.keys() for keys in known)


def _template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The template that chats go through, of several the one for plain chats."""
    found: Any = tokenizer.chat_template or ""
    return str(found.get("default", "")) if isinstance(found, dict) else str(found)


@lru_cache
def _variables(template: str) -> frozenset[str]:
    """What a template reads and does not set itself; of one with tags of its own all names in its
    code, but not those in its text."""
    from jinja2 import Environment, TemplateError, meta

    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(template)))
    except TemplateError:
        pass
    try:
        tokens = list(environment.lex(template))
    except TemplateError:  # rendering will say what is wrong with it
        return frozenset()
    return frozenset(text for _, kind, text in tokens if kind == "name")
