"""Vocabulary-parallel logprobs against float64 autograd on the whole vocabulary."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.spawn import run_ranks

ROWS, HIDDEN, REAL, TEMPERATURE = 37, 24, 21, 0.8
PADDED = 32  # over 4 ranks the last one holds nothing but padding


def inputs(offset: float) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN)
    weight = torch.randn(PADDED, HIDDEN)
    if offset:  # a constant added to every logit changes nothing
        hidden[:, 0], weight[:, 0] = 1.0, offset
    targets = torch.randint(0, REAL, (ROWS,))
    return hidden, weight, targets, torch.randn(ROWS), torch.randn(ROWS)


def oracle(offset: float) -> tuple[torch.Tensor, ...]:
    """logp, entropy and the gradients of sum(a logp + b entropy), in float64 by autograd."""
    hidden, weight, targets, a, b = inputs(offset)
    hidden = hidden.double().requires_grad_()
    weight = weight.double().requires_grad_()
    log_p = ((hidden @ weight[:REAL].t()) / TEMPERATURE).log_softmax(-1)
    logp = log_p.gather(1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    d_hidden, d_weight = torch.autograd.grad((a * logp + b * entropy).sum(), (hidden, weight))
    return logp.detach(), entropy.detach(), d_hidden, d_weight


def rank_results(chunk: int, offset: float) -> list[torch.Tensor]:
    from peergrad.kernels import linear_logprob

    dist.init_process_group("gloo")
    hidden, weight, targets, a, b = inputs(offset)
    shard = weight.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    hidden.requires_grad_()
    logp, entropy = linear_logprob(
        hidden,
        shard,
        targets,
        group=dist.group.WORLD,
        vocab_size=REAL,
        temperature=TEMPERATURE,
        chunk=chunk,
    )
    d_hidden, d_weight = torch.autograd.grad((a * logp + b * entropy).sum(), (hidden, shard))
    dist.all_reduce(d_hidden)  # what copy_to_tensor_model_parallel_region does
    return [logp.detach(), entropy.detach(), d_hidden, d_weight]


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "chunk", "offset"), [(1, 1000, 0.0), (2, 5, 3e3), (4, 16, 0.0)])
def test_equals_float64_autograd(ranks: int, chunk: int, offset: float) -> None:
    found = run_ranks(ranks, rank_results, chunk, offset)
    wanted = oracle(offset)
    # float32 logits of size 3e3 are themselves rounded to 2.4e-4
    tolerance = {"atol": 2e-5, "rtol": 1e-5} if not offset else {"atol": 2e-3, "rtol": 2e-3}
    whole: list[Any] = [*found[0][:3], torch.cat([rank[3] for rank in found])]
    for rank in found:
        assert torch.equal(rank[0], found[0][0])
        assert torch.equal(rank[1], found[0][1])
    if offset:  # column 0 of the weight carries the offset: its gradient is pure cancellation
        whole[3], wanted = whole[3][:, 1:], (*wanted[:3], wanted[3][:, 1:])
        whole[2], wanted = whole[2][:, 1:], (*wanted[:2], wanted[2][:, 1:], wanted[3])
    for ours, theirs in zip(whole, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, **tolerance)
