"""torchrun for peergrad: the same options, the ranks' own words and their exit status.

    python -m peergrad.launch --nproc-per-node 2 experiment=quickstart_cpu

torchrun works as well. When a rank fails it prints, after that rank's one line, a report of its own
of some thirty lines, and it ends with status 1 whatever the rank's was.
"""

import logging
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the ranks and wait for them; the exit status of the one that failed first."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_args(given or ["--help"])  # type: ignore[no-untyped-call]
    options.training_script_args = [options.training_script, *options.training_script_args]
    options.training_script, options.module = "peergrad.main", True
    logging.getLogger("torch").setLevel(logging.CRITICAL)  # its agent would tell it all again
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


if __name__ == "__main__":
    sys.exit(main())
