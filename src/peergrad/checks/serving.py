"""What servers on a node of their own need of a run's configuration."""

from peergrad.checks.configuration import check_engine
from peergrad.checks.inputs import servers_load
from peergrad.config import Config, ServerMode, require
from peergrad.parallel.hf.config import read_shape
from peergrad.parallel.hf.fit import check_weights


def check_serving(config: Config) -> None:
    """Raise ValueError unless the servers that ``config`` describes can be started here. What only
    a trainer has (its folder, prompts, rewards, layout) may be missing or elsewhere."""
    servers, path = config.rollout.servers, config.model.path
    require(
        servers.mode is ServerMode.managed,
        "rollout.servers.mode",
        servers.mode.name,
        "tells a trainer to look for servers elsewhere, and here some are to be started",
        "leave mode and urls to the trainer's command line, or set rollout=managed",
    )
    require(
        config.rollout.replay is None,
        "rollout.replay",
        config.rollout.replay,
        "is a run without servers",
        "start only the trainer",
    )
    shape = read_shape(path)
    check_engine(config, shape)
    if servers_load(config):
        check_weights(path, "model.path", shape)
