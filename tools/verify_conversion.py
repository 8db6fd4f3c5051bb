"""Compare an HF folder with a Megatron checkpoint: every tensor, the manifests, the logits.

    python tools/verify_conversion.py --hf models/qwen3-0.6b --checkpoint checkpoints/qwen3-0.6b
    torchrun --nproc-per-node 4 tools/verify_conversion.py --tensor 4 --hf ... --checkpoint ...

Whichever was converted to the other. Nothing is written; the status is 0 if both are one model.
"""

import sys

from peergrad.verify import run

if __name__ == "__main__":
    sys.exit(run(str(__doc__)))
