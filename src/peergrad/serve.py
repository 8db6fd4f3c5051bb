"""SGLang servers on a node of their own, for a trainer elsewhere.

    python -m peergrad.serve --host node7 model.path=/models/qwen3-0.6b rollout.servers.count=8

They are those that the same configuration has a run start beside itself, with the same options, and
live as long as this program. Status 0: ended by a signal. 1: the servers ended, or one did before
all were there. 2: the configuration is wrong. 130: ended by an impatient second signal.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from peergrad.config import Config, require
from peergrad.running.commandline import read_valued
from peergrad.running.compose import compose_config
from peergrad.running.ending import FINISHED, INTERRUPTED, Ending, refuse
from peergrad.running.logs import log_to
from peergrad.running.place import Place
from peergrad.running.stopping import Stop
from peergrad.storage import writing

if TYPE_CHECKING:
    from peergrad.rollout.servers import ManagedServers

log = logging.getLogger(__name__)

HELP = """\
usage: python -m peergrad.serve [--host ADDRESS] [--port BASE] [--log-dir FOLDER] [--check]
                                [group=option ...] [key=value ...]

Starts the SGLang servers that a run's configuration describes, for a trainer on other nodes:
model.path, model.dtype, run.seed and
rollout.servers.{count,tensor,fp8,fp8_scales,start_timeout,args}. The overrides may be all those of
the run but rollout.servers.{mode,urls,wait,takeover}.

options
  --host ADDRESS    where they listen: an address or name of this machine by which the trainer finds
                    it, or 0.0.0.0 for all of them; default 127.0.0.1, for a trainer on this machine
  --port BASE       server k listens at BASE + k; default 30000
  --log-dir FOLDER  one file for each server, named by host and port; default server_logs
  --check           say what would be started, or what is wrong, and stop
  -h, --help        print this and stop

The trainer finds them with rollout=external 'rollout.servers.urls=[http://ADDRESS:BASE,...]' and,
if it is started before they are there, rollout.servers.wait=600. SGLang asks nobody for a key: let
only those reach these ports who may use the servers.
"""
VALUED = ("--host", "--port", "--log-dir")
POLL_SECONDS = 0.25
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Example:
        ``Options(host="node7", port=30000, overrides=("model.path=/models/qwen3-0.6b",))``
    """

    host: str = "127.0.0.1"
    port: int = 30_000
    log_dir: Path = Path("server_logs")
    check: bool = False
    overrides: tuple[str, ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve as ``arguments`` (default: the command line) say; the exit status."""
    place = Place(0, 1)
    try:
        options = read(sys.argv[1:] if arguments is None else arguments)
        config, _ = compose_config(options.overrides)
        if options.check:
            print(describe(config, build(config, options)), end="")
            return FINISHED
        stop = heed_signals()  # before what takes seconds to import
        servers = build(config, options)
    except (ValueError, OSError, RuntimeError) as error:
        return refuse(error, place)
    ending = Ending(place)
    try:
        with writing("--log-dir", options.log_dir):
            options.log_dir.mkdir(parents=True, exist_ok=True)
            name = servers.log(0).stem.replace("server", "serve", 1)
            ending.log = log_to(options.log_dir, name, screen=True)
        serve(config, servers, stop)
    except BaseException as error:
        return ending.end(error)
    return FINISHED


def read(arguments: Sequence[str]) -> Options:
    """The options and overrides. Raises ValueError with one line for anything else, and
    SystemExit(0) after ``--help``, which is printed."""
    values, parsed = read_valued(arguments, VALUED, HELP)
    port = values.get("--port", str(Options.port))
    require(port.isdecimal(), "--port", port, "must be a whole number", f"use {Options.port}")
    return Options(
        values.get("--host", Options.host),
        int(port),
        Path(values.get("--log-dir", Options.log_dir)),
        parsed.check,
        parsed.overrides,
    )


def build(config: Config, options: Options) -> "ManagedServers":
    """The servers, not yet started. Raises ValueError for what is wrong with them."""
    from peergrad.checks.serving import check_serving
    from peergrad.early import tells_experts, weightless
    from peergrad.rollout.address import Address
    from peergrad.rollout.servers import ManagedServers, check_args

    settings = config.rollout.servers
    check_serving(config)
    address = Address.row(options.host, options.port, settings.count)
    address.check()
    if address.is_hidden:
        print(
            f"warning: --host = {options.host!r}: leads to this machine's loopback, which no other "
            "machine reaches; give the address of a network that it shares with the trainer",
            file=sys.stderr,
        )
    servers = ManagedServers(
        settings,
        model_path=config.model.path,
        dtype=config.model.dtype,
        log_dir=options.log_dir,
        seed=config.run.seed,
        address=address,
        tells_experts=tells_experts(config),
        weightless=weightless(config),
    )
    servers.check()
    if options.check:
        check_args(settings.args)
    return servers


def describe(config: Config, servers: "ManagedServers") -> str:
    """What is started, a line for each server."""
    lines = [f"model          {config.model.path} in {config.model.dtype.name}"]
    for index, url in enumerate(servers.urls):
        lines.append(f"server {index:<8}{url} on {servers.devices(index)}, {servers.log(index)}")
    return "".join(f"{line}\n" for line in lines)


def heed_signals() -> Stop:
    """What the program stops for from here on. SIGUSR1, which asks trainers to save what they have,
    would by default end the servers, too: nobody here hears it, which processes inherit."""
    stop = Stop()
    stop.listen(lambda why: None, lambda: None)

    def on_signal(number: int, frame: FrameType | None) -> None:
        if not stop.hear(number):  # somebody is impatient; the kernel ends the servers
            os._exit(INTERRUPTED)

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, on_signal)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    return stop


def serve(config: Config, servers: "ManagedServers", stop: Stop) -> None:
    """Until a signal comes. Raises RuntimeError if a server ends before all were healthy, or once
    none is left, ValueError if SGLang refuses its options."""
    for line in describe(config, servers).splitlines():
        _say(line)
    began, up, told = time.monotonic(), 0, set[str]()
    try:
        servers.start()
        while stop.reason() is None:
            for index in servers.risen():
                up += 1
                _say(f"{servers.urls[index]} healthy after {time.monotonic() - began:.0f} s")
                if up == len(servers.urls):
                    urls = ",".join(servers.urls)
                    _say(f"all are: rollout=external 'rollout.servers.urls=[{urls}]'")
            ended = servers.ended()
            for url in ended.keys() - told:
                if up < len(servers.urls) or len(ended) == len(servers.urls):
                    raise RuntimeError(ended[url])
                told.add(url)
                _say(f"{ended[url]}; the others go on")
            time.sleep(POLL_SECONDS)
    finally:
        servers.stop()
    _say(f"{stop.reason()}: all servers have ended")


def _say(text: str) -> None:
    log.info("%s", text)
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
