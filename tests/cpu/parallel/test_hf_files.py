"""HF folders: reading, sharded writing, refusals."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from peergrad.parallel.hf.config import read_shape
from peergrad.parallel.hf.files import INDEX, open_tensors, write_hf
from peergrad.storage import StorageError
from tests.disk import small_disk
from tests.models import make_hf_model


def edit_config(path: Path, **changes: object) -> str:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return str(path)


def test_sharded_checkpoint_loads_in_transformers(tmp_path: Path) -> None:
    source, target = make_hf_model(tmp_path / "a", layers=2), tmp_path / "b"
    with open_tensors(source) as reader:
        stream = ((name, reader.get(name)) for name in sorted(reader.names()))
        write_hf(stream, target, companions=source, shard_bytes=100_000)
    assert (target / INDEX).exists()
    assert len(list(target.glob("model-*-of-*.safetensors"))) > 1
    ours = AutoModelForCausalLM.from_pretrained(target).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_writing_replaces_an_older_folder_only_when_complete(tmp_path: Path) -> None:
    source, target = make_hf_model(tmp_path / "a", layers=1), tmp_path / "b"
    write_hf([("x", torch.zeros(2))], target, companions=source)

    def failing() -> object:
        yield "x", torch.ones(2)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_hf(failing(), target, companions=source)
    with open_tensors(target) as reader:
        assert reader.get("x").tolist() == [0, 0]
    write_hf([("x", torch.ones(2))], target, companions=source)
    with open_tensors(target) as reader:
        assert reader.get("x").tolist() == [1, 1]


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    source = make_hf_model(tmp_path / "a", layers=1)
    with open_tensors(source) as reader, pytest.raises(ValueError, match=r"'model\.nope' is miss"):
        reader.get("model.nope")
    (source / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \*\.safetensors"), open_tensors(source):
        pass


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, 'model.safetensors is a Git LFS pointer, not the weights; run "git lfs pull"'),
        (b"", "model.safetensors is empty; download that file again"),
        (None, "model.safetensors is cut short or no safetensors file ("),  # None: half of it
        (b"<html>not found</html>", "model.safetensors is cut short or no safetensors file ("),
        (b"\xff" * 100, "model.safetensors is cut short or no safetensors file ("),
        ("folder", "model.safetensors cannot be read ("),
        ("link", "model.safetensors cannot be read (No such file or directory)"),
    ],
)
def test_a_file_that_holds_no_tensors_is_named(
    tmp_path: Path, content: bytes | str | None, message: str
) -> None:
    source = make_hf_model(tmp_path / "a", layers=1)
    file = source / "model.safetensors"
    whole = file.read_bytes()
    file.unlink()
    if content == "folder":
        file.mkdir()
    elif content == "link":  # into a cache that was cleaned
        file.symlink_to(tmp_path / "nowhere")
    else:
        assert not isinstance(content, str)
        file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError) as caught, open_tensors(source, key="model.reference"):
        pass
    line = str(caught.value)
    assert line.startswith(f"model.reference = '{source}': {message}"), line
    assert "\n" not in line


def test_a_folder_without_the_files_of_its_index_is_refused(tmp_path: Path) -> None:
    source, target = make_hf_model(tmp_path / "a", layers=2), tmp_path / "b"
    with open_tensors(source) as reader:
        stream = [(name, reader.get(name)) for name in sorted(reader.names())]
    write_hf(stream, target, companions=source, shard_bytes=100_000)
    shard = sorted(target.glob("model-00002-of-*"))[0]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name} is missing, which {INDEX} names; downl"):
        open_tensors(target).__enter__()
    for damaged in (LFS, b"{}", b"[]", b"\xff", b'{"weight_map": []}'):
        (target / INDEX).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{INDEX} is [^\n]*; download that file again$"):
            open_tensors(target).__enter__()
    (target / "x.bin").touch()
    (target / INDEX).unlink()
    for shard in target.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(ValueError, match=r"no \*\.safetensors file; convert x\.bin to safetensors"):
        open_tensors(target).__enter__()
    with pytest.raises(ValueError, match=r"cannot be read \(No such file or directory\)"):
        open_tensors(tmp_path / "nowhere").__enter__()


def test_tensors_of_another_size_or_kind_are_refused(tmp_path: Path) -> None:
    source, target = make_hf_model(tmp_path / "a", layers=1), tmp_path / "b"
    write_hf([("x", torch.zeros(2, dtype=torch.int8))], target, companions=source)
    with open_tensors(target) as reader, pytest.raises(ValueError, match=r"is stored as I8; use t"):
        reader.get("x")
    name = "model.layers.0.mlp.up_proj.weight"
    with open_tensors(source) as reader:
        assert reader.dtypes() == {"F32"}
        assert reader.get(name, (96, 64)).shape == (96, 64)
        with pytest.raises(
            ValueError, match=r"has shape \[96, 64\] where config.json asks for \[9"
        ):
            reader.get(name, (96, 65))


def test_a_full_disk_leaves_the_older_folder(tmp_path: Path) -> None:
    """The link's own disk is written, and none but it: nothing is renamed across devices."""
    source = make_hf_model(tmp_path / "a", layers=1)
    (tmp_path / "run").mkdir()
    target = tmp_path / "run" / "hf"
    with small_disk(tmp_path / "disk", "3m") as disk:
        target.symlink_to(disk / "hf")
        write_hf([("x", torch.zeros(2))], target, companions=source)
        with pytest.raises(StorageError) as caught:
            write_hf([("x", torch.zeros(1 << 20))], target, companions=source)
        line = str(caught.value)
        assert line.startswith(
            f"HF checkpoint = '{disk}/hf': cannot be written, the disk has too little space"
        )
        with open_tensors(target) as reader:
            assert reader.get("x").tolist() == [0, 0]
        write_hf([("x", torch.ones(2))], target, companions=source)
        with open_tensors(target) as reader:
            assert reader.get("x").tolist() == [1, 1]
        assert target.is_symlink() and os.listdir(disk) == ["hf"]
        assert os.listdir(target.parent) == ["hf"]


def test_a_model_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        write_hf([("x", torch.ones(2))], tmp_path / "b", companions=tmp_path / "gone", key="--hf")
    assert str(caught.value).startswith(f"--hf = '{tmp_path}/gone': configuration and tokenizer")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
    ],
)
def test_unsupported_models_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = edit_config(make_hf_model(tmp_path, layers=1), **changes)
    with pytest.raises(ValueError, match=message):
        read_shape(path)


def test_llama3_rope_scaling_is_read(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    path = edit_config(make_hf_model(tmp_path, family="llama", layers=1), rope_parameters=rope)
    shape = read_shape(path)
    assert (shape.rope_theta, shape.rope_factor) == (5e5, 32.0)
