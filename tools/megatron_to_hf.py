"""Convert a Megatron checkpoint (of a run, or of hf_to_megatron.py) to an HF checkpoint.

python tools/megatron_to_hf.py --checkpoint runs/x/checkpoints/step_000100 --out models/x
torchrun --nproc-per-node 4 tools/megatron_to_hf.py --tensor 4 --checkpoint ... --out ...
"""

import sys

from peergrad.convert import megatron_to_hf, run

if __name__ == "__main__":
    sys.exit(run(str(__doc__), "--checkpoint", megatron_to_hf))
