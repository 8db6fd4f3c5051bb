"""Checkpoint conversions, HF <-> Megatron, as the programs in ``tools/`` offer them.

On one process or, under torchrun, at any TP x PP; the result is the same bits. What was written is
read back from the disk and compared with the source, tensor by tensor, before success is claimed.
"""

import logging
import os
import re
import shutil
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peergrad.config import Dtype, ParallelConfig, require
from peergrad.observing.screen import Screen
from peergrad.running.ending import FINISHED, Ending, refuse
from peergrad.running.place import Place, find_place
from peergrad.storage import StorageError, in_bytes, size_of, writing

if TYPE_CHECKING:
    from torch import Tensor

    from peergrad.parallel.hf.config import Shape
    from peergrad.parallel.mesh import Mesh
    from peergrad.parallel.model import Stage

STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
EXACT = {"float32": ("float32", "float16", "bfloat16"), "bfloat16": ("bfloat16",)}


@dataclass(frozen=True)
class Work:
    """What a conversion is asked for, and whom it tells."""

    options: Namespace
    screen: Screen
    ending: Ending
    stack: ExitStack  # closes what was opened


def run(description: str, source: str, convert: Callable[[Work], str]) -> int:
    """Read the command line (``source`` names the option for what to convert), convert, say what
    was written, and return the exit status."""
    parser = ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(source, dest="source", required=True, type=Path, help="folder to convert")
    parser.add_argument("--out", required=True, type=Path, help="new folder")
    parser.add_argument("--dtype", choices=[d.name for d in Dtype], help="default: as it is")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size of the work")
    parser.add_argument(
        "--pipeline", type=int, default=1, help="pipeline-parallel size of the work"
    )
    options = parser.parse_args()
    logging.basicConfig(handlers=[logging.NullHandler()])  # the libraries' warnings are no news
    warnings.simplefilter("ignore")
    start, place = time.monotonic(), Place(0, 1)
    try:
        place = find_place()
        _check_options(options, source, place.world)
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
                screen.say(f"converting {options.source} to {options.out}")
                done = convert(Work(options, screen, ending, stack))
        except BaseException as error:
            return ending.end(error)
    if place.rank == 0:
        seconds = time.monotonic() - start
        size = in_bytes(size_of(options.out))
        print(f"wrote {options.out}: {done}, {size} in {seconds:.0f} s; {CHECKED}", flush=True)
    return FINISHED


CHECKED = "every tensor read back and compared"


def hf_to_megatron(work: Work) -> str:
    """Write the HF folder ``options.source`` as a checkpoint that ``model.weights`` takes."""
    out, path, key = work.options.out, work.options.source, "--hf"
    _require_hf_folder(path, key)
    # Imported in the functions: --help and wrong options should not have to wait for Megatron.
    from peergrad.parallel.hf.companions import Companions
    from peergrad.parallel.hf.config import read_shape
    from peergrad.parallel.hf.fit import check_weights, used_dtypes
    from peergrad.parallel.hf.folder import read_folder

    read_folder(path, key)  # a folder without weights is more often meant wrong than its config
    shape = read_shape(str(path), key)
    source = check_weights(str(path), key, shape, values=False)
    companions = Companions.read(path, key)
    if source.unread:
        work.screen.say(str(source.unread_line()))
    stored = {STORED[dtype] for dtype in used_dtypes(source, shape)}
    dtype = _target(work.options.dtype, stored)
    with work.screen.waiting("the libraries to load", announce=True):
        from peergrad.parallel.hf.files import open_tensors
        from peergrad.parallel.snapshot import load_weights, on_every_rank, save_weights
        from peergrad.parallel.weights import load_hf, read_shards

    model, mesh = _model(work, shape, dtype)
    with work.screen.waiting(f"{path} to be read", announce=True):
        on_every_rank(mesh, lambda: load_hf(model, str(path), shape, mesh, key=key))
    with _writing(work):
        save_weights(out, model, shape, mesh, companions=companions)

    def compare() -> None:
        with open_tensors(source) as reader:
            for parameter, shard in read_shards(model, reader, shape, mesh):
                _require_same(parameter.data, shard.to(parameter.dtype), out)

    with _reading_back(work, mesh):
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))  # whatever is not read cannot pass
        load_weights(out, model, shape, mesh, key="--out")
        on_every_rank(mesh, compare)
    return _summary(shape, stored, dtype)


def megatron_to_hf(work: Work) -> str:
    """Write the weights of checkpoint ``options.source`` as an HF folder."""
    out, key = work.options.out, "--checkpoint"
    path = _step_folder(work.options.source, work.screen)
    with work.screen.waiting("the libraries to load", announce=True):
        from peergrad.parallel.damage import damage, read_meta
        from peergrad.parallel.hf.companions import Companions
        from peergrad.parallel.hf.config import read_shape
        from peergrad.parallel.hf.files import open_tensors, write_hf
        from peergrad.parallel.hf.fit import check_weights
        from peergrad.parallel.snapshot import load_weights
        from peergrad.parallel.weights import export_hf

    problem = damage(path)
    require(
        problem is None, key, str(path), f"is no whole checkpoint ({problem})", "name another one"
    )
    stored = {str(read_meta(path)["dtype"])}
    dtype = _target(work.options.dtype, stored)
    shape, companions = read_shape(str(path / "hf"), key), Companions.read(path / "hf", key)
    model, mesh = _model(work, shape, dtype)
    with work.screen.waiting(f"{path} to be read", announce=True):
        load_weights(path, model, shape, mesh, key=key)
    with _writing(work):
        _on_rank_0(
            mesh,
            export_hf(model, shape, mesh),
            lambda stream: write_hf(stream, out, companions=companions, replace=False),
        )

    def compare(stream: "Iterator[tuple[str, Tensor]]") -> None:
        with open_tensors(check_weights(str(out), "--out", shape)) as reader:
            names = reader.names()
            for name, tensor in stream:
                _require_same(tensor.cpu(), reader.get(name), out)
                names.remove(name)
        assert not names

    with _reading_back(work, mesh):
        _on_rank_0(mesh, export_hf(model, shape, mesh), compare)
    return _summary(shape, stored, dtype)


def _check_options(options: Namespace, source: str, world: int) -> None:
    out, path = options.out, options.source
    require(not os.path.lexists(out), "--out", str(out), "exists already", "name a new folder")
    inside = out.resolve().is_relative_to(path.resolve())
    require(not inside, "--out", str(out), f"is inside {source}", "name a folder beside it")
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
    with writing("--out", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out.parent, os.W_OK | os.X_OK):
            raise PermissionError(13, "permission is denied", str(out.parent))


def _require_hf_folder(path: Path, key: str) -> None:
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


def _step_folder(path: Path, screen: Screen) -> Path:
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


def _target(asked: str | None, stored: set[str]) -> Dtype:
    """The precision to write: as asked, or the one that is stored; of a kind that Megatron does not
    train in bfloat16, and of a mixture the wider."""
    if asked is not None:
        return Dtype[asked]
    wide = stored & {"float32", "float64"}
    return Dtype.float32 if wide else Dtype.bfloat16


def _model(work: Work, shape: "Shape", dtype: Dtype) -> "tuple[Stage, Mesh]":
    """This rank's part of a model of ``shape``, yet to be filled."""
    from peergrad.parallel.job import Job
    from peergrad.parallel.mesh import close_mesh, init_mesh
    from peergrad.parallel.model import build_model

    _check_sizes(work.options, shape)
    parallel = ParallelConfig(tensor=work.options.tensor, pipeline=work.options.pipeline)
    with work.screen.waiting("the other ranks"):
        job = work.ending.speaker = Job.connect(minutes=parallel.timeout_minutes)
        job.await_all(minutes=parallel.timeout_minutes, heard=work.screen.detail)
        work.stack.callback(close_mesh)
        mesh = init_mesh(parallel, seed=0, job=job)
    return build_model(shape, parallel, dtype, mesh), mesh


def _check_sizes(options: Namespace, shape: "Shape") -> None:
    from peergrad.parallel.hf.config import VOCAB_MULTIPLE

    divided = {"attention heads": shape.heads, "key-value heads": shape.kv_heads}
    divided |= {"MLP columns": shape.ffn, "padded vocabulary rows": VOCAB_MULTIPLE}
    for key, size, counts in (
        ("--tensor", options.tensor, divided),
        ("--pipeline", options.pipeline, {"layers": shape.layers}),
    ):
        for what, number in counts.items():
            rule = f"must divide the model's {number} {what}"
            require(number % size == 0, key, size, rule, f"use a divisor of {number}, or leave it")


def _on_rank_0(
    mesh: "Mesh",
    stream: "Iterator[tuple[str, Tensor]]",
    function: "Callable[[Iterator[tuple[str, Tensor]]], None]",
) -> None:
    """Give rank 0's ``function`` the stream that every rank must drain. Collective."""
    from peergrad.parallel.snapshot import on_every_rank

    failure: Exception | None = None
    if mesh.rank == 0:
        try:
            function(stream)
        except Exception as error:
            failure = error
    for _ in stream:
        pass

    def fail() -> None:
        if failure is not None:
            raise failure

    on_every_rank(mesh, fail)


@contextmanager
def _writing(work: Work) -> Iterator[None]:
    out = work.options.out
    with work.screen.waiting(f"{out} to be written", announce=True, detail=lambda: _written(out)):
        yield


@contextmanager
def _reading_back(work: Work, mesh: "Mesh") -> Iterator[None]:
    """Remove what was written if it cannot be read back."""
    try:
        with work.screen.waiting("what was written to be read back", announce=True):
            yield
    except BaseException:
        if mesh.rank == 0:
            shutil.rmtree(work.options.out, ignore_errors=True)
        raise


def _require_same(written: "Tensor", source: "Tensor", out: Path) -> None:
    """Bit for bit, so that NaN and the sign of zero count too."""
    import torch

    kinds = {2: torch.int16, 4: torch.int32}
    same = written.dtype == source.dtype and torch.equal(
        *(t.cpu().contiguous().view(kinds[t.itemsize]) for t in (written, source))
    )
    if not same:
        raise RuntimeError(
            f"--out = {str(out)!r}: does not read back as it was written, and was removed; "
            "try again on another disk"
        )


def _written(out: Path) -> str:
    partials = out.parent.glob(f".{out.name}.partial*")
    try:
        return f"{in_bytes(sum(size_of(path) for path in partials))} written"
    except OSError:
        return ""  # renamed while it was counted


def _summary(shape: "Shape", stored: set[str], dtype: Dtype) -> str:
    from peergrad.parallel.hf.tensors import parameters

    rounded = sorted(stored - set(EXACT[dtype.name]))
    kind = f"{dtype.name} (rounded from {' and '.join(rounded)})" if rounded else dtype.name
    return f"{shape.layers} layers, {parameters(shape):,} parameters, {kind}"
