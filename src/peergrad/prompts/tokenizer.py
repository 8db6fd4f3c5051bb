"""The tokenizer of a model folder, and whether it can serve a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peergrad.config import require
from peergrad.config.rules import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class TokenizerFacts:
    """What a run needs to know of a tokenizer.

    Example:
        Qwen3: ``TokenizerFacts(size=151669, end=151645, chat=True)``
    """

    size: int  # ids that it may give: 0 to size - 1
    end: int
    chat: bool  # whether it has a chat template


def load_tokenizer(path: str, key: str = "model.path") -> "PreTrainedTokenizerBase":
    """The tokenizer of folder ``path``, which ``key`` names.

    Raises ValueError if there is none, if it cannot be read or has no end token.
    """
    from transformers import AutoTokenizer  # here: a second that light importers need not wait

    files = [file for name in FILES if (file := Path(path) / name).is_file()]
    remedy = "copy the tokenizer's files of the original model there"
    require(bool(files), key, path, "the folder holds no tokenizer", remedy)
    for file in files:
        with file.open("rb") as stream:
            pointer = stream.read(len(LFS)) == LFS
        rule = f"{file.name} is a Git-LFS pointer"
        require(not pointer, key, path, rule, "fetch the real file (git lfs pull)")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers raises whatever its readers raise
        rule = f"its tokenizer cannot be loaded ({type(error).__name__}: {one_line(error)})"
        raise ValueError(f"{key} = {path!r}: {rule}; {remedy}") from error
    require(
        tokenizer.eos_token_id is not None,
        key,
        path,
        "its tokenizer has no end token, so no answer would ever end",
        "set eos_token in tokenizer_config.json",
    )
    return tokenizer


def tokenizer_facts(
    tokenizer: "PreTrainedTokenizerBase", path: str, *, vocab: int, chat: bool
) -> TokenizerFacts:
    """Compare the tokenizer of ``path`` with a model of ``vocab`` tokens; ``chat``: whether prompts
    go through its template. Raises ValueError if they do not fit."""
    size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
    require(
        size <= vocab,
        "model.path",
        path,
        f"its tokenizer knows {size} ids, but the model (vocab_size) only {vocab}",
        "use the model's own tokenizer",
    )
    facts = TokenizerFacts(size, int(tokenizer.eos_token_id), bool(tokenizer.chat_template))
    require(
        facts.chat or not chat,
        "data.chat",
        chat,
        f"the tokenizer of {path} has no chat template",
        "set data.chat=false, or use a chat model's tokenizer",
    )
    return facts
