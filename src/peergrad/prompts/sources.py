"""From a generator or a file of rows to tokenised prompts."""

import codecs
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peergrad.config import DataConfig, require
from peergrad.config.rules import one_line
from peergrad.data import Prompt
from peergrad.prompts import arithmetic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Row:
    """One row of a source.

    Example:
        ``_Row(index=3, where="row 4 of gsm8k.jsonl", columns={"prompt": "1+2=", "answer": "3"})``
    """

    index: int
    where: str
    columns: dict[str, Any]

    def column(self, option: str, name: str) -> Any:
        require(
            name in self.columns,
            option,
            name,
            f"{self.where} has no such column, only {', '.join(map(repr, self.columns)) or 'none'}",
            "name one that every row has",
        )
        return self.columns[name]


@dataclass(frozen=True)
class Loaded:
    """The prompts of a source, and how many of its rows were too long to be among them.

    Example:
        ``Loaded(prompts=[...], left_out=12)``
    """

    prompts: list[Prompt]
    left_out: int


def load_prompts(
    config: DataConfig,
    source: str,
    *,
    split: str,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
) -> list[Prompt]:
    """The prompts of ``source``, with a warning in the log if some are too long: ``read_prompts``
    without the count.

    Example:
        >>> prompts = load_prompts(DataConfig(), "arithmetic", split="test", tokenizer=t, seed=0)
        >>> prompts[0].id, prompts[0].text, prompts[0].answer
        ('test-0', '27+50=', '77')
    """
    loaded = read_prompts(config, source, split=split, tokenizer=tokenizer, seed=seed)
    if loaded.left_out:
        total = len(loaded.prompts) + loaded.left_out
        logger.warning(
            "%s: left out %d of %d prompts, longer than data.max_prompt_tokens = %d",
            source, loaded.left_out, total, config.max_prompt_tokens,
        )  # fmt: skip
    return loaded.prompts


def read_prompts(
    config: DataConfig,
    source: str,
    *,
    split: str,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
) -> Loaded:
    """Read, check, render and tokenise every prompt of ``source``.

    ``source`` is ``arithmetic`` (``seed`` decides its order) or a .jsonl / .parquet file. The first
    row has the id ``"<split>-0"``, and dropping a long prompt renames no other. Columns other than
    prompt and answer go to ``Prompt.extra``. Raises ValueError for whatever is wrong with a row.
    """
    option = "data.source" if split == "train" else "data.held_out"
    check_source(source, option)
    if source == "arithmetic":
        rows = _generate(config, split, seed)
    else:
        rows = list(_read(Path(source), option))
    require(bool(rows), option, source, "holds no rows", "give a file with at least one prompt")
    texts = [_render(config, row, tokenizer) for row in rows]
    # A chat template writes the special tokens itself.
    encoded = tokenizer(texts, add_special_tokens=not config.chat, verbose=False)["input_ids"]
    prompts = [
        _prompt(config, f"{split}-{row.index}", row, text, tokens)
        for row, text, tokens in zip(rows, texts, encoded, strict=True)
    ]
    return _drop_long(config.max_prompt_tokens, source, prompts)


def check_source(source: str, option: str) -> None:
    """Raise ValueError unless ``source`` is ``arithmetic`` or a file of a kind that can be read;
    looks at the name alone and needs no tokenizer."""
    if source == "arithmetic":
        return
    path = Path(source)
    try:
        folder, file = path.is_dir(), path.is_file()
    except OSError as error:  # a name that no file can have
        raise ValueError(f"{option} = {source!r}: {error.strerror}; correct the path") from error
    remedy = f"name one of the files in it, as in {option}={path / 'train.jsonl'}"
    require(not folder, option, source, "is a folder, not a file", remedy)
    rule = "must be arithmetic or a .jsonl or .parquet file"
    if path.suffix not in READERS:
        packed = {".gz": "unpack it first", ".zst": "unpack it first", ".bz2": "unpack it first"}
        require(False, option, source, rule, packed.get(path.suffix, "convert it to one of these"))
    require(file, option, source, "there is no such file", "correct the path")


def _generate(config: DataConfig, split: str, seed: int) -> list[_Row]:
    return [
        _Row(i, f"row {i + 1}", {config.prompt_key: text, config.answer_key: answer})
        for i, (text, answer) in enumerate(arithmetic.problems(split, seed))
    ]


def _read(path: Path, option: str) -> Iterator[_Row]:
    try:
        for index, row in READERS[path.suffix](path, option):
            where = f"row {index + 1} of {path.name}"
            require(isinstance(row, dict), option, str(path), f"{where} is no object", "correct it")
            yield _Row(index, where, row)
    except OSError as error:
        rule = f"cannot be read ({one_line(error.strerror or error)})"
        raise ValueError(f"{option} = {str(path)!r}: {rule}; correct its permissions") from error


def _read_jsonl(path: Path, option: str) -> Iterator[tuple[int, Any]]:
    """Blank lines hold nothing but count, so that row numbers are line numbers."""
    for index, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()):
        if line.strip():
            try:
                row = json.loads(line.decode("utf-8"))
                if b"\\ud" in line.lower():  # half of a pair can be written, but never recorded
                    json.dumps(row, ensure_ascii=False).encode("utf-8")
            except UnicodeError as error:
                rule = f"row {index + 1} of {path.name} is not UTF-8 ({one_line(error)})"
                raise ValueError(f"{option} = {str(path)!r}: {rule}; convert it") from error
            except (ValueError, RecursionError) as error:
                rule = f"row {index + 1} of {path.name} is not JSON ({one_line(error)})"
                raise ValueError(f"{option} = {str(path)!r}: {rule}; correct it") from error
            yield index, row


def _read_parquet(path: Path, option: str) -> Iterator[tuple[int, Any]]:
    import pyarrow  # here, because it takes longer to import than most files to read
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        rule = f"is not readable as parquet ({one_line(error)})"
        raise ValueError(f"{option} = {str(path)!r}: {rule}; write it again") from error
    for index, row in enumerate(rows):
        # Rollouts are recorded as JSON with all columns: dates, decimals and bytes become text.
        yield index, json.loads(json.dumps(row, default=str))


READERS = {".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _render(config: DataConfig, row: _Row, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text that the model reads: the prompt itself, or its chat through the template."""
    prompt = row.column("data.prompt_key", config.prompt_key)
    if not config.chat:
        require(
            isinstance(prompt, str) and prompt != "",
            "data.prompt_key",
            config.prompt_key,
            f"{row.where} must hold text there, not {prompt!r:.60}",
            "correct it, or set data.chat=true for lists of messages",
        )
        return str(prompt)
    messages = _messages(config, row, prompt)
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program: it may raise anything
        rule = f"the tokenizer's chat template fails on {row.where} ({one_line(error)})"
        remedy = "correct the row, or use the tokenizer of a chat model"
        raise ValueError(f"data.chat = True: {rule}; {remedy}") from error
    return str(rendered)


def _messages(config: DataConfig, row: _Row, prompt: Any) -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    require(
        isinstance(messages, list) and messages != [] and all(map(_is_message, messages)),
        "data.prompt_key",
        config.prompt_key,
        f"{row.where} must hold text or a list of {{role, content}} there, not {prompt!r:.60}",
        "correct it",
    )
    if config.system is None:
        return list(messages)
    require(
        messages[0]["role"] != "system",
        "data.system",
        config.system,
        f"{row.where} brings a system message of its own",
        "unset it, or remove the message from the data",
    )
    return [{"role": "system", "content": config.system}, *messages]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(key), str) and message[key] for key in ("role", "content")
    )


def _prompt(config: DataConfig, id: str, row: _Row, text: str, tokens: list[int]) -> Prompt:
    answer = row.column("data.answer_key", config.answer_key)
    require(
        isinstance(answer, str | int) or (isinstance(answer, float) and math.isfinite(answer)),
        "data.answer_key",
        config.answer_key,
        f"{row.where} must hold text or a number there, not {answer!r:.60}",
        "correct it; columns of any other kind reach the reward in prompt.extra",
    )
    require(
        len(tokens) > 0,
        "data.prompt_key",
        config.prompt_key,
        f"{row.where} has a prompt of no tokens",
        "correct it: the first answer token is predicted from the prompt's last one",
    )
    used = (config.prompt_key, config.answer_key)
    extra = {key: value for key, value in row.columns.items() if key not in used}
    return Prompt(id, np.array(tokens, np.int32), text, str(answer), extra)


def _drop_long(limit: int, source: str, prompts: list[Prompt]) -> Loaded:
    kept = [prompt for prompt in prompts if len(prompt.tokens) <= limit]
    require(
        bool(kept),
        "data.max_prompt_tokens",
        limit,
        f"the shortest of the {len(prompts)} prompts of {source} has "
        f"{min(len(prompt.tokens) for prompt in prompts)} tokens",
        "raise it",
    )
    return Loaded(kept, len(prompts) - len(kept))
