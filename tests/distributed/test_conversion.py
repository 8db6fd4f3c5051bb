"""Real conversions there and back on two ranks: the bits, what is said, what a full disk leaves."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.disk import small_disk
from tests.models import make_hf_model
from tests.spawn import free_port, run_ranks


@contextmanager
def redirected(file: Path) -> Iterator[None]:
    """Everything that this process writes to its standard streams goes to ``file``."""
    kept = os.dup(1), os.dup(2)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.stdout.flush()
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept[0], 1), os.dup2(kept[1], 2)


def convert_all(root: str, commands: list[str], ports: list[int]) -> list[tuple[int, str]]:
    """(exit status, what was said) of each command line, each a job that meets at a port of its
    own."""
    from peergrad.convert import hf_to_megatron, megatron_to_hf, run

    found = []
    os.chdir(root)
    for number, command in enumerate(commands):
        sys.argv = ["convert", *command.split()]
        source = sys.argv[1]
        os.environ["MASTER_PORT"] = str(ports[number])
        said = Path(f"said.{os.environ['RANK']}.{number}")
        with redirected(said):
            status = run("x", source, hf_to_megatron if source == "--hf" else megatron_to_hf)
        found.append((status, said.read_text()))
    return found


@pytest.mark.distributed
def test_conversions_there_and_back(tmp_path: Path) -> None:
    make_hf_model(tmp_path / "m", family="llama", attention_bias=True, layers=2, vocab=125)
    leave_over(tmp_path / "m")
    make_hf_model(tmp_path / "lfs", layers=2)
    (tmp_path / "lfs" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/")
    make_hf_model(tmp_path / "head", layers=2, tied=True)
    give_head(tmp_path / "head")
    commands = [
        "--hf m --out new/ckpt --tensor 2",
        "--checkpoint new/ckpt --out back --pipeline 2",
        "--checkpoint new/ckpt --out rounded --dtype bfloat16",
        "--hf m --out x --tensor 3",
        "--hf lfs --out x",
        "--hf head --out x",
        "--hf m --out disk/x",
    ]
    ports = [free_port() for _ in commands]
    with small_disk(tmp_path / "disk", "200k"):
        first, second = run_ranks(2, convert_all, str(tmp_path), commands, ports)
        assert os.listdir(tmp_path / "disk") == []
    there, back, rounded, layout, pointer, head, full = first
    # Rank 0 speaks. What both find before they have met, the other says in the end: with torchrun
    # it would not live to do so.
    assert [said for _, said in second if "[rank 1 on " not in said] == [""] * 5, second
    assert [status for status, _ in first] == [0, 0, 0, 2, 2, 2, 1]
    assert [status for status, _ in second] == [0, 0, 0, 2, 2, 2, 1]
    total = sum(t.numel() for t in load_file(tmp_path / "m" / "model.safetensors").values())
    size = f"2 layers, {total:,} parameters"
    assert there[1].splitlines()[-1].startswith(f"wrote new/ckpt: {size}, float32, ")
    assert there[1].endswith(" s; every tensor read back and compared\n")
    assert f"wrote rounded: {size}, bfloat16 (rounded from float32), " in rounded[1]
    steps = [line.partition("  waiting for ")[2] for line in back[1].splitlines()]
    assert [step for step in steps if step] == [
        "the libraries to load",
        "new/ckpt to be read",
        "back to be written",
        "what was written to be read back",
    ]
    assert same_files(tmp_path / "m", tmp_path / "back")
    beside = "m': not read, beside its weights: model-00003-of-00003.safetensors, model_ema.safete"
    assert beside in there[1]
    # Float32 is kept, whatever config.json says of it, and then it says so itself.
    for path in ("m", "new/ckpt/hf", "back", "rounded"):
        kind = json.loads((tmp_path / path / "config.json").read_text())["torch_dtype"]
        assert kind == {"m": "float16", "rounded": "bfloat16"}.get(path, "float32")
    stored = {t.dtype for t in load_file(tmp_path / "rounded" / "model.safetensors").values()}
    assert stored == {torch.bfloat16}
    assert {"chat_template.jinja", "tokenizer.json"} < set(os.listdir(tmp_path / "back"))
    assert not (tmp_path / "back" / "adapter_config.json").exists()
    assert not (tmp_path / "new" / "latest").exists()
    assert "needs 3 processes and 2 processes were started" in layout[1]
    assert "error: --hf = 'lfs': model.safetensors is a Git-LFS pointer" in pointer[1]
    assert "error: --hf = 'head': config.json says tie_word_embeddings = true, but lm_" in head[1]
    assert (
        "error: checkpoint = 'disk/x': cannot be written, the disk has too little space ("
        in full[1]
    )
    assert sorted(os.listdir(tmp_path / "new")) == ["ckpt"]


def save_without_the_model(path: str, root: str) -> None:
    """Start on model ``path``, take that folder away, save and export."""
    from peergrad.config import CheckpointConfig, Config, Dtype, ModelConfig, ParallelConfig
    from peergrad.parallel.checkpoint import Checkpoints
    from peergrad.parallel.mesh import init_mesh
    from peergrad.parallel.policy import Policy

    config = Config(model=ModelConfig(path=path, dtype=Dtype.bfloat16))
    policy = Policy(config, init_mesh(ParallelConfig(), seed=0))
    (Path(path) / "chat_template.jinja").write_text("another")
    Path(path).rename(Path(root) / "gone")
    checkpoints = Checkpoints(Path(root) / "checkpoints", CheckpointConfig(), policy.mesh)
    checkpoints.save(policy, None, {}, None, step=1)
    policy.export(Path(root) / "hf")


@pytest.mark.distributed
def test_a_run_saves_and_exports_when_its_model_folder_is_gone(tmp_path: Path) -> None:
    model = make_hf_model(tmp_path / "m", layers=1)
    before = {p.name: p.read_bytes() for p in model.iterdir() if p.name != "model.safetensors"}
    config = json.loads(before.pop("config.json"))
    run_ranks(1, save_without_the_model, str(model), str(tmp_path))
    for folder in (tmp_path / "hf", tmp_path / "checkpoints" / "step_000001" / "hf"):
        for name, content in before.items():
            assert (folder / name).read_bytes() == content
        assert json.loads((folder / "config.json").read_text()) == {**config, "dtype": "bfloat16"}
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


def leave_over(model: Path) -> None:
    """Files beside the weights that are not the model's, and another precision in config.json."""
    weights = load_file(model / "model.safetensors")
    for name in ("model_ema", "model-00003-of-00003"):
        save_file({key: -tensor for key, tensor in weights.items()}, model / f"{name}.safetensors")
    (model / "adapter_config.json").write_text("{}")
    config = json.loads((model / "config.json").read_text())
    config.pop("dtype", None)
    (model / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))


def give_head(model: Path) -> None:
    """A head of its own, beside embeddings that config.json calls tied."""
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = -weights["model.embed_tokens.weight"]
    save_file(weights, model / "model.safetensors")


def same_files(one: Path, two: Path) -> bool:
    tensors: list[dict[str, Any]] = [load_file(p / "model.safetensors") for p in (one, two)]
    assert tensors[0].keys() == tensors[1].keys()
    return all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
