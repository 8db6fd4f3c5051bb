"""Matrices in FP8 blocks: the bits, which models have them, what is refused."""

import pytest
import torch

from peergrad import fp8
from peergrad.config import Fp8Scales
from peergrad.parallel.hf.config import Experts, Shape
from peergrad.parallel.hf.fp8 import check_blocks, differences, quantization_config
from peergrad.parallel.hf.mapping import Layout, to_hf, to_megatron
from peergrad.parallel.hf.rope import Rope

SIZES = [(128, 128), (300, 260), (1, 1), (129, 127), (5, 1000), (257, 128)]
SHAPE = {
    **{"family": "qwen3", "layers": 2, "hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 128},
    **{"ffn": 512, "vocab": 128, "max_length": 512, "norm_eps": 1e-6, "rope": Rope(1e4)},
    "tied": False,
}


def shape(**others):
    return Shape(**{**SHAPE, **others})


def uneven(rows, columns):
    """Rows of very different size, as no two blocks may share a scale by chance."""
    return torch.randn(rows, columns) * torch.exp(2 * torch.randn(rows, 1))


def same_bits(one, other):
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("scales", Fp8Scales)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bits_are_those_of_sglangs_own_quantiser(monkeypatch, scales, dtype):
    utils = pytest.importorskip("sglang.srt.layers.quantization.fp8_utils")
    from sglang.srt.layers.quantization.mxfp8_block_convert import bf16_to_block_fp8_128

    powers = scales is Fp8Scales.power_of_two
    theirs = utils.per_block_cast_to_fp8 if powers else bf16_to_block_fp8_128
    monkeypatch.setattr(fp8, "STRIP", 40_000)  # several strips, the last one not whole
    torch.manual_seed(0)
    cases = [(torch.randn(size) * m).to(dtype) for size in SIZES for m in (1e-30, 1e-3, 1, 1e30)]
    cases += [torch.zeros(130, 130, dtype=dtype), uneven(300, 300).to(dtype)]
    edge = torch.full((128, 128), 448.0)  # a scale that is a power of two already, and its like
    cases += [(edge * 2.0**e * (1 + k * 2.0**-7)).to(dtype) for e in (-9, 0, 5) for k in (0, 1)]
    for weight in cases:
        codes, inverse = fp8.quantise(weight, scales)
        expected, scale = theirs(weight)
        assert codes.dtype == torch.float8_e4m3fn and inverse.dtype == torch.float32
        assert codes.is_contiguous() and same_bits(codes, expected)
        assert torch.equal(inverse, scale)
        again = utils.block_quant_dequant(codes, inverse, [128, 128], torch.bfloat16)
        whole = utils.block_quant_dequant(*fp8.quantise(again, scales), [128, 128], torch.float32)
        if powers:  # codes of codes are the same numbers
            assert torch.equal(whole, again.float())


def test_a_block_by_hand():
    weight = torch.tensor([[448.0, -7.0, 0.0]]).repeat(128, 50)[:, :130]
    weight[:, 128:] /= 16
    codes, inverse = fp8.quantise(weight, Fp8Scales.float32)
    assert inverse.tolist() == [[1.0, 1 / 16]]
    assert codes.float()[0, :3].tolist() == [448.0, -7.0, 0.0]
    assert fp8.quantise(weight * 1.5, Fp8Scales.power_of_two)[1].tolist() == [[2.0, 2.0**-3]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_name(value):
    weight = torch.zeros(200, 300)
    weight[170, 290] = value
    name = "model.layers.3.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=rf"^{name}: has values that are not finite"):
        fp8.served(name, weight, Fp8Scales.power_of_two)


@pytest.mark.parametrize(
    ("name", "quantised"),
    [
        ("model.layers.0.self_attn.q_proj.weight", True),
        ("model.layers.11.self_attn.o_proj.weight", True),
        ("model.layers.0.mlp.gate_proj.weight", True),
        ("model.layers.0.mlp.experts.17.down_proj.weight", True),
        ("model.layers.0.block_sparse_moe.experts.3.w2.weight", True),
        ("model.layers.0.self_attn.q_proj.bias", False),
        ("model.layers.0.self_attn.q_norm.weight", False),
        ("model.layers.0.input_layernorm.weight", False),
        ("model.layers.0.mlp.gate.weight", False),
        ("model.layers.0.block_sparse_moe.gate.weight", False),
        ("model.embed_tokens.weight", False),
        ("model.norm.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_the_layers_matrices_are_quantised_and_nothing_else(name, quantised):
    weight = torch.ones(4, 4) if "proj" in name or "w2" in name else torch.ones(4)
    found = [n for n, _ in fp8.served(name, weight, Fp8Scales.power_of_two)]
    assert found == [name] + [name.replace("weight", "weight_scale_inv")] * quantised


def test_config_json_says_what_is_not_quantised():
    experts = Experts(number=4, chosen=2, normed=True)
    found = quantization_config(shape(family="mixtral", experts=experts), Fp8Scales.float32)
    assert found == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": [
            "lm_head",
            "model.layers.0.block_sparse_moe.gate",
            "model.layers.1.block_sparse_moe.gate",
        ],
    }


@pytest.mark.parametrize(
    ("others", "tensor", "what"),
    [
        ({"hidden": 200}, 1, r"200 columns \(hidden_size\); serve it in bfloat16"),
        ({"head_dim": 40}, 1, "160 rows of queries;"),
        ({"head_dim": 32, "kv_heads": 2}, 1, "64 rows of keys;"),
        ({}, 8, "64 rows of queries on each of 8 ranks;"),
        ({"ffn": 384}, 2, "192 rows of an MLP on each of 2 ranks;"),
        ({"family": "llama"}, 1, "SGLang 0.5.23 drops the scales of models of family llama;"),
    ],
)
def test_models_that_sglang_cannot_hold_in_blocks_are_refused(others, tensor, what):
    with pytest.raises(ValueError, match=rf"^k = 'v': .*{what}"):
        check_blocks("k", "v", shape(**others), tensor)


def held_by(trainer_shape, tensor, scales=Fp8Scales.power_of_two):
    """Whether each matrix has one value in the trainer's blocks and in the engine's."""
    torch.manual_seed(1)
    s = trainer_shape
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    families = [
        (Layout.QKV, 0, [(q, s.hidden), (kv, s.hidden), (kv, s.hidden)]),
        (Layout.PLAIN, 1, [(s.hidden, q)]),
        (Layout.GATE_UP, 0, [(s.ffn, s.hidden)] * 2),
        (Layout.PLAIN, 1, [(s.hidden, s.ffn)]),
    ]

    def rounded(weight):
        codes, inverse = fp8.quantise(weight, scales)
        wide = inverse.repeat_interleave(128, 0).repeat_interleave(128, 1)
        return codes.float() * wide[: weight.shape[0], : weight.shape[1]]

    found = []
    for layout, dim, sizes in families:
        parts = [uneven(*size).bfloat16() for size in sizes]
        shards = [
            rounded(to_megatron(parts, layout, s, dim=dim, rank=rank, ranks=tensor))
            for rank in range(tensor)
        ]
        whole = to_hf(shards, layout, s, dim=dim)
        found += [torch.equal(a, rounded(b)) for a, b in zip(whole, parts, strict=True)]
    return found


@pytest.mark.parametrize(
    ("others", "tensor", "why"),
    [
        ({}, 1, None),
        ({}, 2, None),
        ({}, 4, None),  # ranks share key-value heads
        ({"head_dim": 256}, 2, None),
        ({"head_dim": 64}, 1, "heads of 64"),
        ({"head_dim": 64}, 2, "heads of 64"),
        ({"ffn": 768}, 4, "768 rows of an MLP on 4 ranks"),
        ({"ffn": 1000}, 1, "1000 rows of an MLP on 1 ranks"),
        ({"heads": 12, "kv_heads": 1, "head_dim": 128}, 4, "1792 rows of queries, keys"),
    ],
)
def test_where_blocks_are_of_the_same_numbers_trainer_and_engine_have_the_same_weights(
    others, tensor, why
):
    s, powers = shape(**others), Fp8Scales.power_of_two
    found = list(differences(s, tensor=tensor, expert_tensor=tensor, trainer=powers, engine=powers))
    assert all(held_by(s, tensor)) == (why is None)
    assert found == [] if why is None else found[0].startswith(why)


def test_experts_are_divided_otherwise_and_scales_must_be_alike():
    experts = Experts(number=4, chosen=2, normed=True)
    s = shape(family="qwen3_moe", ffn=256, experts=experts)
    powers, free = Fp8Scales.power_of_two, Fp8Scales.float32

    def found(expert_tensor, trainer=powers, engine=powers):
        ranks = {"tensor": 4, "expert_tensor": expert_tensor}
        return list(differences(s, **ranks, trainer=trainer, engine=engine))

    assert found(1) == [] and found(4)[0].startswith("256 rows of an MLP on 4 ranks")
    assert found(1, free) == ["scales of the trainer are float32, of the engine power_of_two"]
    assert found(1, free, free)[0].startswith("scales in float32")
