"""Log probability, entropy and their gradients in float64, by autograd."""

import torch
from torch import Tensor


def exact(
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor | float,
    valid: int,
    d_logp: Tensor | None = None,
    d_entropy: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, gradient of ``sum(d_logp logp + d_entropy entropy)`` by the logits)."""
    x = logits.detach().double().requires_grad_()
    tau = torch.as_tensor(temperature, dtype=torch.float64).expand(len(x))
    log_p = (x[:, :valid] / tau[:, None]).log_softmax(-1)
    scored = targets >= 0
    logp = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    logp, entropy = (torch.where(scored, v, 0.0) for v in (logp, entropy))
    loss = torch.zeros((), dtype=torch.float64)
    for upstream, value in ((d_logp, logp), (d_entropy, entropy)):
        if upstream is not None:
            loss = loss + (upstream.double() * value)[scored & (upstream != 0)].sum()
    gradient = torch.autograd.grad(loss, x)[0] if loss.requires_grad else torch.zeros_like(x)
    return logp.detach(), entropy.detach(), gradient


def draw(
    rows: int, width: int, valid: int, dtype: torch.dtype, *, seed: int = 0, spread: float = 3.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits ``[rows, width]``, targets, temperatures, and two upstream gradients. Every fourth row
    from the second on is ignored, every fourth from the third on has no gradient."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    logits = (spread * torch.randn(rows, width, generator=generator)).to(dtype)
    targets = torch.randint(0, valid, (rows,), generator=generator)
    temperature = 0.5 + torch.rand(rows, generator=generator)
    d_logp, d_entropy = torch.randn(2, rows, generator=generator)
    targets[1::4] = -100
    d_logp[2::4] = d_entropy[2::4] = 0.0
    return logits, targets, temperature, d_logp, d_entropy
