"""What comes along with weights: read once, of the model's folder and of nothing else in it."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from peergrad.parallel.hf import companions
from peergrad.parallel.hf.companions import Companions
from tests.models import CHAT_TEMPLATE, make_tokenizer

ALONG = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *(
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
    ),
    *("tokenizer.model.v3", "chat_template.jinja", "LICENSE", "LICENSE.txt", "README.md"),
    *("qwen.tiktoken", "additional_chat_templates/tools.jinja"),
]
STAYING = [
    *("model.safetensors", "model-00001-of-00002.safetensors", "adapter_model.safetensors"),
    *("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "last.ckpt"),
    *("tf_model.h5", "flax_model.msgpack", "model.onnx", "model.onnx_data", "model-q4.gguf"),
    *("weights.npz", "rust_model.ot", "model.mlmodel", "consolidated.00.pth", "dump.tar"),
    *("model.safetensors.index.json", "pytorch_model.bin.index.json"),
    *("model.safetensors.index.fp16.json", "tf_model.h5.index.json"),
    *("adapter_config.json", "trainer_state.json", "quantize_config.json"),
    *("hf_quant_config.json", ".gitattributes", ".cache/x.json", "original/params.json"),
    *("additional_chat_templates/weights.bin", "modeling_x.py"),
]


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name.endswith(".json") else f"of {name}")


def files_of(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_configuration_tokenizer_and_templates_come_along_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path / "a", ALONG + STAYING)
    Companions.read(tmp_path / "a").write(tmp_path / "b", dtype=None)
    assert files_of(tmp_path / "b") == set(ALONG)
    for name in ALONG:
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_comes_along_where_a_configuration_names_it(tmp_path: Path, file: str) -> None:
    fill(tmp_path, ["config.json", "tokenizer_config.json", "modeling_x.py"])
    for value, along in (({}, False), ({"AutoModel": "modeling_x.X"}, True)):
        (tmp_path / file).write_text(json.dumps({"auto_map": value}))
        assert ("modeling_x.py" in Companions.read(tmp_path).files) is along


def test_a_folder_that_is_changed_or_gone_after_the_start_changes_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "a", ["config.json", "chat_template.jinja"])
    kept = Companions.read(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("another")
    kept.write(tmp_path / "b", dtype=None)
    shutil.rmtree(tmp_path / "a")
    kept.write(tmp_path / "c", dtype=None)
    for copy in ("b", "c"):
        assert (tmp_path / copy / "chat_template.jinja").read_text() == "of chat_template.jinja"


def test_transformers_finds_all_templates_in_a_copy(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tools": "tools {{ messages }}"}
    tokenizer.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "additional_chat_templates").is_dir()
    Companions.read(tmp_path / "a").write(tmp_path / "b", dtype=None)
    found = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert found.chat_template == tokenizer.chat_template


def test_links_are_followed(tmp_path: Path) -> None:
    """A folder of the hub's cache holds nothing but links."""
    fill(tmp_path / "blobs", ["1"])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").symlink_to("../blobs/1")
    Companions.read(tmp_path / "a").write(tmp_path / "b", dtype=None)
    assert (tmp_path / "b" / "config.json").read_text() == "of 1"
    assert not (tmp_path / "b" / "config.json").is_symlink()


def test_what_cannot_come_along_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, ["config.json", "notes.txt"])
    monkeypatch.setattr(companions, "LIMIT", 8)
    (tmp_path / "notes.txt").write_text("123456789")
    with pytest.raises(ValueError) as caught:
        Companions.read(tmp_path, "--hf")
    assert str(caught.value) == (
        f"--hf = '{tmp_path}': notes.txt has 9 bytes, too many for configuration or tokenizer; "
        "move it elsewhere"
    )
    (tmp_path / "notes.txt").unlink()
    (tmp_path / "tokenizer.json").symlink_to("nowhere")
    with pytest.raises(ValueError) as caught:
        Companions.read(tmp_path)
    assert str(caught.value) == (
        f"model.path = '{tmp_path}': tokenizer.json cannot be read (No such file or directory); "
        "correct the file or its permissions"
    )
