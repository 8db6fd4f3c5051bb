"""Names and layouts, without a process group."""

import pytest
import torch

from peergrad.parallel.hf.config import Shape
from peergrad.parallel.hf.mapping import Layout, hf_names, to_hf, to_megatron
from peergrad.parallel.hf.rope import Rope

SHAPE = Shape(
    family="qwen3",
    layers=2,
    hidden=6,
    heads=8,
    kv_heads=4,
    head_dim=2,
    ffn=8,
    vocab=21,
    max_length=64,
    norm_eps=1e-6,
    rope=Rope(1e4),
    qk_norm=True,
    tied=False,
)


def hf_tensors(layout: Layout) -> list[torch.Tensor]:
    rows = {
        Layout.PLAIN: [12],
        Layout.VOCAB: [SHAPE.vocab],
        Layout.QKV: [SHAPE.heads * 2, SHAPE.kv_heads * 2, SHAPE.kv_heads * 2],
        Layout.GATE_UP: [SHAPE.ffn, SHAPE.ffn],
    }[layout]
    start, tensors = 0, []
    for n in rows:
        tensors.append(torch.arange(start, start + n * 6, dtype=torch.float32).view(n, 6))
        start += n * 6
    return tensors


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_round_trip_is_exact(layout: Layout, ranks: int) -> None:
    tensors = hf_tensors(layout)
    shards = [
        to_megatron(tensors, layout, SHAPE, dim=0, rank=rank, ranks=ranks) for rank in range(ranks)
    ]
    assert len({shard.shape for shard in shards}) == 1
    back = to_hf(shards, layout, SHAPE, dim=0)
    assert all(torch.equal(a, b) for a, b in zip(tensors, back, strict=True))


def test_a_plain_tensor_may_be_sharded_by_columns() -> None:
    whole = torch.arange(24.0).view(4, 6)
    shards = [to_megatron([whole], Layout.PLAIN, SHAPE, dim=1, rank=r, ranks=2) for r in range(2)]
    assert torch.equal(shards[1], whole[:, 3:])
    assert torch.equal(to_hf(shards, Layout.PLAIN, SHAPE, dim=1)[0], whole)


def test_qkv_rows_go_group_by_group() -> None:
    """8 query heads share 4 key-value heads, 2 rows a head: Megatron's group 1 is query heads 2 and
    3 (rows 4 to 7), key head 1 and value head 1 (rows 2 and 3 of each)."""
    q = torch.arange(16.0)[:, None]
    k, v = 100 + torch.arange(8.0)[:, None], 200 + torch.arange(8.0)[:, None]
    joined = to_megatron([q, k, v], Layout.QKV, SHAPE, dim=0, rank=0, ranks=1)
    assert joined[8:16, 0].tolist() == [4, 5, 6, 7, 102, 103, 202, 203]


def test_gate_and_up_are_halved_within_each_rank() -> None:
    gate, up = torch.arange(8.0)[:, None], 10 + torch.arange(8.0)[:, None]
    shard = to_megatron([gate, up], Layout.GATE_UP, SHAPE, dim=0, rank=1, ranks=2)
    assert shard[:, 0].tolist() == [4, 5, 6, 7, 14, 15, 16, 17]


def test_vocabulary_padding_is_zero_and_dropped_again() -> None:
    assert SHAPE.padded_vocab == 128
    (tensor,) = hf_tensors(Layout.VOCAB)
    padded = to_megatron([tensor], Layout.VOCAB, SHAPE, dim=0, rank=0, ranks=1)
    assert padded.shape == (128, 6)
    assert padded[21:].abs().sum() == 0


def test_both_specs_use_one_table() -> None:
    alone = hf_names("decoder.layers.7.input_layernorm.weight", SHAPE)
    fused = hf_names("decoder.layers.7.self_attention.linear_qkv.layer_norm_weight", SHAPE)
    assert alone == fused
    assert alone.names == ("model.layers.7.input_layernorm.weight",)
    with pytest.raises(KeyError):
        hf_names("decoder.layers.7.mlp.linear_fc1.bias", SHAPE)
