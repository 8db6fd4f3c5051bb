"""Checkpoint conversions, HF <-> Megatron, as the programs in ``tools/`` offer them.

On one process or, under torchrun, at any TP x PP; the result is the same bits.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from peergrad.checks import read_model_config
from peergrad.config import Config, Dtype, ModelConfig, ParallelConfig


def run(description: str, source: str, convert: Callable[[Namespace], None]) -> int:
    """Read the command line (``source`` names the option for what to convert), convert, and return
    the exit status; a ValueError becomes one line."""
    parser = ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(source, dest="source", required=True, type=Path, help="folder to convert")
    parser.add_argument("--out", required=True, type=Path, help="new folder")
    parser.add_argument("--dtype", choices=[d.name for d in Dtype], help="default: as it is")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size of the work")
    parser.add_argument(
        "--pipeline", type=int, default=1, help="pipeline-parallel size of the work"
    )
    options = parser.parse_args()
    try:
        if options.out.exists():
            raise ValueError(f"--out = {options.out}: exists already; name a new folder")
        convert(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def hf_to_megatron(options: Namespace) -> None:
    """Write the HF folder ``options.source`` as a checkpoint that ``model.weights`` takes."""
    # Imported in the functions: --help should not have to wait for Megatron.
    from peergrad.parallel.groups import close_groups, init_groups
    from peergrad.parallel.policy import Scorer
    from peergrad.parallel.snapshot import save_weights

    path = str(options.source)
    config = _config(options, path, stored=read_model_config(path, "--hf").get("dtype"))
    groups = init_groups(config.parallel, seed=0)
    try:
        scorer = Scorer(config, groups, path=path)
        save_weights(options.out, scorer.model, scorer.shape, groups, companions=options.source)
    finally:
        close_groups()


def megatron_to_hf(options: Namespace) -> None:
    """Write the weights of checkpoint ``options.source`` as an HF folder."""
    from peergrad.parallel.groups import close_groups, init_groups
    from peergrad.parallel.policy import Scorer
    from peergrad.parallel.snapshot import damage, read_meta

    problem = damage(options.source)
    if problem is not None:
        raise ValueError(
            f"--checkpoint = {options.source}: is no whole checkpoint ({problem}); "
            "name a step folder"
        )
    hf = options.source / "hf"
    config = _config(options, str(hf), stored=read_meta(options.source)["dtype"])
    groups = init_groups(config.parallel, seed=0)
    try:
        scorer = Scorer(config, groups, path=str(hf), weights=str(options.source))
        scorer.export(options.out, companions=hf)
    finally:
        close_groups()


def _config(options: Namespace, path: str, *, stored: object) -> Config:
    """``stored``: the precision to keep unless another is asked for; of a kind that Megatron does
    not train in, bfloat16."""
    known = str(stored) if str(stored) in Dtype.__members__ else Dtype.bfloat16.name
    return Config(
        model=ModelConfig(path=path, dtype=Dtype[options.dtype or known]),
        parallel=ParallelConfig(tensor=options.tensor, pipeline=options.pipeline),
    )
