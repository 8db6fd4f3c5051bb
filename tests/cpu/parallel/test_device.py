"""What a machine without CUDA is told, in a process of its own: it holds for the whole process."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource, torch
from peergrad.parallel.device import keep_freed_memory
def faults():
    def layer():
        kept = [torch.ones(2 << 20) for _ in range(4)]  # 8 MB each, freed together
    for _ in range(3):
        layer()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        layer()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
keep_freed_memory()
print(faults())
"""

LITERALS = """
import sys, torch
from peergrad.parallel.device import set_up_device, without_compiler, without_wandb
torch.cuda.is_available = lambda: False
with without_compiler(), without_wandb():  # as a run does
    import peergrad.build
assert "wandb" not in sys.modules
import wandb
assert wandb.init  # what asks later gets it
assert "torch._inductor.compile_fx" not in sys.modules
assert torch.compile(lambda: 3, backend="eager")() == 3  # what asks later gets the real one
assert set_up_device() is set_up_device()
x = torch.zeros(2, device="cuda", pin_memory=True)
assert x.device.type == "cpu" and x.cuda() is x and x.pin_memory() is x
assert x.type() == "torch.cuda.FloatTensor" and x.type(torch.float64).dtype == torch.float64
assert torch.zeros(2).to(device="cuda").device.type == "cpu"
assert torch.tensor([1, 2]).sum() == 3
class Literal(torch.autograd.Function):
    def forward(ctx, x):
        return x.clone()
    def backward(ctx, grad):
        assert grad.cuda() is grad and grad.type() == "torch.cuda.FloatTensor"
        return grad + torch.ones(2, device="cuda")
x.requires_grad_()
Literal.apply(x).sum().backward()  # each calls the engine in its own way
(again,) = torch.autograd.grad(Literal.apply(x).sum(), x)
assert x.grad.tolist() == again.tolist() == [2, 2] and x.type() == "torch.cuda.FloatTensor"
print(torch.cuda.current_device())
"""


BROKEN = """
import logging
from peergrad.config import OptimConfig, Spec
from peergrad.parallel.options import choose_spec
from peergrad.parallel.states import require_states
told = logging.Handler(logging.WARNING)
told.emit = lambda record: print(record.getMessage())
logging.getLogger("peergrad").addHandler(told)
def refused(function, *args):
    try:
        print("accepted:", function(*args))
    except ValueError as error:
        print(error)
torch.cuda.is_available = lambda: True
print(choose_spec(Spec.torch), choose_spec(Spec.auto))
refused(choose_spec, Spec.te)
refused(require_states, OptimConfig(use_precision_aware_optimizer=True))
"""


def run(code: str, **environment: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def test_cuda_by_name_is_the_host_nothing_idle_is_loaded_and_a_broken_engine_is_one_line(
    tmp_path: Path,
) -> None:
    """Megatron would end with an error of Transformer Engine's that is no ImportError, as with its
    package but none of its compiled parts."""
    package = tmp_path / "transformer_engine" / "__init__.py"
    package.parent.mkdir()
    package.write_text("raise RuntimeError('cudnn shared object\\nnot found.')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    broken = "the package transformer-engine cannot be imported (cudnn shared object not found.)"
    assert run(LITERALS + BROKEN, PYTHONPATH=path).splitlines() == [
        "cpu",
        f"parallel.spec = 'auto': {broken}; repair it or set parallel.spec=torch",
        "Spec.torch Spec.torch",
        f"parallel.spec = 'te': {broken}; repair it or set parallel.spec=torch",
        "optim.use_precision_aware_optimizer = True: needs FusedAdam of "
        f"{broken.replace(' cannot', ', which cannot')}; repair it, or unset it",
    ]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again() -> None:
    """Pages that the kernel must give anew in five rounds of 32 MB."""
    assert int(run(FAULTS)) < 1000  # some 40,000 where memory went back to the kernel
