"""The variables that a trainer's libraries read once, as they start: set here, whoever starts it.

Those of ``parallel.deterministic_mode`` are set where the mode is (``parallel/determinism.py``).
"""

import os
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from peergrad.config import Config, ServerMode
from peergrad.config.rollout import flag

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
NCCL = {
    "NCCL_CUMEM_ENABLE": ("enable-symm-mem",),
    "NCCL_NVLS_ENABLE": ("enable-symm-mem", "enable-nccl-nvls"),
}
"""What NCCL must be told alike on both sides of a weight sync, and the options of SGLang that turn
it on there, whatever the environment says. Without them SGLang turns it off where the environment
says nothing, and NCCL's own default is another."""
WANTED = ("enable-kv-cache-sharding", "moe-a2a-backend")
"""Options that work with ``NCCL_CUMEM_ENABLE=1``, and turn it on where the environment says
nothing: the second with the value ``deepep_v2``."""


def prepare(config: Config, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what the user has not. Before torch is loaded, and before servers of our own are started,
    which inherit it."""
    for name, value in settings(config).items():
        environment.setdefault(name, value)


def settings(config: Config) -> dict[str, str]:
    """What a trainer of ``config`` runs with unless its user says otherwise."""
    options = _options(config)
    cumem = options.get(WANTED[0]) or options.get(WANTED[1]) == "deepep_v2"
    found = {name: str(int(bool(forced_by(name, options)))) for name in NCCL}
    if cumem:
        found["NCCL_CUMEM_ENABLE"] = "1"
    return {
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # its warnings are for those who write it
        # Kernels begin in the order in which they are queued: Megatron sends beside the products of
        # its layers, and counts on it. GPUs from Blackwell on keep that order with more, too.
        CONNECTIONS: "1",
        **found,
    }


def forced_by(name: str, options: Mapping[str, Any]) -> str | None:
    """The option among a server's that sets variable ``name`` of ``NCCL`` to 1 over its
    environment; None: the environment decides."""
    return next((option for option in NCCL[name] if options.get(option)), None)


def conflicts(config: Config, environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """What the user has set otherwise, where this may not be meant."""
    parallel, ours = config.parallel, settings(config)
    for name in (CONNECTIONS, *NCCL):
        value = environment.get(name, ours[name])
        if value == ours[name]:
            continue
        if name == CONNECTIONS:
            if parallel.tensor * parallel.context > 1:
                yield (
                    f"{name}={value}: before Blackwell, GPUs send beside the products of layers "
                    f"that ranks share with {ours[name]} alone; unset it there"
                )
        elif (option := forced_by(name, _options(config))) is not None:
            yield (
                f"{name}={value}: SGLang sets 1 with rollout.servers.args.{option}, and NCCL needs "
                "one value on both sides of a weight sync; unset one of the two"
            )


def _options(config: Config) -> dict[str, Any]:
    """Of servers of our own."""
    servers = config.rollout.servers
    if servers.mode is ServerMode.external or config.rollout.replay is not None:
        return {}
    return {flag(key): value for key, value in servers.args.items()}
