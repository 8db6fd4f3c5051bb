"""Draw the learning curve of one or more runs, also of runs that are going on.

python tools/curve.py runs/quickstart_cpu
"""

import sys

from peergrad.observing.curve import main

if __name__ == "__main__":
    sys.exit(main())
