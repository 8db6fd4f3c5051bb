"""HF folders: reading tensors, writing whole folders."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from peergrad.parallel.hf.companions import Companions
from peergrad.parallel.hf.files import open_tensors, write_hf
from peergrad.parallel.hf.folder import INDEX, read_folder
from peergrad.storage import StorageError
from tests.disk import small_disk
from tests.models import make_hf_model


def edit_config(path: Path, **changes: object) -> str:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return str(path)


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    with open_tensors(read_folder(folder)) as reader:
        return {name: reader.get(name) for name in sorted(reader.names())}


def write_x(value: torch.Tensor, source: Path, target: Path, **options: Any) -> None:
    write_hf([("x", value)], target, companions=Companions.read(source), **options)


@torch.no_grad()
def logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    return model(torch.arange(24)[None] * 5).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_what_is_written_is_the_same_model_to_transformers(
    tmp_path: Path, family: str, tied: bool
) -> None:
    source = make_hf_model(tmp_path / "a", layers=2, family=family, tied=tied)
    target = tmp_path / "b"
    tensors = read_all(source)
    stream = list(tensors.items())
    write_hf(stream, target, companions=Companions.read(source), shard_bytes=100_000)
    assert (target / INDEX).exists()
    assert len(list(target.glob("model-*-of-*.safetensors"))) > 1
    assert all(torch.equal(tensors[name], found) for name, found in read_all(target).items())
    assert read_folder(target).tensors.keys() == tensors.keys()
    assert torch.equal(logits(source), logits(target))


@pytest.mark.parametrize("said", [["dtype"], ["torch_dtype"], ["dtype", "torch_dtype"], []])
def test_the_configuration_says_the_precision_of_what_is_written(
    tmp_path: Path, said: list[str]
) -> None:
    """In the spelling that it has; transformers then loads those very numbers."""
    source, target = make_hf_model(tmp_path / "a", layers=1), tmp_path / "b"
    values = json.loads((source / "config.json").read_text())
    values = {key: value for key, value in values.items() if "dtype" not in key}
    values |= dict.fromkeys(said, "float16")
    (source / "config.json").write_text(json.dumps(values))
    for kind in (torch.float32, torch.bfloat16):
        stream = [(name, tensor.to(kind)) for name, tensor in read_all(source).items()]
        write_hf(stream, target, companions=Companions.read(source))
        name = str(kind).removeprefix("torch.")
        found = json.loads((target / "config.json").read_text())
        assert found == {**values, **dict.fromkeys(said or ["dtype"], name)}
        loaded = AutoModelForCausalLM.from_pretrained(target).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in stream)
        assert {tensor.dtype for tensor in loaded.values()} == {kind}
    # Of several precisions none is claimed.
    write_hf([*stream, ("x", torch.zeros(2))], target, companions=Companions.read(source))
    assert json.loads((target / "config.json").read_text()) == values


def test_writing_replaces_an_older_folder_only_when_complete(tmp_path: Path) -> None:
    source, target = make_hf_model(tmp_path / "a", layers=1), tmp_path / "b"
    write_x(torch.zeros(2), source, target)

    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield "x", torch.ones(2)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_hf(failing(), target, companions=Companions.read(source))
    assert read_all(target)["x"].tolist() == [0, 0]
    write_x(torch.ones(2), source, target)
    assert read_all(target)["x"].tolist() == [1, 1]


def test_the_model_that_was_read_is_never_written_over(tmp_path: Path) -> None:
    source = make_hf_model(tmp_path / "a", layers=1)
    (tmp_path / "link").symlink_to(source)
    before = read_all(source)
    for target in (source, tmp_path / "link"):
        with pytest.raises(ValueError, match=r"is the folder of the model that was read; write to"):
            write_x(torch.ones(2), source, target)
    assert read_all(source).keys() == before.keys()
    assert sorted(os.listdir(tmp_path)) == ["a", "link"]


def test_a_file_that_changes_after_its_header_was_read_is_named(tmp_path: Path) -> None:
    source = make_hf_model(tmp_path / "a", layers=1)
    folder = read_folder(source, "model.reference")
    (source / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    rule = r"^model.reference = '.+': tensor lm_head.weight in model.safetensors cannot be read \("
    with open_tensors(folder) as reader, pytest.raises(ValueError, match=rule):
        reader.get("lm_head.weight")


def test_a_full_disk_leaves_the_older_folder(tmp_path: Path) -> None:
    """The link's own disk is written, and none but it: nothing is renamed across devices."""
    source = make_hf_model(tmp_path / "a", layers=1)
    (tmp_path / "run").mkdir()
    target = tmp_path / "run" / "hf"
    with small_disk(tmp_path / "disk", "3m") as disk:
        target.symlink_to(disk / "hf")
        write_x(torch.zeros(2), source, target)
        with pytest.raises(StorageError) as caught:
            write_x(torch.zeros(1 << 20), source, target)
        line = str(caught.value)
        assert line.startswith(
            f"HF checkpoint = '{disk}/hf': cannot be written, the disk has too little space"
        )
        assert read_all(target)["x"].tolist() == [0, 0]
        write_x(torch.ones(2), source, target)
        assert read_all(target)["x"].tolist() == [1, 1]
        assert target.is_symlink() and os.listdir(disk) == ["hf"]
        assert os.listdir(target.parent) == ["hf"]
