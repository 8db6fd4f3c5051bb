"""The program, on a CPU with Transformer Engine's own Python: ``python -m tests.te.train``, with
the arguments of ``python -m peergrad.main``. Servers must run apart, without the stand-in."""

import sys

if __name__ == "__main__":  # processes that it starts import this file, too
    from tests.te.install import install

    install()
    from peergrad.main import main

    sys.exit(main())
