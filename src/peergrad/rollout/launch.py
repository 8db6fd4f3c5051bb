"""Run a command that dies with its parent: ``python -m peergrad.rollout.launch PARENT COMMAND...``.

The servers are started through it, so that a killed trainer leaves none behind.
"""

import os
import sys

from peergrad.running.lifetime import die_with_parent


def main(arguments: list[str]) -> None:
    """Usage: PARENT_PID COMMAND [ARGUMENT...]."""
    die_with_parent(int(arguments[0]))
    os.execvp(arguments[1], arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
