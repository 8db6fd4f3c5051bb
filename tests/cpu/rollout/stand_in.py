"""What takes the place of SGLang's server where only starts and ends matter: SCRIPT ARGUMENT...

Like ``peergrad.rollout.cpu_server`` it can be run as a module, or forked from a process that has
called ``load``.
"""

import os
import sys

LOAD = "STAND_IN_LOAD"
"""The environment variable with the script that ``load`` runs."""
loaded = False


def load() -> None:
    global loaded
    loaded = True
    exec(os.environ.get(LOAD, ""), {})


def main() -> None:
    """The script finds its arguments behind ``sys.argv[0]``, and whether it was ``loaded``."""
    script = sys.argv.pop(1)
    exec(script, {"loaded": loaded})


if __name__ == "__main__":
    main()
