"""Check every node of a job, and all of them together, before it starts.

    srun -N4 -n4 python tools/preflight.py --shared /shared/jobs --ports 29500,30000-30007 \\
        experiment=mine
"""

import sys

from peergrad.preflight import main

if __name__ == "__main__":
    sys.exit(main())
