"""Which files of an HF folder hold its weights, and what is in them; no torch is imported.

The index decides, or else ``model.safetensors``: what lies beside them is left over from something
else, and never read. A folder that says two things is refused. The check before a run and the run
itself both read through this, a few kilobytes of each file.
"""

import os
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NoReturn

from peergrad.config import require
from peergrad.parallel.hf.header import AGAIN, FETCH, LFS, Stored, read_header
from peergrad.parallel.hf.strict_json import parse, shown
from peergrad.parallel.hf.tensors import HARMLESS

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
WEIGHT_SUFFIXES = (".safetensors", *PICKLES, ".gguf", ".h5", ".msgpack", ".onnx", ".npz")


@dataclass(frozen=True)
class Folder:
    """An HF folder as its manifest describes it.

    Example:
        ``Folder(path=Path("models/a"), key="model.path", tensors={"lm_head.weight": Stored(...)},
        unread=("model_ema.safetensors",))``
    """

    path: Path
    key: str  # what errors call the folder
    tensors: dict[str, Stored]
    unread: tuple[str, ...]  # names of files with weights beside those that count

    def require(self, ok: bool, rule: str, remedy: str) -> None:
        require(ok, self.key, str(self.path), rule, remedy)

    def unread_line(self) -> str | None:
        """What to tell of the files that were not read; None if there are none."""
        if not self.unread:
            return None
        return f"{self.key} = {str(self.path)!r}: not read, beside its weights: {some(self.unread)}"


def read_folder(path: str | Path, key: str = "model.path") -> Folder:
    """The tensors of HF folder ``path``, which errors call ``key``, from the headers of its files.

    Raises ValueError if a file is missing or not whole, or if the folder says two things.
    """
    folder = Path(path)
    try:
        present = sorted(os.listdir(folder))
        manifest = _manifest(folder, key) if INDEX in present else None
        if manifest is None and WEIGHTS not in present:
            _refuse_absence(folder, key, present)
        files = {WEIGHTS} if manifest is None else set(manifest.values())
        # transformers takes the one, engines the other.
        one = manifest is None or WEIGHTS not in present or files == {WEIGHTS}
        rule = f"holds two models: {WEIGHTS}, and the files that {INDEX} names"
        require(one, key, str(path), rule, "move one of the two elsewhere")
        headers = {name: read_header(folder / name, key) for name in sorted(files)}
    except OSError as error:
        named = Path(os.fsdecode(error.filename or "")).name
        what = f"{shown(named)} " if named and named != folder.name else ""
        remedy = f"correct {'the file' if what else 'the path'} or its permissions"
        rule = f"{what}cannot be read ({error.strerror or type(error).__name__})"
        raise ValueError(f"{key} = {str(path)!r}: {rule}; {remedy}") from error
    tensors = _joined(folder, key, headers)
    if manifest is not None:
        _compare(folder, key, manifest, tensors)
    unread = [n for n in present if n.endswith(WEIGHT_SUFFIXES) and n not in files]
    return Folder(folder, key, tensors, tuple(unread))


def _manifest(folder: Path, key: str) -> dict[str, str]:
    """Tensor -> file of the index."""

    def check(ok: bool, rule: str, remedy: str = AGAIN) -> None:
        require(ok, key, str(folder), f"{INDEX} {rule}", remedy)

    text = (folder / INDEX).read_bytes()
    check(not text.startswith(LFS), "is a Git-LFS pointer", FETCH)
    try:
        index = parse(text)
    except ValueError as error:
        rule = f"{INDEX} is no index of safetensors files ({error})"
        raise ValueError(f"{key} = {str(folder)!r}: {rule}; {AGAIN}") from error
    found = index.get("weight_map") if isinstance(index, dict) else None
    sane = isinstance(found, dict) and found and all(type(f) is str for f in found.values())
    check(bool(sane), "is no index of safetensors files")
    assert isinstance(found, dict)
    for name in sorted(set(found.values())):
        plain = PurePath(name).name == name and name.endswith(".safetensors")
        check(plain, f"names {shown(name)}, which is no safetensors file of this folder")
        there, remedy = os.path.lexists(folder / name), "download the missing shards"
        if (folder / WEIGHTS).exists():
            remedy += f", or remove the index if {WEIGHTS} is the model"
        check(there, f"names {shown(name)}, which is not there", remedy)
    return found


def _refuse_absence(folder: Path, key: str, present: list[str]) -> NoReturn:
    """No manifest: say what is there instead."""
    others = [n for n in present if n.endswith(".safetensors")]
    foreign = [n for n in present if n.endswith(WEIGHT_SUFFIXES) and n not in others]
    if ADAPTER in others:
        rule = f"holds an adapter ({ADAPTER}), not a model"
        remedy = "merge it into its base model (peft: merge_and_unload, save_pretrained)"
    elif others:
        rule = f"holds neither {WEIGHTS} nor {INDEX}, only {some(others)}"
        remedy = f"download what is missing, or rename the file that is the model to {WEIGHTS}"
    elif foreign and foreign[0].endswith(PICKLES):
        rule = "holds its weights as pickles, not as *.safetensors"
        remedy = f"convert it ({some(foreign)}): load it with transformers and call save_pretrained"
    elif foreign:
        rule = f"holds no *.safetensors file, only {some(foreign)}"
        remedy = "download the safetensors files of that model"
    else:
        rule = "holds no *.safetensors file"
        remedy = "point it at a complete HF checkpoint"
    raise ValueError(f"{key} = {str(folder)!r}: {rule}; {remedy}")


def _joined(folder: Path, key: str, headers: dict[str, dict[str, Stored]]) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for file, found in headers.items():
        for name, tensor in found.items():
            other = tensors.setdefault(name, tensor).file.name
            rule = f"tensor {shown(name)} is in two files, {other} and {file}"
            require(other == file, key, str(folder), rule, "download both again")
    return tensors


def _compare(folder: Path, key: str, manifest: dict[str, str], tensors: dict[str, Stored]) -> None:
    """The index and the files must tell of the same tensors in the same places."""
    for name, file in manifest.items():
        there = tensors[name].file.name if name in tensors else "none of its files"
        rule = f"{INDEX} places tensor {shown(name)} in {file}, but it is in {there}"
        require(there == file, key, str(folder), rule, "download index and shards again")
    for name, tensor in tensors.items():
        known = name in manifest or HARMLESS.fullmatch(name) is not None
        rule = f"tensor {shown(name)} is in {tensor.file.name}, but {INDEX} does not name it"
        require(known, key, str(folder), rule, "download index and shards again")


def some(names: list[str] | tuple[str, ...], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more
