"""One reader of config.json: it sees what transformers sees, and refuses what we cannot train."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from peergrad.parallel.hf.config import Experts, Shape, read_shape
from peergrad.parallel.hf.families import FAMILIES
from peergrad.parallel.hf.family import Family
from peergrad.parallel.hf.tensors import parameters, tensor_shapes
from peergrad.parallel.rope import frequencies
from tests.models import MIXTURES, SCALED, VARIED, make_hf_model

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
QWEN2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
MISTRAL = {**TINY, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
MISTRAL["sliding_window"] = None
MOE = {**TINY, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
MOE |= {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
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
    "Qwen2.5-0.5B": (
        published(
            "qwen2",
            *(896, 4864, 24, 14, 2, 151936, 32768),
            max_window_layers=21,
            rms_norm_eps=1e-06,
            rope_theta=1000000.0,
            sliding_window=32768,
            tie_word_embeddings=True,
            use_mrope=False,
            use_sliding_window=False,
        ),
        494_032_768,
    ),
    "Qwen2.5-7B": (
        published(
            "qwen2",
            *(3584, 18944, 28, 28, 4, 152064, 131072),
            max_window_layers=28,
            rms_norm_eps=1e-06,
            rope_theta=1000000.0,
            sliding_window=131072,
            tie_word_embeddings=False,
            use_mrope=False,
            use_sliding_window=False,
        ),
        7_615_616_512,
    ),
    "Mistral-7B-v0.3": (
        published(
            "mistral",
            *(4096, 14336, 32, 32, 8, 32768, 32768),
            rms_norm_eps=1e-05,
            rope_theta=1000000.0,
            sliding_window=None,
            tie_word_embeddings=False,
        ),
        7_248_023_552,
    ),
    "Mistral-Nemo-12B": (
        published(
            "mistral",
            *(5120, 14336, 40, 32, 8, 131072, 131072),
            head_dim=128,
            rms_norm_eps=1e-05,
            rope_theta=1000000.0,
            sliding_window=None,
            tie_word_embeddings=False,
        ),
        12_247_782_400,
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
    "Qwen3-30B-A3B": (
        published(
            "qwen3_moe",
            *(2048, 6144, 48, 32, 4, 151936, 40960),
            **{**QWEN3, "architectures": ["Qwen3MoeForCausalLM"]},
            decoder_sparse_step=1,
            mlp_only_layers=[],
            moe_intermediate_size=768,
            norm_topk_prob=True,
            num_experts=128,
            num_experts_per_tok=8,
            router_aux_loss_coef=0.001,
            tie_word_embeddings=False,
        ),
        30_532_122_624,
    ),
    "Mixtral-8x7B": (
        published(
            "mixtral",
            *(4096, 14336, 32, 32, 8, 32000, 32768),
            num_experts_per_tok=2,
            num_local_experts=8,
            rms_norm_eps=1e-05,
            rope_theta=1000000.0,
            router_aux_loss_coef=0.02,
            sliding_window=None,
            tie_word_embeddings=False,
        ),
        46_702_792_704,
    ),
}


def write(folder: Path, values: dict[str, Any], *, without: str | None = None) -> str:
    kept = {key: value for key, value in values.items() if key != without}
    (folder / "config.json").write_text(json.dumps(kept))
    return str(folder)


def experts_of(theirs: Any) -> Experts | None:
    if not hasattr(theirs, "num_experts"):
        return None
    normed = getattr(theirs, "norm_topk_prob", True)
    return Experts(theirs.num_experts, theirs.num_experts_per_tok, normed)


def same_to_transformers(path: str) -> Shape:
    """The shape of the model, once it was found to be what transformers would build."""
    ours, theirs = read_shape(path), AutoConfig.from_pretrained(path)
    biases = getattr(theirs, "attention_bias", False)
    assert ours == Shape(
        family=theirs.model_type,
        layers=theirs.num_hidden_layers,
        hidden=theirs.hidden_size,
        heads=theirs.num_attention_heads,
        kv_heads=theirs.num_key_value_heads,
        head_dim=getattr(theirs, "head_dim", None)
        or theirs.hidden_size // theirs.num_attention_heads,
        ffn=getattr(theirs, "moe_intermediate_size", theirs.intermediate_size),
        vocab=theirs.vocab_size,
        max_length=theirs.max_position_embeddings,
        norm_eps=theirs.rms_norm_eps,
        rope=ours.rope,
        tied=theirs.tie_word_embeddings,
        qk_norm=theirs.model_type in ("qwen3", "qwen3_moe"),
        qkv_bias=biases or theirs.model_type == "qwen2",
        o_bias=biases,
        experts=experts_of(theirs),
    )
    rotary = LlamaRotaryEmbedding(theirs)  # the other families' are copies of it
    found = frequencies(ours.rope, ours.head_dim)
    torch.testing.assert_close(found, rotary.inv_freq, rtol=3e-7, atol=0)
    assert ours.rope.attention == rotary.attention_scaling
    return ours


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read_as_transformers_reads_them(name: str, tmp_path: Path) -> None:
    values, count = PUBLISHED[name]
    assert parameters(same_to_transformers(write(tmp_path, values))) == count


YARN = {**SCALED["yarn"], "factor": 4, "original_max_position_embeddings": 4096}
SAME = [
    ({**TINY, "num_key_value_heads": None}, None),
    ({**LLAMA, "num_key_value_heads": None, "head_dim": None}, None),
    ({**MISTRAL, "head_dim": None}, None),
    (QWEN2, None),
    (QWEN2, "head_dim"),
    ({**LLAMA, "attention_bias": True}, None),
    ({**TINY, "attention_bias": True}, None),
    ({**TINY, "rope_theta": 7}, None),
    ({**TINY, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, None),
    ({**TINY, "rope_parameters": {"rope_type": "default"}, "rope_theta": 7.0}, None),
    ({**TINY, "rope_parameters": {"rope_theta": 9.0}, "rope_theta": 7.0}, None),
    ({**TINY, "rope_parameters": {}}, None),
    ({**TINY, "rope_parameters": None, "rope_scaling": {"type": "default"}}, None),
    ({**LLAMA, "rope_scaling": {**LLAMA3, "rope_theta": 5.0}}, None),
    ({**LLAMA, "rope_parameters": {"rope_theta": 2.0}, "rope_scaling": LLAMA3}, None),
    ({**LLAMA, "rope_scaling": {**LLAMA3, "high_freq_factor": 9, "factor": 2}}, None),
    ({**LLAMA, "rope_scaling": LLAMA3, "original_max_position_embeddings": 99}, None),
    *(({**TINY, "head_dim": 128, "rope_scaling": scaled}, None) for scaled in SCALED.values()),
    ({**QWEN2, "rope_scaling": {"type": "yarn", "factor": 2.0}}, None),
    ({**MISTRAL, "head_dim": 128, "rope_scaling": YARN, "max_position_embeddings": 16384}, None),
    ({**MISTRAL, "head_dim": 128, "rope_scaling": {**YARN, "truncate": False}}, None),
    ({**QWEN2, "rope_scaling": {**YARN, "beta_fast": 1.0001, "truncate": False}}, None),
    ({**QWEN2, "rope_scaling": {**YARN, "mscale": 1.3, "mscale_all_dim": 0.7}}, None),
    ({**TINY, "sliding_window": 4096, "layer_types": ["full_attention"] * 2}, None),
    ({**MISTRAL, "sliding_window": 512}, None),
    ({**TINY, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}, None),
    ({**MOE, "num_local_experts": 8, "norm_topk_prob": True, "mlp_only_layers": []}, None),
    ({**MOE, "num_local_experts": 4}, "num_experts"),
    ({**MOE, "num_experts_per_tok": 1, "decoder_sparse_step": 1}, None),
    ({**MIXTRAL, "head_dim": None, "router_jitter_noise": 0.0}, None),
    ({**MIXTRAL, "rope_theta": 500000.0}, None),
]


@pytest.mark.parametrize(("values", "without"), SAME)
def test_values_and_spellings_are_those_of_transformers(
    values: dict[str, Any], without: str | None, tmp_path: Path
) -> None:
    same_to_transformers(write(tmp_path, values, without=without))


SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers")
SIZES += ("intermediate_size", "vocab_size", "max_position_embeddings")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_defaults_are_those_of_transformers(family: Family, tmp_path: Path) -> None:
    """Of a config.json that says no more than it must."""
    sizes = {name: TINY[name] for name in SIZES} | {"num_attention_heads": 32}
    path = write(tmp_path, {"model_type": family.model_type, **sizes})
    same_to_transformers(path)
    theirs = AutoConfig.for_model(family.model_type)
    assert getattr(theirs, "sliding_window", None) == family.window
    assert family.architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]


KNOWN = "llama or mistral or mixtral or qwen2 or qwen3 or qwen3_moe"
REFUSED = [
    ({"model_type": "gemma"}, f'model_type = "gemma" in config.json must be {KNOWN}'),
    ({"model_type": None}, f"model_type = null in config.json must be {KNOWN}"),
    ({"architectures": ["Qwen3ForSequenceClassification"]}, "architectures = "),
    ({"attention_bias": 1}, "attention_bias = 1 in config.json must be true or false"),
    ({"bias": True}, "bias = true in config.json is not supported"),
    ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config = {"),
    ({"rope_is_neox_style": False}, "rope_is_neox_style = false in config.json is not supported"),
    ({"mlp_bias": True}, "mlp_bias = true in config.json is not supported"),
    ({"use_sliding_window": True}, "use_sliding_window = true in config.json is not supported"),
    ({"hidden_act": "gelu"}, 'hidden_act = "gelu" in config.json is not supported, only silu'),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = "),
    ({"layer_types": ["full_attention"]}, "layer_types = "),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config = {"),
    ({"num_experts": 8}, "num_experts = 8 in config.json is not supported"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 in config.json is not supported"),
    ({"rope_scaling": "linear"}, 'rope_scaling = "linear" in config.json must be an object'),
    ({"rope_theta": "1e6"}, 'rope_theta = "1e6" in config.json must be a number above 1'),
    ({"rope_theta": -1.0}, "rope_theta = -1.0 in config.json must be a number above 1"),
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
WINDOW = "is not supported, only null or max_position_embeddings (512) and up"
REFUSED_LLAMA = [
    ({"sliding_window": 128}, f"sliding_window = 128 in config.json {WINDOW}"),
    ({"hidden_size": 100}, "num_attention_heads = 8 in config.json must divide hidden_size (100)"),
    ({"attention_bias": None}, "attention_bias = null in config.json must be true or false"),
]
REFUSED_QWEN2 = [
    (
        {"head_dim": 16},
        "head_dim = 16 in config.json is not supported, only hidden_size / heads (8",
    ),
    ({"head_dim": None}, "head_dim = null in config.json must be a positive whole number"),
]
REFUSED_MISTRAL = [
    ({"attention_bias": True}, "attention_bias = true in config.json is not supported, only false"),
    ({"sliding_window": 511}, f"sliding_window = 511 in config.json {WINDOW}"),
    ({"sliding_window": True}, f"sliding_window = true in config.json {WINDOW}"),
]
REFUSED_MOE = [
    ({"num_local_experts": 4}, "num_local_experts = 4 in config.json must be num_experts (8)"),
    ({"num_experts": 0}, "num_experts = 0 in config.json must be a positive whole number"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9 in config.json must be at most num_exp"),
    (
        {"num_experts_per_tok": 1, "norm_topk_prob": True},
        "num_experts_per_tok = 1 in config.json is not supported: an only expert of weight 1",
    ),
    ({"norm_topk_prob": None}, "norm_topk_prob = null in config.json must be true or false"),
    ({"mlp_only_layers": [0]}, "mlp_only_layers = [0] in config.json is not supported, only exp"),
    ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2 in config.json is not supported, only"),
    ({"n_shared_experts": 1}, "n_shared_experts = 1 in config.json is not supported"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings = true in config.json is not supported"),
]
REFUSED_MIXTRAL = [
    ({"head_dim": 16}, "head_dim = 16 in config.json is not supported, only hidden_size / heads"),
    ({"rope_theta": 1e4 + 0.5}, "rope_theta = 10000.5 in config.json is not supported: SGLang"),
    ({"rope_scaling": LLAMA3}, "rope_scaling = {"),
    ({"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1 in config.json is not supported"),
    ({"moe_intermediate_size": 48}, "moe_intermediate_size = 48 in config.json is not supported"),
    ({"attention_bias": True}, "attention_bias = true in config.json is not supported, only fal"),
]
CASES = [
    *((MOE, *case) for case in REFUSED_MOE),
    *((MIXTRAL, *case) for case in REFUSED_MIXTRAL),
    *((TINY, *case) for case in REFUSED),
    *((LLAMA, *case) for case in REFUSED_LLAMA),
    *((MISTRAL, *case) for case in REFUSED_MISTRAL),
    *((QWEN2, *case) for case in REFUSED_QWEN2),
]


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


def rope(kind: str, **changes: Any) -> dict[str, Any]:
    return {**SCALED[kind], **changes}


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (rope("linear", rope_type="dynamic"), "is not supported, only a rope_type of default, lin"),
        (rope("linear", rope_type=["linear"]), "is not supported, only a rope_type of default, l"),
        (rope("linear", factor=0.5), "must have a factor of at least 1"),
        (rope("linear", factor=2), "must have a decimal point in its factor"),
        (rope("llama3", factor=None), "must have a positive number as factor"),
        (rope("llama3", factor="2"), "must have a positive number as factor"),
        (rope("llama3", low_freq_factor=5.0), "must have a low_freq_factor below its high_freq_fa"),
        ({**LLAMA3, "original_max_position_embeddings": 0}, "must have a positive whole original"),
        (rope("yarn", beta_fast=1), "must have a beta_slow below its beta_fast"),
        (rope("yarn", beta_slow=None), "must have a positive number as beta_slow"),
        (rope("yarn", factor=4.0), "must have a factor that takes original_max_position_embeddin"),
        (rope("yarn", mscale=1.0), "must have both mscale and mscale_all_dim or neither"),
        (rope("yarn", truncate=1), "must have true or false as truncate"),
        (rope("yarn", attention_factor=1.2), "is not supported: attention_factor has no part in"),
        (
            {"mrope_section": [2, 3, 3]},
            "is not supported: mrope_section has no part in default rope",
        ),
        ({"full_attention": {"rope_type": "default"}}, "is not supported: full_attention has no p"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "is not supported: partial_rotary_fa"),
        ({"rope_theta": 1.0}, "must be a number above 1"),
    ],
)
def test_a_rope_that_cannot_be_is_one_line(
    given: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    path = write(tmp_path, {**TINY, "rope_parameters": given})
    with pytest.raises(ValueError) as caught:
        read_shape(path)
    line = str(caught.value)
    assert line.startswith(f"model.path = {path!r}: rope_parameters = {json.dumps(given)[:77]}")
    assert f" in config.json {rule}" in line
    assert re.fullmatch(r"[\w.]+ = .+: .+; .+", line)


def test_a_window_that_nobody_takes_away_is_in_force(tmp_path: Path) -> None:
    longer = {**MISTRAL, "max_position_embeddings": 4097}
    with pytest.raises(ValueError) as caught:
        read_shape(write(tmp_path, longer, without="sliding_window"))
    rule = "sliding_window = 4096 in config.json (by default) is not supported, only null or max_"
    assert rule in str(caught.value)


@pytest.mark.parametrize("name", SIZES)
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


@pytest.mark.parametrize("family", [*VARIED, *MIXTURES])
@pytest.mark.parametrize("varied", [True, False])
def test_the_tensors_are_those_of_transformers(family: str, varied: bool, tmp_path: Path) -> None:
    others = {**VARIED, **MIXTURES}[family] if varied else {}
    path = make_hf_model(tmp_path, family=family, layers=2, **others)
    theirs: dict[str, Any] = {}
    if family in MIXTURES:  # in memory those of all experts are one
        with safe_open(path / "model.safetensors", "pt") as file:
            theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    else:
        model = AutoModelForCausalLM.from_pretrained(path)
        theirs = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert tensor_shapes(read_shape(str(path))) == theirs
