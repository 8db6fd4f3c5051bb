"""Convert a Megatron checkpoint (of a run, or of hf_to_megatron.py) to an HF checkpoint.

python tools/megatron_to_hf.py --checkpoint runs/x/checkpoints/step_000100 --out models/x
torchrun --nproc-per-node 4 tools/megatron_to_hf.py --tensor 4 --checkpoint ... --out ...
"""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from peergrad.config import Config, Dtype, ModelConfig, ParallelConfig


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, type=Path, help="a step folder")
    parser.add_argument("--out", required=True, type=Path, help="new HF folder")
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
    from peergrad.parallel.snapshot import read_meta

    if options.out.exists():
        raise ValueError(f"--out = {options.out}: exists already; name a new folder or remove it")
    hf = options.checkpoint / "hf"
    if not (hf / "config.json").is_file():
        raise ValueError(
            f"--checkpoint = {options.checkpoint}: is no checkpoint (hf/config.json is missing); "
            "name a step folder"
        )
    stored = read_meta(options.checkpoint)["dtype"]
    config = Config(
        model=ModelConfig(path=str(hf), dtype=Dtype[options.dtype or stored]),
        parallel=ParallelConfig(tensor=options.tensor, pipeline=options.pipeline),
    )
    groups = init_groups(config.parallel, seed=0)
    try:
        scorer = Scorer(config, groups, path=str(hf), weights=str(options.checkpoint))
        scorer.export(options.out, companions=hf)
    finally:
        close_groups()


if __name__ == "__main__":
    sys.exit(main())
