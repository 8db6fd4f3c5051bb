"""Real conversions there and back on two ranks: the bits, what is said, what a full disk leaves and
how much memory it takes; and what a verification finds."""

import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.disk import small_disk
from tests.models import MIXTURES, make_hf_model
from tests.ports import free_port
from tests.spawn import run_ranks


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
    from peergrad import verify
    from peergrad.convert import hf_to_megatron, megatron_to_hf, run

    found = []
    os.chdir(root)
    for number, command in enumerate(commands):
        sys.argv = ["convert", *command.split()]
        source = sys.argv[1]
        os.environ["MASTER_PORT"] = str(ports[number])
        said = Path(f"said.{os.environ['RANK']}.{number}")
        with redirected(said):
            if "--out" not in command:
                status = verify.run("x")
            else:
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
    make_hf_model(tmp_path / "experts", family="mixtral", layers=2, **MIXTURES["mixtral"])
    commands = [
        "--hf m --out new/ckpt --tensor 2",
        "--checkpoint new/ckpt --out back --pipeline 2",
        "--checkpoint new/ckpt --out rounded --dtype bfloat16",
        "--hf m --out x --tensor 3",
        "--hf head --out x",
        "--hf m --out disk/x",
        "--hf m --checkpoint new/ckpt --tensor 2",
        "--hf rounded --checkpoint new/ckpt --pipeline 2",
        "--hf experts --out spread --tensor 2",
        "--checkpoint spread --out together --pipeline 2",
    ]
    ports = [free_port() for _ in commands]
    with small_disk(tmp_path / "disk", "200k"):
        first, second = run_ranks(2, convert_all, str(tmp_path), commands, ports)
        assert os.listdir(tmp_path / "disk") == []
    there, back, rounded, layout, head, full, same, narrower, *experts = first
    # Rank 0 speaks. What both find before they have met, the other says in the end: with torchrun
    # it would not live to do so.
    assert [said for _, said in second if "[rank 1 on " not in said] == [""] * 9, second
    assert [status for status, _ in first] == [0, 0, 0, 2, 2, 1, 0, 0, 0, 0]
    assert [status for status, _ in second] == [0, 0, 0, 2, 2, 1, 0, 0, 0, 0]
    total = sum(t.numel() for t in load_file(tmp_path / "m" / "model.safetensors").values())
    size = f"2 layers, {total:,} parameters"
    assert there[1].splitlines()[-1].startswith(f"wrote new/ckpt: {size}, float32, ")
    assert there[1].endswith(" s; every tensor read back and compared\n")
    assert f"wrote rounded: {size}, bfloat16 (rounded from float32), " in rounded[1]
    steps = [line.partition("  waiting for ")[2] for line in back[1].splitlines()]
    assert [step for step in steps if step] == [
        "the libraries to load",
        "new/ckpt to be verified",
        "back to be written",
        "what was written to be read back",
        "logits to be compared",
    ]
    assert same_files(tmp_path / "m", tmp_path / "back")
    assert same_files(tmp_path / "experts", tmp_path / "together")
    assert all(gap_in(said)[0] == "float32" for _, said in experts)
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
    assert "error: --hf = 'head': config.json says tie_word_embeddings = true, but lm_" in head[1]
    assert (
        "error: checkpoint = 'disk/x': cannot be written, the disk has too little space ("
        in full[1]
    )
    assert sorted(os.listdir(tmp_path / "new")) == ["ckpt", "ckpt.manifest.json"]
    gaps = [gap_in(said) for _, said in (there, back, rounded, same, narrower)]
    assert [kind for kind, *_ in gaps] == [*["float32"] * 2, "bfloat16", "float32", "bfloat16"]
    assert all(largest < limit for _, largest, limit in gaps)
    assert gaps[0][1] < 1e-4 < gaps[2][1] < 1
    lines = same[1].splitlines()
    assert lines[-1] == "m and new/ckpt hold the same 29 tensors, and give the same logits"
    assert "no manifest lies beside m" in lines and "no manifest lies beside new/ckpt" not in lines
    manifest = json.loads((tmp_path / "rounded.manifest.json").read_text())
    assert manifest["source"] == str(tmp_path / "new" / "ckpt")
    assert manifest["logits"]["dtype"] == manifest["dtype"] == "bfloat16"
    one, other = (manifest["tensors"][side]["model.norm.weight"] for side in ("hf", "megatron"))
    stored = load_file(tmp_path / "rounded" / "model.safetensors")["model.norm.weight"]
    digest = xxhash.xxh3_128_hexdigest(stored.view(torch.uint8).numpy())
    assert one == f"bfloat16 (64,) {digest}" and other.startswith("float32 (64,) ")
    assert digest not in other
    find_damage(tmp_path)


def gap_in(said: str) -> tuple[str, float, float]:
    """(precision, largest difference, its limit) of the logits, as a conversion says them."""
    found = re.search(r"transformers, in (\w+): at most (\S+) apart \(limit (\S+)\)", said)
    assert found is not None, said
    return found[1], float(found[2]), float(found[3])


def convert_and_compare(root: str, commands: list[str], ports: list[int]) -> tuple[Any, ...]:
    """What ``convert_all`` finds, and whether logits of swapped tensors pass in each precision."""
    from peergrad.config import Dtype, ParallelConfig
    from peergrad.parallel.against_hf import logits_gap
    from peergrad.parallel.mesh import init_mesh

    found = convert_all(root, commands, ports)
    os.environ["MASTER_PORT"] = str(ports[-1])
    mesh = init_mesh(ParallelConfig(), seed=0)
    pair = Path("swap"), Path("new/ckpt"), ParallelConfig()
    gaps = [logits_gap(*pair, dtype, mesh) for dtype in (Dtype.float32, Dtype.bfloat16)]
    return found, [(gap.fits, str(gap)) for gap in gaps]


def find_damage(root: Path) -> None:
    """Every kind of damage to copies of ``back`` and ``new/ckpt`` is found, by name."""
    gate = "model.layers.1.mlp.gate_proj.weight"
    for name in ("bit", "swap", "few", "cut", "other", "edited", "strange"):
        shutil.copytree(root / "back", root / name)
        shutil.copy(root / "back.manifest.json", root / f"{name}.manifest.json")
    for name in ("ckpt_bit", "ckpt_cut", "ckpt_hole"):
        shutil.copytree(root / "new" / "ckpt", root / name)
    weights = load_file(root / "back" / "model.safetensors")
    flip(root / "bit" / "model.safetensors", weights[gate])
    other = gate.replace("1", "0")
    swapped = {gate: weights[other], other: weights[gate]}
    save_file({**weights, **swapped}, root / "swap" / "model.safetensors")
    few = {n: t for n, t in weights.items() if n not in ("model.norm.weight", gate)}
    save_file({**few, "model.more": torch.zeros(2)}, root / "few" / "model.safetensors")
    os.truncate(root / "cut" / "model.safetensors", 100_000)
    shutil.copy(root / "rounded.manifest.json", root / "other.manifest.json")
    text = (root / "back.manifest.json").read_text()
    (root / "edited.manifest.json").write_text(text.replace('"float32"', '"float16"', 1))
    config = root / "strange" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_dropout": "much"}))
    files = sorted((root / "ckpt_bit" / "model").glob("*.distcp"))
    flip(
        next(f for f in files if weights[gate].numpy().tobytes()[:64] in f.read_bytes()),
        weights[gate],
    )
    cut = root / "ckpt_cut" / "model" / files[0].name
    os.truncate(cut, 30_000)
    described = root / "ckpt_hole" / "model" / ".metadata"
    metadata = pickle.loads(described.read_bytes())
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop()
    described.write_bytes(pickle.dumps(metadata))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    commands = [
        "--hf bit --checkpoint new/ckpt",
        "--hf swap --checkpoint new/ckpt",
        "--hf few --checkpoint new/ckpt",
        "--hf cut --checkpoint new/ckpt",
        "--hf other --checkpoint new/ckpt",
        "--hf edited --checkpoint new/ckpt",
        "--hf back --checkpoint ckpt_bit",
        "--hf back --checkpoint ckpt_cut",
        "--hf back --checkpoint ckpt_hole",
        "--hf head --checkpoint new/ckpt",
        "--hf lfs --out x",
        "--hf strange --checkpoint new/ckpt",
    ]
    ports = [free_port() for _ in [*commands, "the logits"]]
    ((found, gaps),) = run_ranks(1, convert_and_compare, str(root), commands, ports)
    assert not any(fits for fits, _ in gaps), gaps
    assert [status for status, _ in found] == [*[2] * 11, 0], found
    said = [text.splitlines() for _, text in found]
    (
        bit,
        swap,
        few_said,
        cut_said,
        other_said,
        edited,
        ckpt_bit,
        ckpt_cut,
        hole,
        head,
        lfs,
        strange,
    ) = said
    assert "error: --hf = 'lfs': model.safetensors is a Git-LFS pointer" in lfs[-1]
    assert "logits not compared: transformers cannot load or run strange (" in strange[-2]
    assert strange[-1] == "strange and new/ckpt hold the same 29 tensors, logits not compared"
    pair = "error: --hf = 'bit' and --checkpoint = 'new/ckpt': "
    remedy = "convert again from the one that is right"
    assert bit[-3:] == [
        f"{gate} differs",
        f"{gate} in the HF folder is not what bit.manifest.json says",
        f"{pair}{gate} differs (the first of 1 wrong; 29 tensors read); {remedy}",
    ]
    assert f"{other} differs (the first of 2 wrong; 29 tensors read)" in swap[-1]
    assert {f"{gate} differs", f"{other} differs"} < set(swap)
    assert {f"{name} is missing in the HF folder" for name in (gate, "model.norm.weight")} | {
        "model.more is extra in the HF folder"
    } < set(few_said)
    assert (
        len(cut_said) == 2 and "'cut': model.safetensors is not whole: 100000 bytes" in cut_said[1]
    )
    assert "other.manifest.json is the manifest of another conversion (" in other_said[-1]
    assert "edited.manifest.json has another content than was written (XXH3) (" in edited[-1]
    assert f"{gate} differs (the first of 2 wrong; 29 tensors read)" in ckpt_bit[-1]
    assert ckpt_bit[-2].startswith("ckpt_bit is damaged: model/__")
    assert f"cannot be read: ckpt_cut/model/{cut.name} is damaged (" in ckpt_cut[-1]
    assert not any("back.manifest.json" in line for line in ckpt_cut)  # all of back is as it was
    assert ckpt_cut[-2] == (
        f"ckpt_cut is damaged: model/{cut.name} has 30000 bytes instead of "
        f"{(root / 'new' / 'ckpt' / 'model' / cut.name).stat().st_size}"
    )
    down = "model.layers.1.mlp.down_proj.weight cannot be read: ckpt_hole/model holds not all of "
    assert f"{down}decoder.layers.mlp.linear_fc2.weight (the first of 2 wrong" in hole[-1]
    assert "is of another model (family llama instead of qwen3 in --hf)" in head[-1]
    after = {path: path.stat().st_mtime_ns for path in root.rglob("*") if "said." not in path.name}
    assert {p: t for p, t in before.items() if p in after and p != root} == {
        p: t for p, t in after.items() if p != root
    }


def flip(file: Path, tensor: torch.Tensor) -> None:
    """Turn one bit of what ``file`` holds of ``tensor``."""
    content = bytearray(file.read_bytes())
    content[content.index(tensor.numpy().tobytes()[:64]) + 5] ^= 4
    file.write_bytes(content)


def convert_to_files(root: str, commands: list[str], ports: list[int]) -> list[tuple[int, str]]:
    """``convert_all``, to HF files of 50 MB."""
    from peergrad.parallel import streaming

    streaming.SHARD_BYTES = 50_000_000
    return convert_all(root, commands, ports)


@pytest.mark.distributed
def test_memory_is_that_of_a_layer(tmp_path: Path) -> None:
    """By the kernel's own high-water mark: each way takes the largest layer and at most 48 MB, less
    than half of the model."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_key_value_heads": 8}
    model = make_hf_model(tmp_path / "m", layers=1, head_dim=64, **sizes)
    weights = load_file(model / "model.safetensors")
    for i in range(1, 10):
        layer = {n.replace(".0.", f".{i}."): t.clone() for n, t in weights.items() if ".0." in n}
        weights |= layer
    save_file(weights, model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    del config["layer_types"]
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10}))
    commands = [
        "--hf m --out ckpt --no-logits",
        "--checkpoint ckpt --out back --no-logits",
        "--hf back --checkpoint ckpt --no-logits",
    ]
    ports = [free_port() for _ in commands]
    (found,) = run_ranks(1, convert_to_files, str(tmp_path), commands, ports)
    assert [status for status, _ in found] == [0, 0, 0], found
    back = tmp_path / "back"
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(f.name for f in back.glob("*.safetensors*")) == [
        *files,
        "model.safetensors.index.json",
    ]
    assert all((back / file).stat().st_size < 51e6 for file in files)
    written = {n: t for file in files for n, t in load_file(back / file).items()}
    assert weights.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in weights.items())
    total = sum(tensor.nbytes for tensor in weights.values())
    largest = sum(tensor.nbytes for name, tensor in weights.items() if ".0." in name)
    for folder in ("ckpt", "back"):
        memory = json.loads((tmp_path / f"{folder}.manifest.json").read_text())["memory"]
        assert memory["largest_layer"] == largest
        assert memory["peak"] - memory["before"] < largest + 48e6 < total / 2


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
