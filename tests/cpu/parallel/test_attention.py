"""Packed attention against one sequence at a time, and Llama 3.1's rope against transformers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from peergrad.parallel.attention import PackedAttention, PackedRow, alike, take_angles

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


def rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Pairs ``(x_i, x_{i + d/2})`` of one sequence ``[n, heads, d]`` as complex numbers, times
    ``e^(i angle)``; ``angles`` ``[n, d / 2]``."""
    a, b = x.chunk(2, -1)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), -1)


def new_row(lengths: tuple[int, ...], angles: torch.Tensor) -> PackedRow:
    """As ``parallel.model.run`` and the decoder's hook make it; ``angles`` ``[longest, d / 2]``."""
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])
    row = PackedRow("thd", cu, cu, lengths=lengths, positions=positions)
    megatrons = torch.cat((angles, angles), -1)[:, None, None]
    given = {"packed_seq_params": row, "rotary_pos_emb": megatrons}
    assert take_angles(torch.nn.Module(), (), given)[1]["rotary_pos_emb"] is None
    return row


@pytest.mark.parametrize(
    "lengths",
    [
        (5,),
        (6, 6, 6),  # one batch as it lies
        (7, 1, 6, 7),  # one batch, padded
        (3, 0, 5),
        (90, 25, 25, 25, 3, 1, 1, 2),  # several batches of both kinds
    ],
)
def test_packed_equals_one_by_one(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    q = torch.randn(sum(lengths), HEADS, DIM, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(sum(lengths), GROUPS, DIM, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    angles = torch.randn(max(lengths), DIM // 2, dtype=torch.float64)
    ours = attention()(q, k, v, None, packed_seq_params=new_row(lengths, angles))
    rows = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    wanted = torch.cat(
        [naive(*(rotated(x, angles[: len(x)]) for x in (a, b)), c) for a, b, c in rows]
    )
    torch.testing.assert_close(ours, wanted)
    weight = torch.randn_like(wanted)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v), retain_graph=True),
        torch.autograd.grad((wanted * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_batches_are_few_and_pad_little() -> None:
    assert alike([3, 2, 2, 90, 3]) == [[3, 2, 2], [90], [3]]  # as documented
    assert alike([]) == [] and alike([4] * 1000) == [[4] * 1000]
    lengths = sorted(np.random.default_rng(0).integers(64, 256, 1024).tolist(), reverse=True)
    runs = alike(lengths)
    assert [n for run in runs for n in run] == lengths
    assert len(runs) < 32 and all(run[0] == max(run) for run in runs)
    assert sum(run[0] * len(run) for run in runs) < 1.1 * sum(lengths)
    # Long ones are taken one by one rather than padded.
    assert alike([4096, 4000, 3900]) == [[4096], [4000], [3900]]


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
