"""What makes weights a usable model: configuration, tokenizer, templates, custom code.

A run reads them once, at its start: what happens to the model's folder later changes nothing that
is written. No torch is imported.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peergrad.config import require
from peergrad.parallel.hf.folder import WEIGHT_SUFFIXES
from peergrad.parallel.hf.strict_json import parse, shown

CONFIG = "config.json"
TEMPLATES = "additional_chat_templates"
"""The folder of transformers for further templates, ``<name>.jinja``."""
SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab", ".spm", ".bpe", ".md")
LEGAL = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
FOREIGN = ("adapter_config.json", "trainer_state.json")
"""Of an adapter, which would be looked for beside the weights, and of another training."""
QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Would make an engine read plain weights as codes."""
LIMIT = 64 << 20
"""Bytes of one file; the largest tokenizers have half of it."""
DTYPES = ("dtype", "torch_dtype")
"""The spellings in config.json; readers of today take the first of the two that is there."""


@dataclass(frozen=True)
class Companions:
    """The files beside the weights, in memory.

    Example:
        ``Companions(source=Path("models/a"), files={"config.json": b"{...}",
        "additional_chat_templates/tools.jinja": b"..."})``
    """

    source: Path
    files: Mapping[str, bytes]  # by the path inside the folder

    @classmethod
    def read(cls, folder: Path, key: str = "model.path") -> "Companions":
        """Those of HF folder ``folder``, which errors call ``key``.

        Raises ValueError for a file that cannot be read, or that is too large to be one of them.
        """
        try:
            files = {name: _content(folder, name, key) for name in _names(folder)}
        except OSError as error:
            what = shown(Path(os.fsdecode(error.filename or "")).name)
            rule = f"{what} cannot be read ({error.strerror or type(error).__name__})"
            raise ValueError(
                f"{key} = {str(folder)!r}: {rule}; correct the file or its permissions"
            ) from error
        if not any(_has_code(name, content) for name, content in files.items()):
            files = {n: content for n, content in files.items() if not n.endswith(".py")}
        return cls(folder, files)

    def write(self, target: Path, *, dtype: str | None) -> None:
        """Write them into the folder ``target``, made if need be; config.json then says that the
        weights are of precision ``dtype`` (``bfloat16``), with None what it said before."""
        target.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            file = target / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(with_dtype(content, dtype) if name == CONFIG and dtype else content)


def _names(folder: Path) -> list[str]:
    names = [name for name in sorted(os.listdir(folder)) if _wanted(name)]
    inner = folder / TEMPLATES
    templates = sorted(os.listdir(inner)) if inner.is_dir() else []
    names += [f"{TEMPLATES}/{name}" for name in templates if name.endswith(".jinja")]
    # Folders are left out; a link to nothing is not: that file is missing.
    return [n for n in names if (folder / n).is_file() or not (folder / n).exists()]


def _content(folder: Path, name: str, key: str) -> bytes:
    size = (folder / name).stat().st_size
    rule = f"{shown(name)} has {size} bytes, too many for configuration or tokenizer"
    require(size <= LIMIT, key, str(folder), rule, "move it elsewhere")
    return (folder / name).read_bytes()


def _wanted(name: str) -> bool:
    if name.startswith(".") or name in (*FOREIGN, *QUANTISED) or name.endswith(WEIGHT_SUFFIXES):
        return False
    if name.endswith(".json") and ".index." in name:  # of weight files: written anew if needed
        return False
    legal = name.upper().startswith(LEGAL)
    return legal or name.endswith((*SUFFIXES, ".py")) or name.startswith("tokenizer.model")


def _has_code(name: str, content: bytes) -> bool:
    """Whether a configuration names classes of the folder's own Python files."""
    if not name.endswith(".json") or b"auto_map" not in content:
        return False
    found = _parsed(content)
    return isinstance(found, dict) and bool(found.get("auto_map"))


def _parsed(content: bytes) -> Any:
    try:
        return parse(content)
    except ValueError:
        return None


def with_dtype(config: bytes, dtype: str) -> bytes:
    """config.json with the precision in the spelling that it has, in both if it has both."""
    found = _parsed(config)
    if not isinstance(found, dict):
        return config
    spellings = [name for name in DTYPES if name in found] or [DTYPES[0]]
    if all(found.get(name) == dtype for name in spellings):
        return config
    changed = {**found, **dict.fromkeys(spellings, dtype)}
    return (json.dumps(changed, indent=2) + "\n").encode()
