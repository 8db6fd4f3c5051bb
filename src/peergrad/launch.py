"""torchrun for peergrad: the same options, the ranks' own words and their exit status.

    python -m peergrad.launch --nproc-per-node 2 experiment=quickstart_cpu

torchrun works as well. When a rank fails it prints, after that rank's one line, a report of its own
of some thirty lines, and it ends with status 1 whatever the rank's was.
"""

import logging
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from peergrad.running.commandline import FLAGS
from peergrad.running.ending import INTERRUPTED, WRONG, one_line
from peergrad.running.stopping import SIGNALS

MODULE = "peergrad.main"
HINTS = {
    "SIGKILL": "perhaps its machine was out of memory; see dmesg or the job's accounting",
    "SIGTERM": "somebody, or the machine, told it to end",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the ranks and wait for them; the exit status of the one that failed first."""
    options = read(sys.argv[1:] if arguments is None else arguments)
    for number in SIGNALS:
        signal.signal(number, hand_on)
    logging.getLogger("torch").setLevel(logging.CRITICAL)  # its agent would tell it all again
    if options.nproc_per_node != "1":  # as torchrun does, with five lines of warning
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        run(options)  # type: ignore[no-untyped-call]
    except (KeyboardInterrupt, SignalException):
        return INTERRUPTED
    except (ValueError, RuntimeError) as error:  # of the launcher's own: options, ports, machines
        print(f"error: {one_line(error)}; see --help for the launcher's options", file=sys.stderr)
        return WRONG
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        hint = HINTS.get(name, "see its rank_*.log")
        print(f"error: rank {rank} was ended by {name}: {hint}", file=sys.stderr)
        return 128 - int(failure.exitcode)
    return 0


def hand_on(number: int, _: object) -> None:
    """Tell the ranks, and wait for them as ever: torchrun would give them half a minute."""
    for rank in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(number)


def read(arguments: Sequence[str]) -> Namespace:
    """torchrun's options with peergrad as the program; peergrad's own flags may stand anywhere."""
    flags = [argument for argument in arguments if argument in FLAGS]
    others = [argument for argument in arguments if argument not in FLAGS]
    # A last word of ours: torchrun takes the first word that is no option for the program.
    options: Namespace = parse_args([*others, MODULE])  # type: ignore[no-untyped-call]
    overrides = [options.training_script, *options.training_script_args][:-1]
    options.training_script_args = [*overrides, *flags]
    options.training_script, options.module = MODULE, True
    options.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"  # and not those that are handed on
    if options.nnodes in ("1", "1:1") and options.local_addr is None:
        options.local_addr = "127.0.0.1"  # a laptop's host name need not resolve
    return options


if __name__ == "__main__":
    sys.exit(main())
