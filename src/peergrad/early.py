"""What a run starts before it loads its libraries: servers take longest to be there."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from peergrad.config import Config, Fp8Serving, ServerMode
from peergrad.parallel.hf.companions import Companions
from peergrad.parallel.hf.config import read_shape
from peergrad.parallel.hf.fp8 import in_blocks

if TYPE_CHECKING:
    from peergrad.rollout.servers import ManagedServers


def start_servers(
    config: Config,
    attempt: Path,
    stack: ExitStack,
    *,
    ranks: int | None = None,
    trains: bool = True,
) -> "ManagedServers | None":
    """Servers of our own that are on their way, logs in ``attempt``; ``stack`` ends them. None if
    the run has none. They load beside the trainer; ``ready`` waits for them. ``ranks``: see
    ``ManagedServers``."""
    rollout = config.rollout
    if rollout.replay is not None or rollout.servers.mode is ServerMode.external:
        return None
    # Imported here: it loads PyTorch, which has to wait for what rank 0 reads.
    from peergrad.rollout.servers import ManagedServers

    servers = ManagedServers(
        rollout.servers,
        model_path=config.model.path,
        dtype=config.model.dtype,
        log_dir=attempt,
        seed=config.run.seed,
        ranks=ranks,
        tells_experts=trains and tells_experts(config),
        weightless=weightless(config),
    )
    stack.callback(servers.stop)
    servers.start()
    return servers


def tells_experts(config: Config) -> bool:
    """Whether servers are to say which experts they choose."""
    return config.moe.replays and read_shape(config.model.path).experts is not None


def weightless(config: Config) -> Callable[[Path], object] | None:
    """What writes the model folder of servers that hold FP8 blocks, all of which the first weight
    sync brings; None where servers read model.path."""
    path, servers = config.model.path, config.rollout.servers
    if servers.fp8 is not Fp8Serving.block:
        return None
    companions = in_blocks(Companions.read(Path(path)), read_shape(path), servers.fp8_scales)
    return lambda folder: companions.write(folder, dtype=config.model.dtype.name)
