"""Write an HF checkpoint with its matrices in FP8 blocks, as SGLang serves them.

python tools/quantize_fp8.py --hf models/qwen3-8b --out models/qwen3-8b-fp8
"""

import sys

from peergrad.quantise import run

if __name__ == "__main__":
    sys.exit(run(str(__doc__)))
