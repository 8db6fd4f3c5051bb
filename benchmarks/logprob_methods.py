"""Ways from logits, or from hidden states, to log probabilities and gradients: ours and others'.

A method takes its inputs and returns ``Outputs``; the benchmark then calls ``backward()``. What
cannot run on this machine raises ``Missing`` with the reason, and is listed with it.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from peergrad.kernels import fused_linear_loss, linear_logprob, vocab_parallel_logprob


class Missing(Exception):
    """Why a method is not measured here."""


@dataclass(frozen=True)
class Outputs:
    """What a forward pass leaves: values, what flows into them, and logp if there is one."""

    values: list[Tensor]
    upstream: list[Tensor]
    logp: Tensor | None

    def backward(self) -> None:
        torch.autograd.backward(self.values, self.upstream)


# (logits, targets, dL/dlogp) -> Outputs
FromLogits = Callable[[Tensor, Tensor, Tensor], Outputs]
# (hidden, weight, targets, dL/dlogp) -> Outputs
FromHidden = Callable[[Tensor, Tensor, Tensor, Tensor], Outputs]


def ours(*, entropy: bool, plain: bool = False) -> FromLogits:
    def run(logits: Tensor, targets: Tensor, d_logp: Tensor) -> Outputs:
        logp, h = vocab_parallel_logprob(
            logits,
            targets,
            group=None,
            temperature=1.0,
            valid_vocab=logits.shape[1],
            with_entropy=entropy,
            inplace=True,
            plain=plain,
        )
        values = [logp] if h is None else [logp, h]
        return Outputs(values, [d_logp] * len(values), logp)

    return run


def _torch_logp(logits: Tensor, targets: Tensor) -> Tensor:
    return F.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0]


def _torch_both(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax(logits.float(), -1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def eager(*, entropy: bool) -> FromLogits:
    def run(logits: Tensor, targets: Tensor, d_logp: Tensor) -> Outputs:
        found = _torch_both(logits, targets) if entropy else (_torch_logp(logits, targets),)
        return Outputs(list(found), [d_logp] * len(found), found[0])

    return run


def cross_entropy() -> FromLogits:
    def run(logits: Tensor, targets: Tensor, d_logp: Tensor) -> Outputs:
        loss = F.cross_entropy(logits.float(), targets, reduction="none")
        return Outputs([loss], [-d_logp], -loss)

    return run


def compiled(*, entropy: bool) -> FromLogits:
    torch._dynamo.reset()  # or the second width would get a kernel for every width
    function: Any = torch.compile(_torch_both if entropy else _torch_logp, dynamic=False)

    def run(logits: Tensor, targets: Tensor, d_logp: Tensor) -> Outputs:
        found = function(logits, targets)
        values = list(found) if entropy else [found]
        return Outputs(values, [d_logp] * len(values), values[0])

    return run


def _group() -> dist.ProcessGroup:
    """A group of this process alone, which Megatron asks for."""
    if not dist.is_initialized():
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    return group


def megatron(*, fused: bool) -> FromLogits:
    parallel_state = _peer("megatron.core.parallel_state")
    loss_of = (
        _peer("megatron.core.fusions.fused_cross_entropy").fused_vocab_parallel_cross_entropy
        if fused
        else _peer("megatron.core.tensor_parallel").vocab_parallel_cross_entropy
    )
    group = _group()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(1)

    def run(logits: Tensor, targets: Tensor, d_logp: Tensor) -> Outputs:
        x, y = logits[:, None], targets[:, None]
        loss = loss_of(x, y, group) if fused else loss_of(x, y)
        return Outputs([loss], [-d_logp[:, None]], -loss[:, 0])

    return run


def _peer(module: str, *, gpu: bool = False) -> Any:
    """A module of another project. Raises Missing if it, or the GPU it needs, is not here."""
    package = module.partition(".")[0].replace("_", "-")
    if gpu and not torch.cuda.is_available():
        raise Missing(f"{package}: its Triton kernels need a GPU")
    try:
        return import_module(module)
    except ImportError as error:
        raise Missing(f"{package}: {error}") from error


def liger(*, vocab_parallel: bool) -> FromLogits:
    whole = _peer("liger_kernel.transformers.functional", gpu=True).liger_cross_entropy
    per_token = _peer("liger_kernel.ops", gpu=True).LigerVocabParallelCEFunction

    def run(logits: Tensor, targets: Tensor, d_logp: Tensor) -> Outputs:
        if not vocab_parallel:  # one number flows in, not one per token
            loss = whole(logits, targets, reduction="sum")
            return Outputs([loss], [torch.ones_like(loss)], None)
        loss = per_token.apply(
            logits[:, None], targets[:, None], None, -100, 0.0, "pytorch", "global"
        )
        return Outputs([loss], [-d_logp[:, None]], -loss[:, 0])

    return run


def fused(chunk: int, logits: torch.dtype) -> FromHidden:
    """Three matrix products; rows with target -1 or derivative 0 take part in fewer."""

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, d_logp: Tensor) -> Outputs:
        def derivative(logp: Tensor, entropy: Tensor, rows: Tensor | slice) -> Any:
            return (d_logp[rows] * logp).sum(), d_logp[rows], None

        loss, logp, _ = fused_linear_loss(
            hidden,
            weight,
            targets,
            derivative,
            group=None,
            vocab_size=weight.shape[0],
            temperature=1.0,
            chunk=chunk,
            logits=logits,
        )
        return Outputs([loss], [torch.ones_like(loss)], logp)

    return run


def linear(chunk: int, logits: torch.dtype) -> FromHidden:
    """Four matrix products; one for scores alone, without gradients. No entropy."""

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, d_logp: Tensor) -> Outputs:
        logp, _ = linear_logprob(
            hidden,
            weight,
            targets,
            group=None,
            vocab_size=weight.shape[0],
            temperature=1.0,
            chunk=chunk,
            with_entropy=False,
            logits=logits,
        )
        return Outputs([logp], [d_logp], logp)

    return run


def eager_head(hidden: Tensor, weight: Tensor, targets: Tensor, d_logp: Tensor) -> Outputs:
    logp = _torch_logp(hidden @ weight.t(), targets)
    return Outputs([logp], [d_logp], logp)


def liger_head() -> FromHidden:
    liger_fused_linear_cross_entropy = _peer(
        "liger_kernel.transformers.functional", gpu=True
    ).liger_fused_linear_cross_entropy

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, d_logp: Tensor) -> Outputs:
        loss = liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum")
        return Outputs([loss], [torch.ones_like(loss)], None)

    return run


def cut_cross_entropy() -> FromHidden:
    linear_cross_entropy = _peer("cut_cross_entropy", gpu=True).linear_cross_entropy

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, d_logp: Tensor) -> Outputs:
        loss = linear_cross_entropy(hidden, weight, targets, reduction="none")
        return Outputs([loss], [-d_logp.to(loss.dtype)], -loss.float())

    return run


def verl() -> FromHidden:
    if find_spec("verl") is not None:
        for package in ("verl", "verl.utils"):  # whose own initialisers import ray and much more
            spec = find_spec(package)
            assert spec is not None
            sys.modules.setdefault(package, module_from_spec(spec))
    linear_cross_entropy = _peer(
        "verl.utils.kernel.linear_cross_entropy", gpu=True
    ).linear_cross_entropy

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, d_logp: Tensor) -> Outputs:
        logp, entropy = linear_cross_entropy(hidden, weight, targets, 1.0, "none", None)
        return Outputs([logp, entropy], [d_logp, torch.zeros_like(d_logp)], logp)

    return run
