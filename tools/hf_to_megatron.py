"""Convert an HF checkpoint to a Megatron (torch_dist) checkpoint, readable at any layout.

    python tools/hf_to_megatron.py --hf models/qwen3-0.6b --out checkpoints/qwen3-0.6b
    torchrun --nproc-per-node 4 tools/hf_to_megatron.py --tensor 2 --pipeline 2 --hf ... --out ...

The result goes into a run as ``model.weights=<out>`` (with ``model.path`` the HF folder).
"""

import sys

from peergrad.convert import hf_to_megatron, run

if __name__ == "__main__":
    sys.exit(run(str(__doc__), "--hf", hf_to_megatron))
