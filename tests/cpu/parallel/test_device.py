"""What a machine without CUDA is told, in a process of its own: it holds for the whole process."""

import platform
import subprocess
import sys

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
print(torch.cuda.current_device())
"""


def run(code: str) -> str:
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def test_cuda_by_name_is_the_host_and_nothing_idle_is_loaded() -> None:
    assert run(LITERALS) == "cpu"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again() -> None:
    """Pages that the kernel must give anew in five rounds of 32 MB."""
    assert int(run(FAULTS)) < 1000  # some 40,000 where memory went back to the kernel
