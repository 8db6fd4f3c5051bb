"""Convert an HF checkpoint to a Megatron (torch_dist) checkpoint, readable at any layout.

    python tools/hf_to_megatron.py --hf models/qwen3-0.6b --out checkpoints/qwen3-0.6b
    torchrun --nproc-per-node 4 tools/hf_to_megatron.py --tensor 2 --pipeline 2 --hf ... --out ...

The result goes into a run as ``model.weights=<out>`` (with ``model.path`` the HF folder).
"""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from peergrad.checks import read_model_config
from peergrad.config import Config, Dtype, ModelConfig, ParallelConfig


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hf", required=True, help="HF folder: config.json and safetensors")
    parser.add_argument("--out", required=True, type=Path, help="new checkpoint folder")
    parser.add_argument("--dtype", choices=[d.name for d in Dtype], help="default: as it is")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size of the work")
    parser.add_argument(
        "--pipeline", type=int, default=1, help="pipeline-parallel size of the work"
    )
    try:
        convert(parser.parse_args())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def convert(options: Namespace) -> None:
    # Imported here: --help should not have to wait for Megatron.
    from peergrad.parallel.groups import close_groups, init_groups
    from peergrad.parallel.policy import Scorer
    from peergrad.parallel.snapshot import save_weights

    if options.out.exists():
        raise ValueError(f"--out = {options.out}: exists already; name a new folder or remove it")
    stored = str(read_model_config(options.hf, "--hf").get("dtype"))
    if stored not in Dtype.__members__:
        stored = Dtype.bfloat16.name
    config = Config(
        model=ModelConfig(path=options.hf, dtype=Dtype[options.dtype or stored]),
        parallel=ParallelConfig(tensor=options.tensor, pipeline=options.pipeline),
    )
    groups = init_groups(config.parallel, seed=0)
    try:
        scorer = Scorer(config, groups, path=options.hf)
        save_weights(options.out, scorer.model, scorer.shape, groups, companions=Path(options.hf))
    finally:
        close_groups()


if __name__ == "__main__":
    sys.exit(main())
