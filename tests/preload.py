"""What the fork server imports once, so that the ranks which it forks need not: 8 s of a core each.

A forked rank must be as good as a new process: the server has one thread, no CUDA, no process
group, and nothing adapted to a device. ``unfit`` says what is not so; every rank looks.
"""

import gc
import os
import warnings

warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*not installed")

import matplotlib.pyplot  # noqa: E402, F401
import psutil  # noqa: E402
import pytest  # noqa: E402, F401
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.utils.tensorboard  # noqa: E402
import transformers.models.llama.modeling_llama  # noqa: E402
import transformers.models.mistral.modeling_mistral  # noqa: E402
import transformers.models.qwen2.modeling_qwen2  # noqa: E402
import transformers.models.qwen3.modeling_qwen3  # noqa: E402, F401

from peergrad.parallel.device import set_up_device, without_compiler, without_wandb  # noqa: E402

with without_compiler(), without_wandb():  # as a run does
    from megatron.core import parallel_state

    import peergrad.convert
    import peergrad.loop
    import peergrad.main
    import peergrad.parallel.checkpoint
    import peergrad.rollout.servers  # noqa: F401
from peergrad.running.lifetime import die_with_parent  # noqa: E402
from tests import models, oracle  # noqa: E402, F401

SERVER = os.getpid()
"""The fork server: it imports this module, the ranks find it imported."""

torch.set_num_threads(1)
# multiprocessing's own way to notice that pytest is gone waits for the ranks to be gone, too.
die_with_parent(os.getppid())
# What was imported stays: no rank need look through it for garbage, nor copy its pages to do so.
gc.freeze()


def unfit() -> list[str]:
    """What a process forked from this one would have inherited that a new one has not."""
    threads = psutil.Process().num_threads()
    found = {
        f"{threads} threads": threads > 1,
        "CUDA": torch.cuda.is_initialized(),
        "a process group": dist.is_initialized() or parallel_state.is_initialized(),
        "a device": set_up_device.cache_info().currsize > 0,
    }
    return [what for what, there in found.items() if there]
