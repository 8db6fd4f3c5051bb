"""Packed attention against one sequence at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch.nn.attention.bias import causal_lower_right

from peergrad.parallel.attention import BLOCK, PackedAttention, PackedRow, take_angles
from peergrad.parallel.batches import Families

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


def new_row(families: Families, angles: torch.Tensor) -> PackedRow:
    """As ``parallel.model.run`` and the decoder's hook make it; ``angles`` ``[longest, d / 2]``."""
    sizes = torch.tensor([sum(family) for family in families])
    cu = torch.cat((torch.zeros(1), sizes.cumsum(0))).int()
    begins = [
        (n, i and prompt) for prompt, *more in families for i, n in enumerate([prompt, *more])
    ]
    positions = torch.cat([torch.arange(first, first + n) for n, first in begins])
    row = PackedRow("thd", cu, cu, families=families, positions=positions)
    megatrons = torch.cat((angles, angles), -1)[:, None, None]
    given = {"packed_seq_params": row, "rotary_pos_emb": megatrons}
    assert take_angles(torch.nn.Module(), (), given)[1]["rotary_pos_emb"] is None
    return row


def one_by_one(families: Families, angles: torch.Tensor, *qkv: torch.Tensor) -> torch.Tensor:
    """Every answer behind a copy of its prompt, as a sequence of its own."""

    def sequence(rows: torch.Tensor) -> torch.Tensor:
        q, k, v = (x[rows] for x in qkv)
        return naive(*(rotated(x, angles[: len(x)]) for x in (q, k)), v)

    found, start = [], 0
    for prompt, *answers in families:
        lead, at = torch.arange(start, start + prompt), start + prompt
        found.append(sequence(lead))
        for tokens in answers:
            found.append(sequence(torch.cat((lead, torch.arange(at, at + tokens))))[prompt:])
            at += tokens
        start = at
    return torch.cat(found)


@pytest.mark.parametrize(
    "families",
    [
        ((5,),),
        ((6,), (6,), (6,)),  # one batch as it lies
        ((7,), (1,), (6,), (7,)),  # one batch, padded
        ((7,), (6,), (6,)),  # the same, and as it lies but for the end
        ((90,), (25,), (25,), (25,), (3,), (1,), (1,), (2,)),  # several batches of both kinds
        ((2, 1, 1), (3, 2, 4, 1), (5,), (1, 3, 3)),  # small families of several widths
        ((64, 1, 2), (70, 5, 5), (69, 1, 8, 5), (4,)),  # answers alike to prompts alike
        ((1, *[2] * 80), (90, 90, 3, 200)),
        ((40, BLOCK + 7, 2 * BLOCK, 2), (BLOCK + 3, 1, 80)),  # more than a block
    ],
)
def test_packed_equals_one_by_one(families: Families) -> None:
    torch.manual_seed(0)
    total = sum(map(sum, families))
    longest = max(family[0] + max(family[1:], default=0) for family in families)
    q = torch.randn(total, HEADS, DIM, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(total, GROUPS, DIM, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    angles = torch.randn(longest, DIM // 2, dtype=torch.float64)
    ours = attention()(q, k, v, None, packed_seq_params=new_row(families, angles))
    wanted = one_by_one(families, angles, q, k, v)
    torch.testing.assert_close(ours, wanted)
    weight = torch.randn_like(wanted)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v), retain_graph=True),
        torch.autograd.grad((wanted * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_both_ways_to_the_lower_right_corner() -> None:
    """What a GPU is told is what the host's blocks compute."""
    torch.manual_seed(0)
    answers, prompt = BLOCK + 30, 41
    row = new_row(((prompt, answers, answers),), torch.zeros(prompt + answers, DIM // 2))
    q = torch.randn(2, HEADS, answers, DIM)
    k, v = (torch.randn(2, GROUPS, prompt + answers, DIM) for _ in range(2))
    blocks = attention()._in_blocks(row.triangle, q, k, v)
    at_once = attention()._attend(q, k, v, causal_lower_right(answers, prompt + answers))
    torch.testing.assert_close(blocks, at_once)


def test_batched_input_is_causal_too() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(6, 2, n, DIM) for n in (HEADS, GROUPS, GROUPS))
    out = attention()(q, k, v, None)
    for b in range(2):
        torch.testing.assert_close(out[:, b], naive(q[:, b], k[:, b], v[:, b]))
    assert F.mse_loss(out[:, 0], out[:, 1]) > 0
