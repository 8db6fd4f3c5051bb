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

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

INTERRUPTED = 130
MODULE = "peergrad.main"
FLAGS = ("--cfg", "--check", "--objective")


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the ranks and wait for them; the exit status of the one that failed first."""
    options = read(sys.argv[1:] if arguments is None else arguments)
    logging.getLogger("torch").setLevel(logging.CRITICAL)  # its agent would tell it all again
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, with five lines of warning
    try:
        run(options)  # type: ignore[no-untyped-call]
    except (KeyboardInterrupt, SignalException):
        return INTERRUPTED
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        print(
            f"error: rank {rank} was ended by {name}, from outside (SIGKILL: perhaps it was out of "
            "memory; see dmesg or the job's accounting)",
            file=sys.stderr,
        )
        return 128 - int(failure.exitcode)
    return 0


def read(arguments: Sequence[str]) -> Namespace:
    """torchrun's options with peergrad as the program; peergrad's own flags may stand anywhere."""
    flags = [argument for argument in arguments if argument in FLAGS]
    others = [argument for argument in arguments if argument not in FLAGS]
    # A last word of ours: torchrun takes the first word that is no option for the program.
    options: Namespace = parse_args([*others, MODULE])  # type: ignore[no-untyped-call]
    overrides = [options.training_script, *options.training_script_args][:-1]
    options.training_script_args = [*overrides, *flags]
    options.training_script, options.module = MODULE, True
    return options


if __name__ == "__main__":
    sys.exit(main())
