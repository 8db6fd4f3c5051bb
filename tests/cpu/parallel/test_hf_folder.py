"""HF folders are read by their manifest, and refused when they say two things or another model."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peergrad.parallel.hf.config import read_shape
from peergrad.parallel.hf.fit import check_weights, used_dtypes
from peergrad.parallel.hf.folder import INDEX, WEIGHTS, Folder, read_folder
from tests.models import make_hf_model

FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Untied and tied, 3 layers, 100 ids."""
    folder = tmp_path_factory.mktemp("originals")
    return {
        tied: make_hf_model(folder / str(tied), layers=3, vocab=100, tied=tied)
        for tied in (False, True)
    }


@pytest.fixture
def model(originals: dict[bool, Path], tmp_path: Path) -> Path:
    return shutil.copytree(originals[False], tmp_path / "m")


@pytest.fixture
def tied(originals: dict[bool, Path], tmp_path: Path) -> Path:
    return shutil.copytree(originals[True], tmp_path / "tied")


@pytest.fixture
def sharded(model: Path) -> Path:
    """The same in two shards and an index, with the head in the second."""
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    places = {name: SECOND if name in (HEAD, NORM) else FIRST for name in tensors}
    for file in (FIRST, SECOND):
        save_file({n: t for n, t in tensors.items() if places[n] == file}, model / file)
    write_index(model, places)
    return model


def write_index(folder: Path, places: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def index_of(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return found


def change(folder: Path, edit: Callable[[Tensors], object], file: str = WEIGHTS) -> None:
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file)


def configure(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def checked(folder: Path) -> Folder:
    return check_weights(str(folder), "model.path", read_shape(str(folder)))


def refusal(folder: Path) -> str:
    """What follows ``model.path = ...: `` in the one line that refuses ``folder``."""
    with pytest.raises(ValueError) as caught:
        checked(folder)
    start, line = f"model.path = {str(folder)!r}: ", str(caught.value)
    assert line.startswith(start) and re.fullmatch(r".+: .+; .+", line), line
    return line.removeprefix(start)


def places(folder: Folder) -> set[str]:
    return {tensor.file.name for tensor in folder.tensors.values()}


def test_left_over_files_never_win(model: Path) -> None:
    noise = {name: torch.randn_like(tensor) for name, tensor in load_file(model / WEIGHTS).items()}
    for name in ("model_ema.safetensors", "model-00003-of-00003.safetensors", "a.safetensors"):
        save_file(noise, model / name)
    (model / "pytorch_model.bin").touch()
    found = checked(model)
    assert places(found) == {WEIGHTS}
    assert found.unread_line() == (
        f"model.path = '{model}': not read, beside its weights: a.safetensors, "
        "model-00003-of-00003.safetensors, model_ema.safetensors and 1 more"
    )


def test_the_index_decides(sharded: Path) -> None:
    assert checked(sharded).unread_line() is None
    shutil.copy(sharded / FIRST, sharded / "model-00003-of-00003.safetensors")
    found = checked(sharded)
    assert places(found) == {FIRST, SECOND}
    assert found.unread == ("model-00003-of-00003.safetensors",)
    assert found.tensors.keys() == index_of(sharded).keys()


def place(folder: Path, **changes: Any) -> None:
    write_index(folder, {**index_of(folder), **changes})


ANEW = "download index and shards again"
SHARDED: list[tuple[Callable[[Path], object], str]] = [
    (
        lambda f: (f / FIRST).unlink(),
        f"{INDEX} names {FIRST}, which is not there; download the missing shards",
    ),
    (
        lambda f: place(f, **{"model.x": FIRST}),
        f"{INDEX} places tensor model.x in {FIRST}, but it is in none of its files; {ANEW}",
    ),
    (
        lambda f: place(f, **{HEAD: FIRST}),
        f"{INDEX} places tensor {HEAD} in {FIRST}, but it is in {SECOND}; {ANEW}",
    ),
    (
        lambda f: write_index(f, {n: p for n, p in index_of(f).items() if n != HEAD}),
        f"tensor {HEAD} is in {SECOND}, but {INDEX} does not name it; {ANEW}",
    ),
    (
        lambda f: change(f, lambda t: t.update({UP: torch.ones(96, 64)}), SECOND),
        f"tensor {UP} is in two files, {FIRST} and {SECOND}; download both again",
    ),
    (
        lambda f: save_file({"x": torch.ones(1)}, f / WEIGHTS),
        f"holds two models: {WEIGHTS}, and the files that {INDEX} names; move one of the two else",
    ),
    (
        lambda f: place(f, **{HEAD: "../x.safetensors"}),
        f"{INDEX} names ../x.safetensors, which is no safetensors file of this folder; downl",
    ),
    (
        lambda f: place(f, **{HEAD: "/etc/x.safetensors"}),
        f"{INDEX} names /etc/x.safetensors, which is no safetensors file of this folder; ",
    ),
    (lambda f: place(f, **{HEAD: "pytorch_model.bin"}), f"{INDEX} names pytorch_model.bin, which "),
    (lambda f: place(f, **{HEAD: ""}), f"{INDEX} names , which is no safetensors file of this "),
    (lambda f: place(f, **{HEAD: "a\nb.safetensors"}), f"{INDEX} names 'a\\nb.safetensors', which"),
    (lambda f: place(f, **{HEAD: "\0.safetensors"}), f"{INDEX} names '\\x00.safetensors', which"),
    (lambda f: place(f, **{HEAD: "\ud800.safetensors"}), f"{INDEX} names '\\ud800.safetensors',"),
    (lambda f: place(f, **{HEAD: "x" * 999 + ".safetensors"}), f"{INDEX} names xxx"),
    (lambda f: place(f, **{HEAD: 2}), f"{INDEX} is no index of safetensors files; download it aga"),
    (lambda f: write_index(f, {}), f"{INDEX} is no index of safetensors files; "),
    (lambda f: (f / INDEX).write_text('{"weight_map": ["a"]}'), f"{INDEX} is no index of safet"),
    (lambda f: (f / INDEX).write_text('{"metadata": {}}'), f"{INDEX} is no index of safetensors"),
    (lambda f: (f / INDEX).write_text("[]"), f"{INDEX} is no index of safetensors files; "),
    (lambda f: (f / INDEX).write_bytes(b"\xff"), f"{INDEX} is no index of safetensors files ("),
    (lambda f: (f / INDEX).write_text("[" * 99_999), f"{INDEX} is no index of safetensors files ("),
    (lambda f: (f / INDEX).write_text(""), f"{INDEX} is no index of safetensors files ("),
    (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}'),
        f"{INDEX} is no index of safetensors files (a is given twice, with different values); ",
    ),
    (
        lambda f: (f / INDEX).write_text(LFS),
        f"{INDEX} is a Git-LFS pointer; fetch the real file (git lfs pull)",
    ),
]


@pytest.mark.parametrize(("damage", "rule"), SHARDED)
def test_an_index_and_files_that_disagree(
    sharded: Path, damage: Callable[[Path], object], rule: str
) -> None:
    damage(sharded)
    assert refusal(sharded).startswith(rule)


def test_an_index_may_be_what_is_left_over(model: Path) -> None:
    index = {"weight_map": dict.fromkeys([EMBED, HEAD], FIRST)}
    (model / INDEX).write_text(json.dumps(index))
    assert refusal(model).endswith(
        "which is not there; download the missing shards, or remove the index if "
        "model.safetensors is the model"
    )


def test_an_index_of_the_one_file_is_no_second_model(model: Path) -> None:
    write_index(model, dict.fromkeys(load_file(model / WEIGHTS), WEIGHTS))
    assert places(checked(model)) == {WEIGHTS}


PEFT = "merge it into its base model (peft: merge_and_unload, save_pretrained)"


@pytest.mark.parametrize(
    ("there", "rule"),
    [
        ([], "holds no *.safetensors file; point it at a complete HF checkpoint"),
        (
            ["pytorch_model.bin"],
            "holds its weights as pickles, not as *.safetensors; convert it (pytorch_model.bin): "
            "load it with transformers and call save_pretrained",
        ),
        (
            ["a.gguf", "b.gguf", "c.gguf", "d.gguf"],
            "holds no *.safetensors file, only a.gguf, b.gguf, c.gguf and 1 more; download the "
            "safetensors files of that model",
        ),
        (["adapter_model.safetensors"], "holds an adapter (adapter_model.safetensors), not a mo"),
        (
            [FIRST, SECOND],
            f"holds neither {WEIGHTS} nor {INDEX}, only {FIRST}, {SECOND}; download what is "
            f"missing, or rename the file that is the model to {WEIGHTS}",
        ),
        (["model_ema.safetensors"], f"holds neither {WEIGHTS} nor {INDEX}, only model_ema.safet"),
    ],
)
def test_without_a_manifest_what_is_there_is_named(
    model: Path, there: list[str], rule: str
) -> None:
    (model / WEIGHTS).unlink()
    for name in there:
        (model / name).touch()
    assert refusal(model).startswith(rule)


def raw(header: dict[str, Any] | str, data: int = 8) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def entry(start: int, end: int, shape: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def twice(name: str) -> str:
    one, two = json.dumps(entry(0, 8, [2])), json.dumps(entry(0, 8, [1, 2]))
    return f'{{"{name}": {one}, "{name}": {two}}}'


NONE = f"{WEIGHTS} is no safetensors file"


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (LFS.encode(), f"{WEIGHTS} is a Git-LFS pointer instead of weights; fetch the real file"),
        (b"", f"{WEIGHTS} is empty; download it again"),
        (b"abc", f"{NONE}; "),
        (b"<html>not found</html>", f"{NONE}; "),
        (b"\xff" * 100, f"{NONE}; "),
        (raw("[]"), f"{NONE}; "),
        (raw("7"), f"{NONE}; "),
        (raw("\x00"), f"{NONE} ("),
        (raw("[" * 99_999), f"{NONE} (nested too deeply); "),
        (raw({"x": entry(0, 8, [2])}, data=7), f"{WEIGHTS} is not whole: "),
        (raw({"x": entry(0, 8, [2])}, data=9), f"{WEIGHTS} is not whole: "),
        (raw({"x": entry(0, 8, [2])})[:20], f"{WEIGHTS} is cut short: 20 bytes, and its header"),
        (raw({"x": entry(0, 8, [3])}), f"{NONE} (the description of x makes no sense); "),
        (raw({"x": entry(0, 8, [-2])}), f"{NONE} (the description of x makes no sense); "),
        (raw({"x": entry(8, 0, [2])}), f"{NONE} (the description of x makes no sense); "),
        (raw({"x": entry(0, 8, [True, 2])}), f"{NONE} (the description of x makes no sense); "),
        (raw({"x\ny": entry(0, 8, [2], 5)}), f"{NONE} (the description of 'x\\ny' makes no sense"),
        (raw({"x": entry(0, 8, 2)}), f"{NONE}; "),
        (raw({"x": {"dtype": "F32"}}), f"{NONE}; "),
        (
            raw({"x": entry(0, 8, [2]), "y": entry(4, 8, [1])}),
            f"{NONE} (the bytes of y do not follow those before them); ",
        ),
        (raw({"x": entry(4, 8, [1])}), f"{NONE} (the bytes of x do not follow those before them)"),
        (raw(twice("x")), f"{NONE} (x is given twice, with different values); "),
        (raw({}, data=0), f"tensor {EMBED} is in none of its files; download what is missing"),
        ("folder", f"{WEIGHTS} cannot be read (Is a directory); correct the file or its permissi"),
        ("link", f"{WEIGHTS} cannot be read (No such file or directory); correct the file or its"),
    ],
)
def test_a_file_that_holds_no_tensors_is_named(
    model: Path, content: bytes | str, rule: str
) -> None:
    file = model / WEIGHTS
    file.unlink()
    if content == "folder":
        file.mkdir()
    elif content == "link":  # into a cache that was cleaned
        file.symlink_to("nowhere")
    else:
        assert isinstance(content, bytes)
        file.write_bytes(content)
    assert refusal(model).startswith(rule)


def test_links_are_followed(sharded: Path, tmp_path: Path) -> None:
    """As in the hub's cache: a link to a folder of links."""
    shutil.move(sharded, tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    sharded.symlink_to(tmp_path / "snapshot")
    assert places(checked(sharded)) == {FIRST, SECOND}


def test_a_folder_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"^--out = 'nowhere': cannot be read \(No such file or d"):
        read_folder("nowhere", "--out")


VOCAB = "rows, but config.json says vocab_size = 100; take both from one model"
UNQUANTISED = "use the unquantised model"
TENSORS: list[tuple[Tensors, str]] = [
    *(
        (
            {EMBED: torch.ones(rows, 64), HEAD: torch.ones(rows, 64)},
            f"tensor {EMBED} has {rows} {VOCAB}, or set vocab_size to {rows} if the weights are r",
        )
        for rows in (90, 104, 140)
    ),
    ({HEAD: torch.ones(104, 64)}, f"tensor {HEAD} has 104 {VOCAB}"),
    ({EMBED: torch.ones(104, 64)}, f"tensor {EMBED} has 104 {VOCAB}"),
    ({EMBED: torch.tensor(1.0)}, f"tensor {EMBED} has 0 {VOCAB}"),
    (
        {UP: torch.ones(96, 65)},
        f"tensor {UP} is (96, 65), but config.json means (96, 64); take both from one model",
    ),
    (
        {"model.layers.1.self_attn.q_proj.bias": torch.zeros(128), "lm_head.bias": torch.ones(100)},
        "has a tensor lm_head.bias and 1 more, but the qwen3 model of config.json has no such bias"
        "; take both from one model",
    ),
    (
        {"model.layers.3.mlp.up_proj.weight": torch.ones(96, 64)},
        "tensor model.layers.3.mlp.up_proj.weight is of a layer that num_hidden_layers = 3 in "
        "config.json leaves out; take both from one model",
    ),
    (
        {"score.weight": torch.ones(1, 64)},
        "tensor score.weight has no place in the qwen3 model of config.json; use a plain causal",
    ),
    ({"model.norm.weight\n": torch.ones(64)}, "tensor 'model.norm.weight\\n' has no place in the"),
    ({"model.layers.0.attn.step": torch.tensor(3)}, "tensor model.layers.0.attn.step has no place"),
    (
        {"model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(8, 64)},
        f"tensor model.layers.0.mlp.up_proj.lora_A.weight belongs to an adapter; {PEFT}",
    ),
    (
        {"model.layers.0.mlp.up_proj.base_layer.weight": torch.ones(96, 64)},
        "tensor model.layers.0.mlp.up_proj.base_layer.weight belongs to an adapter; ",
    ),
    (
        {f"base_model.model.{UP}": torch.ones(96, 64)},
        f"tensor base_model.model.{UP} belongs to an adapter; ",
    ),
    *(
        (
            {UP: torch.ones(96, 64).to(dtype)},
            f"tensor {UP} is stored as {name}, which is quantised; {UNQUANTISED}",
        )
        for dtype, name in (
            *((torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3")),
            *((torch.float8_e5m2, "F8_E5M2"), (torch.int32, "I32")),
        )
    ),
    *(
        (
            {f"model.layers.0.mlp.up_proj.{name}": torch.ones(2)},
            f"tensor model.layers.0.mlp.up_proj.{name} belongs to a quantised model; {UNQUANTISED}",
        )
        for name in (
            *("weight_scale", "weight_scale_inv", "qweight", "qzeros", "scales", "g_idx", "SCB"),
            *("weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"),
            *("weight_packed", "weight_zero_point", "input_scale", "weight.nested_absmax"),
        )
    ),
]


@pytest.mark.parametrize(("tensors", "rule"), TENSORS)
def test_tensors_that_config_does_not_mean_are_named(
    model: Path, tensors: Tensors, rule: str
) -> None:
    change(model, lambda found: found.update(tensors))
    assert refusal(model).startswith(rule)


def test_a_quantised_layer_is_not_called_missing(model: Path) -> None:
    def quantise(tensors: Tensors) -> None:
        codes = tensors.pop(UP).to(torch.int8)
        tensors.update({UP.replace(".weight", ".qweight"): codes})

    change(model, quantise)
    assert "qweight belongs to a quantised model; " in refusal(model)


@pytest.mark.parametrize("name", [EMBED, HEAD, UP])
def test_what_is_missing_is_named(model: Path, name: str) -> None:
    change(model, lambda tensors: tensors.pop(name))
    line = f"tensor {name} is in none of its files; download what is missing, or take config.json "
    assert refusal(model).startswith(line + "and weights from one model")
    assert ("set tie_word_embeddings to true there" in refusal(model)) == (name == HEAD)


def test_frequencies_that_every_reader_makes_itself_are_harmless(model: Path) -> None:
    names = ["model.rotary_emb.inv_freq", "model.layers.2.self_attn.rotary_emb.inv_freq"]
    frequencies = {name: torch.ones(8) for name in names}
    change(model, lambda found: found.update({n: t.bfloat16() for n, t in found.items()}))
    change(model, lambda found: found.update(frequencies))
    # And they say nothing of the model's precision.
    assert used_dtypes(checked(model), read_shape(str(model))) == {"BF16"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_any_floats_are_taken(model: Path, dtype: torch.dtype) -> None:
    change(model, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    checked(model)


def test_a_head_beside_tied_embeddings_must_be_their_copy(tied: Path) -> None:
    embedding = load_file(tied / WEIGHTS)[EMBED]
    change(tied, lambda tensors: tensors.update({HEAD: embedding.clone()}))
    checked(tied)
    other = embedding.clone()
    other[99, 63] = torch.nextafter(other[99, 63], torch.tensor(9.0))  # the very last bit
    for head in (other, embedding.bfloat16(), embedding[:90].clone()):
        change(tied, lambda tensors, head=head: tensors.update({HEAD: head}))
        assert refusal(tied) == (
            f"config.json says tie_word_embeddings = true, but {HEAD} is not {EMBED}; set it to "
            "false there to keep that head, or remove the tensor"
        )
        shape = read_shape(str(tied))
        check_weights(str(tied), "model.path", shape, values=False)  # another process has looked


def test_a_large_head_is_compared_piece_by_piece(
    tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peergrad.parallel.hf.fit.PIECE", 1000)  # bytes; 25.6 pieces
    embedding = load_file(tied / WEIGHTS)[EMBED]
    change(tied, lambda tensors: tensors.update({HEAD: embedding.clone()}))
    checked(tied)
    other = embedding.clone()
    other[99, 63] += 1
    change(tied, lambda tensors: tensors.update({HEAD: other}))
    assert f"{HEAD} is not {EMBED}" in refusal(tied)


def test_a_quantised_configuration_names_the_remedy(model: Path) -> None:
    configure(model, quantization_config={"quant_method": "fp8"})
    assert refusal(model) == (
        'quantization_config = {"quant_method": "fp8"} in config.json is not supported; use the '
        "unquantised model"
    )


def test_a_configuration_that_says_two_things(model: Path) -> None:
    file = model / "config.json"
    file.write_text(file.read_text().replace("{", '{"vocab_size": 104, ', 1))
    assert refusal(model).startswith(
        "config.json is not JSON (vocab_size is given twice, with different values); "
    )
    file.write_text(file.read_text().replace("104", "100", 1))
    checked(model)
