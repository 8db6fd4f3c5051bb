"""The program that writes checkpoints in FP8: what it writes, and what a person gets wrong."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peergrad import fp8, quantise
from peergrad.config import Fp8Scales
from peergrad.parallel.hf import files
from tests.models import make_hf_model

SIZES = {
    **{"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 64, "intermediate_size": 256},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("quantise") / "model", layers=2, **SIZES)


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs the program: (exit status, its last line, those of errors)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["quantize_fp8", *map(str, arguments)])
        monkeypatch.setattr("logging.basicConfig", lambda **kwargs: None)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as it does, and here it is undone
        status = quantise.run("Quantise.")
        said = capfd.readouterr()
        return status, said.out.splitlines()[-1] if said.out else "", said.err

    return run


@pytest.mark.parametrize("scales", Fp8Scales)
def test_a_checkpoint_in_fp8_is_what_a_run_sends(model, tmp_path, monkeypatch, run, scales):
    monkeypatch.setattr(files, "SHARD_BYTES", 100_000)
    out = tmp_path / "out"
    status, line, errors = run("--hf", model, "--out", out, "--scales", scales.name)
    assert (status, errors) == (0, "")
    assert line.startswith(f"wrote {out}: {scales.name} scales, ")
    assert line.endswith("every tensor read back and compared")
    expected = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        expected |= dict(fp8.served(name, tensor.to(torch.bfloat16), scales))
    written = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8)), name
    config = json.loads((out / "config.json").read_text())
    found = config.pop("quantization_config")
    assert found.get("scale_fmt") == ("ue8m0" if scales is Fp8Scales.power_of_two else None)
    assert config == {**json.loads((model / "config.json").read_text()), "dtype": "bfloat16"}
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    status, _, errors = run("--hf", out, "--out", tmp_path / "again")
    assert status == 2 and "quantization_config = {" in errors
    assert not (tmp_path / "again").exists()


def test_what_a_person_gets_wrong_is_one_line(model, tmp_path, run):
    (tmp_path / "there").mkdir()
    narrow = tmp_path / "narrow"
    shutil.copytree(model, narrow)
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps({**config, "intermediate_size": 250}))
    for source, out, line in (
        (model, tmp_path / "there", "exists already; name a new folder"),
        (model, model / "x", "is inside --hf; name a folder beside it"),
        (tmp_path / "none", tmp_path / "x", "is not there; correct the path"),
        (narrow, tmp_path / "x", "needs multiples of 128, and the model has 250 rows of an MLP"),
    ):
        status, _, errors = run("--hf", source, "--out", out)
        assert status == 2 and line in errors and errors.count("\n") == 1, errors
    assert not (tmp_path / "x").exists()


def test_what_does_not_read_back_is_removed(model, tmp_path, monkeypatch, run):
    answer = files.TensorReader.get

    def spoilt(reader, name):
        tensor = answer(reader, name)
        damaged = reader._folder.key == "--out" and name == "model.norm.weight"
        return tensor + 1 if damaged else tensor

    monkeypatch.setattr(files.TensorReader, "get", spoilt)
    status, _, errors = run("--hf", model, "--out", tmp_path / "out")
    assert status == 1 and "does not read back as it was written (model.norm.weight)" in errors
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite_leaves_nothing_behind(model, tmp_path, run):
    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][5, 5] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    status, _, errors = run("--hf", broken, "--out", tmp_path / "out")
    assert status == 2 and f"{name}: has values that are not finite" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
