"""A program that moves or compares checkpoints: its command line, its ranks, how it ends."""

import logging
import os
import re
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from tqdm import tqdm

from peergrad.config import Dtype, ParallelConfig, require
from peergrad.observing.screen import Screen
from peergrad.running.ending import FINISHED, Ending, refuse
from peergrad.running.place import Place, find_place
from peergrad.storage import StorageError, in_bytes

if TYPE_CHECKING:
    from peergrad.parallel.against_hf import Gap
    from peergrad.parallel.hf.config import Shape
    from peergrad.parallel.mesh import Mesh


@dataclass(frozen=True)
class Work:
    """What a conversion is asked for, and whom it tells."""

    options: Namespace
    screen: Screen
    ending: Ending
    stack: ExitStack  # closes what was opened

    @property
    def parallel(self) -> ParallelConfig:
        tensor, pipeline = self.options.tensor, self.options.pipeline
        # Megatron computes experts on tensor ranks only if these are sequence parallel.
        return ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=tensor > 1)

    @contextmanager
    def waiting(self, what: str, total: int, world: int = 1) -> Iterator["Bar"]:
        """Show a bar over this rank's share of ``total`` bytes."""
        bar = Bar(total // world)
        with self.screen.waiting(what, announce=True, detail=bar.text):
            yield bar


@dataclass
class Bar:
    """How far this rank is, in bytes; called with those that have come to it since."""

    total: int
    done: int = 0
    began: float = field(default_factory=time.monotonic)
    lock: Lock = field(default_factory=Lock)

    def __call__(self, size: int) -> None:
        with self.lock:
            self.done += size

    def text(self) -> str:
        done, seconds = min(self.done, self.total), time.monotonic() - self.began
        if not os.isatty(1):
            return f"{in_bytes(done)} of {in_bytes(self.total)}"
        shown = tqdm.format_meter(done, self.total, seconds, 60, unit="B", unit_scale=True)
        return str(shown)


def parse(parser: ArgumentParser) -> Namespace:
    """The command line, with what conversions and their verification have in common."""
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size of the work")
    parser.add_argument(
        "--pipeline", type=int, default=1, help="pipeline-parallel size of the work"
    )
    parser.add_argument(
        "--no-logits",
        action="store_true",
        help="compute no logits to compare with transformers: that takes the whole model's memory",
    )
    return parser.parse_args()


def perform(
    options: Namespace, opening: str, check: Callable[[], None], work: Callable[[Work], str]
) -> int:
    """Check, work, and print what ``work`` returns; the exit status. No GPU is used: bytes are
    moved, and the result is the same everywhere."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    logging.basicConfig(handlers=[logging.NullHandler()])  # the libraries' warnings are no news
    warnings.simplefilter("ignore")
    place = Place(0, 1)
    try:
        place = find_place()
        _check_sizes(options, place.world)
        check()
    except (ValueError, StorageError) as error:
        return refuse(error, place)
    ending = Ending(place)
    ending.how_to_resume = lambda: "nothing was left behind"
    with ending.signals():
        try:
            with (
                Screen(0, shown=place.rank == 0) as screen,
                ExitStack() as stack,
                ending.noted(),
            ):
                screen.say(opening)
                done = work(Work(options, screen, ending, stack))
        except BaseException as error:
            return ending.end(error)
    if place.rank == 0:
        print(done, flush=True)
    return FINISHED


def _check_sizes(options: Namespace, world: int) -> None:
    for name in ("tensor", "pipeline"):
        size = getattr(options, name)
        require(size > 0, f"--{name}", size, "must be at least 1", "leave it out")
    needed = options.tensor * options.pipeline
    started = f"{world} process was" if world == 1 else f"{world} processes were"
    require(
        world % needed == 0,
        "--tensor x --pipeline",
        needed,
        f"needs {needed} processes and {started} started",
        f"start it with torchrun --nproc-per-node {needed}, or leave both out: the result is the "
        "same",
    )


def beside(folder: Path) -> Path:
    """The manifest of the conversion that wrote ``folder``: not in it, for what is in a model's
    folder goes on to whatever is trained from it."""
    named = folder if folder.name not in ("", "..") else folder.resolve()
    return named.with_name(f"{named.name}.manifest.json")


def require_hf_folder(path: Path, key: str) -> None:
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists()
    name = str(path)
    require(
        not hub,
        key,
        name,
        "is no folder here, and no model hub is asked for it",
        f"download it first (hf download {name} --local-dir models/{path.name}) and name that "
        "folder",
    )
    require(path.exists(), key, name, "is not there", "correct the path")
    require(path.is_dir(), key, name, "is a file", "name the folder that it is in")
    from peergrad.checks import read_model_config

    read_model_config(name, key)


def step_folder(path: Path, screen: Screen) -> Path:
    """The step folder that ``path`` is, or the latest of the run or checkpoints folder that it
    is."""
    key, name = "--checkpoint", str(path)
    require(path.exists(), key, name, "is not there", "correct the path")
    require(path.is_dir(), key, name, "is a file", "name the step folder that it is in")
    if (path / "meta.json").is_file():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = sorted(p.name for p in folder.glob("step_*") if (p / "meta.json").is_file())
    try:
        latest = (folder / "latest").read_text().strip()
    except (OSError, ValueError):
        latest = ""
    if latest in steps:
        screen.say(f"taking {latest}, the latest of {folder}")
        return folder / latest
    remedy = (
        f"name one of {', '.join(str(folder / step) for step in steps[-3:])}"
        if steps
        else "name a step folder of a run, such as runs/x/checkpoints/step_000100"
    )
    raise ValueError(f"{key} = {name!r}: is no checkpoint (meta.json is missing); {remedy}")


def lay_out(work: Work, shape: "Shape", *, whole: bool = False) -> "Mesh":
    """The ranks at the layout asked for, or each with the ``whole`` model. Collective."""
    from peergrad.checks.layout import (
        divided_by_tensor,
        require_divisor,
        require_key_value_heads,
    )
    from peergrad.parallel.job import Job
    from peergrad.parallel.mesh import close_mesh, init_mesh, leave_layout

    options, speaker = work.options, work.ending.speaker
    divided = {**divided_by_tensor(shape), "MLP columns": shape.ffn}  # those of an expert, too
    require_divisor("--tensor", options.tensor, divided)
    require_key_value_heads("--tensor", options.tensor, shape)
    require_divisor("--pipeline", options.pipeline, {"layers": shape.layers})
    parallel = ParallelConfig() if whole else work.parallel
    if isinstance(speaker, Job):
        leave_layout()
        return init_mesh(parallel, seed=0, job=speaker)
    with work.screen.waiting("the other ranks"):
        job = work.ending.speaker = Job.connect(minutes=parallel.timeout_minutes)
        job.await_all(minutes=parallel.timeout_minutes, heard=work.screen.detail)
        work.stack.callback(close_mesh)
        return init_mesh(parallel, seed=0, job=job)


def compare_logits(
    work: Work, hf: Path, checkpoint: Path, shape: "Shape", dtype: Dtype
) -> "Gap | str":
    """Say how far the logits are apart, at the layout asked for; or why that is not known, which is
    returned then. Collective."""
    from peergrad.parallel.against_hf import logits_gap

    if work.options.no_logits:
        gap: Gap | str = "left out, as --no-logits asks for"
    else:
        mesh = lay_out(work, shape)
        with work.screen.waiting("logits to be compared", announce=True):
            gap = logits_gap(hf, checkpoint, work.parallel, dtype, mesh)
    work.screen.say(f"logits not compared: {gap}" if isinstance(gap, str) else str(gap))
    return gap
