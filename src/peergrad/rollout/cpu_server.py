"""SGLang's server for a machine without a GPU: ``python -m peergrad.rollout.cpu_server OPTION...``.

It is ``sglang.launch_server`` but for one thing. SGLang spawns its scheduler and its detokenizer,
and each of them imports anew what the first process has just imported: 12 s of a core. Without a
GPU nothing forbids to fork them, as long as there is one thread. SGLang's own hooks for plugins
say so at the right moment. A start takes 17 s of a core in place of 40.
"""

import gc
import multiprocessing
import os
import runpy
from typing import Any

import psutil

HOOKED = "sglang.srt.entrypoints.engine._set_envs_and_config"
"""Where SGLang chooses how its processes are started."""


def load() -> None:
    """Import what a server needs and takes long to import, so that servers can be forked."""
    gc.disable()  # what is imported stays: looking through it for garbage is a tenth of the start
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.tp_worker
    import sglang.srt.model_executor.model_runner
    import sglang.srt.models.registry  # noqa: F401
    from setproctitle import getproctitle

    import peergrad.rollout.cpu_backend
    import peergrad.rollout.cpu_cache  # noqa: F401

    getproctitle()  # finds where titles go as long as no environment has been changed


def main() -> None:
    """Serve until told to end."""
    gc.disable()
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(HOOKED, fork_workers, HookType.AFTER)
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


def fork_workers(result: Any, *_: Any, **__: Any) -> Any:
    """Fork the processes that are started from here on, if this one can be forked."""
    gc.enable()
    if psutil.Process().num_threads() == 1:
        gc.freeze()  # nor need a child copy pages to look through them
        os.register_at_fork(after_in_child=use_threads)
        multiprocessing.set_start_method("fork", force=True)
    return result


def use_threads() -> None:
    """As many as the environment says. PyTorch read that when it was loaded, and that may have been
    in a process with another environment. In a worker: such a thread forbids to fork."""
    import torch

    if (threads := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
        torch.set_num_threads(int(threads))


if __name__ == "__main__":
    main()
