"""The norm of the torch spec against the formula, in float64."""

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from peergrad.parallel.norm import RMSNorm


@pytest.mark.parametrize("shape", [(7, 1, 16), (5, 3, 16)])  # hidden states, heads
def test_norm_and_its_gradient(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1)
    norm = RMSNorm(config, 16, eps=0.1).double()
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    wanted = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), wanted)
    upstream = torch.randn(shape, dtype=torch.float64)
    leaves = (x, norm.weight)
    ours = torch.autograd.grad(norm(x), leaves, upstream)
    torch.testing.assert_close(ours, torch.autograd.grad(wanted, leaves, upstream))
    assert torch.autograd.gradcheck(norm, (x,))


def test_bfloat16_is_rounded_once() -> None:
    config = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=1, params_dtype=torch.bfloat16
    )
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(RMSNorm(config, 64)(x), exact.bfloat16())
