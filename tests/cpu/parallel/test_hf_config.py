"""One reader of config.json: it sees what transformers sees, and refuses what we cannot train."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from peergrad.parallel.hf.config import Shape, read_shape
from peergrad.parallel.hf.tensors import parameters, tensor_shapes
from tests.models import make_hf_model

TINY = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 512,
}
LLAMA = {**TINY, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": 8}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def published(family: str, *sizes: int, **others: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "vocab_size", "max_position_embeddings")
    return {"model_type": family, **dict(zip(names, sizes, strict=True)), **others}


QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_window_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
}
PUBLISHED = {  # as the models' own config.json say, with the number of parameters of each
    "Qwen3-0.6B": (
        published("qwen3", 1024, 3072, 28, 16, 8, 151936, 40960, tie_word_embeddings=True, **QWEN3),
        596_049_920,
    ),
    "Qwen3-1.7B": (
        published("qwen3", 2048, 6144, 28, 16, 8, 151936, 40960, tie_word_embeddings=True, **QWEN3),
        1_720_574_976,
    ),
    "Qwen3-8B": (
        published(
            "qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, tie_word_embeddings=False, **QWEN3
        ),
        8_190_735_360,
    ),
    "Llama-3.2-1B": (
        published(
            "llama",
            *(2048, 8192, 16, 32, 8, 128256, 131072),
            head_dim=64,
            mlp_bias=False,
            rms_norm_eps=1e-05,
            rope_scaling={**LLAMA3, "factor": 32.0},
            rope_theta=500000.0,
            tie_word_embeddings=True,
        ),
        1_235_814_400,
    ),
    "Llama-3.1-8B": (
        published(
            "llama",
            *(4096, 14336, 32, 32, 8, 128256, 131072),
            pretraining_tp=1,
            rms_norm_eps=1e-05,
            rope_scaling=LLAMA3,
            rope_theta=500000.0,
            tie_word_embeddings=False,
        ),
        8_030_261_248,
    ),
    "Llama-2-7B": (
        published(
            "llama",
            *(4096, 11008, 32, 32, 32, 32000, 4096),
            rms_norm_eps=1e-05,
            rope_scaling=None,
            tie_word_embeddings=False,
        ),
        6_738_415_616,
    ),
}


def write(folder: Path, values: dict[str, Any], *, without: str | None = None) -> str:
    kept = {key: value for key, value in values.items() if key != without}
    (folder / "config.json").write_text(json.dumps(kept))
    return str(folder)


def seen_by_transformers(path: str) -> Shape:
    theirs = AutoConfig.from_pretrained(path)
    rope = theirs.rope_parameters
    return Shape(
        family=theirs.model_type,
        layers=theirs.num_hidden_layers,
        hidden=theirs.hidden_size,
        heads=theirs.num_attention_heads,
        kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        ffn=theirs.intermediate_size,
        vocab=theirs.vocab_size,
        max_length=theirs.max_position_embeddings,
        norm_eps=theirs.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        rope_factor=None if rope["rope_type"] == "default" else rope["factor"],
        qk_norm=theirs.model_type == "qwen3",
        tied=theirs.tie_word_embeddings,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read_as_transformers_reads_them(name: str, tmp_path: Path) -> None:
    values, count = PUBLISHED[name]
    path = write(tmp_path, values)
    assert read_shape(path) == seen_by_transformers(path)
    assert parameters(read_shape(path)) == count


SAME = [
    ({**TINY, "num_key_value_heads": None}, None),
    ({**TINY, "num_attention_heads": 32}, "num_key_value_heads"),
    (TINY, "head_dim"),
    (TINY, "architectures"),
    ({**LLAMA, "num_key_value_heads": None, "head_dim": None}, None),
    (LLAMA, "num_key_value_heads"),
    (LLAMA, "head_dim"),
    ({**TINY, "rope_theta": 7}, None),
    ({**TINY, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, None),
    ({**TINY, "rope_parameters": {"rope_type": "default"}, "rope_theta": 7.0}, None),
    ({**TINY, "rope_parameters": {"rope_theta": 9.0}, "rope_theta": 7.0}, None),
    ({**TINY, "rope_parameters": {}}, None),
    ({**TINY, "rope_parameters": None, "rope_scaling": {"type": "default"}}, None),
    ({**LLAMA, "rope_scaling": {**LLAMA3, "rope_theta": 5.0}}, None),
    ({**LLAMA, "rope_parameters": {"rope_theta": 1.0}, "rope_scaling": LLAMA3}, None),
    ({**TINY, "sliding_window": 4096, "layer_types": ["full_attention"] * 2}, None),
    ({**TINY, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}, None),
]


@pytest.mark.parametrize(("values", "without"), SAME)
def test_defaults_and_spellings_are_those_of_transformers(
    values: dict[str, Any], without: str | None, tmp_path: Path
) -> None:
    path = write(tmp_path, values, without=without)
    assert read_shape(path) == seen_by_transformers(path)


REFUSED = [
    ({"model_type": "mistral"}, 'model_type = "mistral" in config.json must be qwen3 or llama'),
    ({"model_type": None}, "model_type = null in config.json must be qwen3 or llama"),
    ({"architectures": ["Qwen3ForSequenceClassification"]}, "architectures = "),
    ({"attention_bias": True}, "attention_bias = true in config.json is not supported, only false"),
    ({"mlp_bias": True}, "mlp_bias = true in config.json is not supported"),
    ({"use_sliding_window": True}, "use_sliding_window = true in config.json is not supported"),
    ({"hidden_act": "gelu"}, 'hidden_act = "gelu" in config.json is not supported, only silu'),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = "),
    ({"layer_types": ["full_attention"]}, "layer_types = "),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config = {"),
    ({"num_experts": 8}, "num_experts = 8 in config.json is not supported"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 in config.json is not supported"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = {"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling = {"),
    ({"rope_scaling": "linear"}, 'rope_scaling = "linear" in config.json must be an object'),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters = {"),
    ({"rope_parameters": {**LLAMA3, "low_freq_factor": 2.0}}, "rope_parameters = {"),
    ({"rope_parameters": {**LLAMA3, "factor": None}}, "rope_parameters = {"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters = {"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters = {"),
    ({"rope_theta": "1e6"}, 'rope_theta = "1e6" in config.json must be a positive number'),
    ({"rope_theta": -1.0}, "rope_theta = -1.0 in config.json must be a positive number"),
    ({"num_attention_heads": 0}, "num_attention_heads = 0 in config.json must be a positive whole"),
    ({"num_hidden_layers": "2"}, 'num_hidden_layers = "2" in config.json must be a positive whole'),
    ({"intermediate_size": -96}, "intermediate_size = -96 in config.json must be a positive whole"),
    ({"vocab_size": 128.0}, "vocab_size = 128.0 in config.json must be a positive whole"),
    ({"hidden_size": None}, "hidden_size = null in config.json must be a positive whole number"),
    ({"max_position_embeddings": True}, "max_position_embeddings = true in config.json must be"),
    ({"num_key_value_heads": 3}, "num_key_value_heads = 3 in config.json must divide num_attent"),
    ({"head_dim": None}, "head_dim = null in config.json must be a positive whole number"),
    ({"head_dim": 15}, "head_dim = 15 in config.json must be even"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps = 0.0 in config.json must be a positive number"),
    ({"text_config": {"vocab_size": 90}}, 'text_config = {"vocab_size": 90} in config.json is not'),
    ({"tie_word_embeddings": None}, "tie_word_embeddings = null in config.json must be true or"),
]
REFUSED_LLAMA = [
    ({"sliding_window": 4096}, "sliding_window = 4096 in config.json is not supported"),
    ({"hidden_size": 100}, "num_attention_heads = 8 in config.json must divide hidden_size (100)"),
    ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 4096}}, "rope_scaling = {"),
]
CASES = [(TINY, *case) for case in REFUSED] + [(LLAMA, *case) for case in REFUSED_LLAMA]


@pytest.mark.parametrize(("model", "changes", "rule"), CASES)
def test_what_cannot_be_trained_is_one_line(
    model: dict[str, Any], changes: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    path = write(tmp_path, {**model, **changes})
    for key in ("model.path", "model.reference"):
        with pytest.raises(ValueError) as caught:
            read_shape(path, key)
        assert str(caught.value).startswith(f"{key} = {path!r}: {rule}")
        assert re.fullmatch(r"[\w.]+ = .+: .+; .+", str(caught.value))  # one line


@pytest.mark.parametrize(
    "name",
    [
        *("hidden_size", "num_attention_heads", "num_hidden_layers"),
        *("intermediate_size", "vocab_size", "max_position_embeddings"),
    ],
)
def test_sizes_are_never_guessed(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, TINY, without=name)
    with pytest.raises(ValueError, match=f"config.json has no {name}; "):
        read_shape(path)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (None, "must be a folder with an HF checkpoint (config.json is missing)"),
        (b"{", "config.json is not JSON"),
        (b"\xff\xfe\x00", "config.json is not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "config.json is not JSON"),
        (b"[]", "config.json holds no object"),
        (b"[" * 100_000, "config.json is not JSON"),
    ],
)
def test_files_that_are_no_configuration(text: bytes | None, rule: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError) as caught:
        read_shape(str(tmp_path))
    assert str(caught.value).startswith(f"model.path = {str(tmp_path)!r}: {rule}")
    assert "\n" not in str(caught.value)


def test_a_path_that_no_folder_can_have() -> None:
    with pytest.raises(ValueError, match=r"its config.json cannot be read \(File name too long\)"):
        read_shape("x" * 5000)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_tensors_are_those_of_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    path = make_hf_model(tmp_path, family=family, tied=tied, layers=2)
    model = AutoModelForCausalLM.from_pretrained(path)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert tensor_shapes(read_shape(str(path))) == theirs
