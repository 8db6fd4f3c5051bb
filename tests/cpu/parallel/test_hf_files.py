"""HF folders: reading, sharded writing, refusals."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from peergrad.parallel.hf.config import read_shape
from peergrad.parallel.hf.files import INDEX, open_tensors, write_hf
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
