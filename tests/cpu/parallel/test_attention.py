"""Packed attention against one sequence at a time, and Llama 3.1's rope against transformers."""

import math

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from peergrad.parallel.attention import PADDING_WASTE, PackedAttention

HEADS, GROUPS, DIM = 4, 2, 8


def attention() -> PackedAttention:
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=HEADS)
    return PackedAttention(config, 1, None, "self")


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal softmax attention of one sequence ``[n, heads, d]``, written out."""
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(DIM)
    scores = scores.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)


# The first two are padded to one batch; the third would waste more than PADDING_WASTE and is split.
@pytest.mark.parametrize("lengths", [(5,), (7, 1, 6, 7), (40, 1, 1, 1, 1, 1, 1, 1)])
def test_packed_equals_one_by_one(lengths: tuple[int, ...]) -> None:
    assert (len(lengths) * max(lengths) > PADDING_WASTE * sum(lengths)) == (lengths[0] == 40)
    torch.manual_seed(0)
    q = torch.randn(sum(lengths), HEADS, DIM, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(sum(lengths), GROUPS, DIM, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    packed = PackedSeqParams("thd", cu, cu, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))
    ours = attention()(q, k, v, None, packed_seq_params=packed)
    rows = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    wanted = torch.cat([naive(*row) for row in rows])
    torch.testing.assert_close(ours, wanted)
    weight = torch.randn_like(wanted)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v), retain_graph=True),
        torch.autograd.grad((wanted * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_batched_input_is_causal_too() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(6, 2, n, DIM) for n in (HEADS, GROUPS, GROUPS))
    out = attention()(q, k, v, None)
    for b in range(2):
        torch.testing.assert_close(out[:, b], naive(q[:, b], k[:, b], v[:, b]))
    assert F.mse_loss(out[:, 0], out[:, 1]) > 0


def test_llama3_rope_scaling_equals_transformers() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(head_dim=64, hidden_size=256, num_attention_heads=4, rope_parameters=rope)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    ours = RotaryEmbedding(
        64,
        1.0,
        rotary_base=5e5,
        rope_scaling=True,
        rope_scaling_factor=32.0,
        use_cpu_initialization=True,
        cp_group=None,
    )
    torch.testing.assert_close(ours.inv_freq, wanted)
