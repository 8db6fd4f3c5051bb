"""Checkpoint conversions, HF <-> Megatron, as the programs in ``tools/`` offer them.

On one process or, under torchrun, at any TP x PP; the result is the same bits. Tensors come and go
one by one. What was written is read back from the disk and compared with the source, tensor by
tensor, and then by the logits that it gives, before success is claimed.
"""

import ctypes
import os
import re
import shutil
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from peergrad.config import Dtype, ParallelConfig, require
from peergrad.storage import in_bytes, replace_text, size_of, writing
from peergrad.work import (
    Work,
    beside,
    compare_logits,
    lay_out,
    parse,
    perform,
    require_hf_folder,
    step_folder,
)

if TYPE_CHECKING:
    from peergrad.parallel.hf.config import Shape
    from peergrad.parallel.mesh import Mesh

STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
M_MMAP_THRESHOLD = -3  # of malloc.h
EXACT = {"float32": ("float32", "float16", "bfloat16"), "bfloat16": ("bfloat16",)}


def run(description: str, source: str, convert: Callable[[Work], str]) -> int:
    """Read the command line (``source`` names the option for what to convert), convert, say what
    was written, and return the exit status."""
    parser = ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(source, dest="source", required=True, type=Path, help="folder to convert")
    parser.add_argument("--out", required=True, type=Path, help="new folder")
    parser.add_argument("--dtype", choices=[d.name for d in Dtype], help="default: as it is")
    options = parse(parser)
    start = time.monotonic()

    def say(done: str) -> str:
        size, seconds = in_bytes(size_of(options.out)), time.monotonic() - start
        return f"wrote {options.out}: {done}, {size} in {seconds:.0f} s; {CHECKED}"

    return perform(
        options,
        f"converting {options.source} to {options.out}",
        lambda: _check_options(options, source),
        lambda work: say(convert(work)),
    )


CHECKED = "every tensor read back and compared"


def hf_to_megatron(work: Work) -> str:
    """Write the HF folder ``options.source`` as a checkpoint that ``model.weights`` takes."""
    out, path, key = work.options.out, work.options.source, "--hf"
    require_hf_folder(path, key)
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
        from peergrad.parallel.snapshot import on_every_rank
        from peergrad.parallel.streaming import of_folder, outline, write_megatron_from

    mesh = lay_out(work, shape)
    on_every_rank(mesh, lambda: check_weights(str(path), key, shape, values=mesh.rank == 0))
    memory = Memory.now()
    tensors, model = of_folder(source, shape), outline(shape, work.parallel, dtype, mesh)
    size = sum(_sizes(shape, dtype).values())
    with work.waiting(f"{out} to be written", size, mesh.world) as bar:
        write_megatron_from(tensors, out, model, shape, mesh, companions=companions, tick=bar)
    certify(work, path, out, shape, dtype, mesh, memory, held=dtype)
    return _summary(shape, stored, dtype)


def megatron_to_hf(work: Work) -> str:
    """Write the weights of checkpoint ``options.source`` as an HF folder."""
    out, key = work.options.out, "--checkpoint"
    path = step_folder(work.options.source, work.screen)
    with work.screen.waiting("the libraries to load", announce=True):
        from peergrad.parallel.damage import damage, read_meta, verify
        from peergrad.parallel.hf.companions import Companions
        from peergrad.parallel.hf.config import read_shape
        from peergrad.parallel.resume import require_same_model
        from peergrad.parallel.rows import CheckpointTensors
        from peergrad.parallel.streaming import outline, write_hf_from

    def require_whole(problem: str | None) -> None:
        rule = f"is no whole checkpoint ({problem})"
        require(problem is None, key, str(path), rule, "name another one")

    require_whole(damage(path))
    held = Dtype[read_meta(path)["dtype"]]
    stored = {held.name}
    dtype = _target(work.options.dtype, stored)
    shape, companions = read_shape(str(path / "hf"), key), Companions.read(path / "hf", key)
    require_same_model(key, path, read_meta(path), shape)
    mesh = lay_out(work, shape, whole=True)
    with work.screen.waiting(f"{path} to be verified", announce=True):
        require_whole(verify(path, mesh))
    memory = Memory.now()
    source = CheckpointTensors(path, outline(shape, ParallelConfig(), dtype, mesh), shape)
    size = sum(_sizes(shape, dtype).values())
    with work.waiting(f"{out} to be written", size, mesh.world) as bar:
        write_hf_from(source, out, shape, mesh, dtype=dtype, companions=companions, tick=bar)
    certify(work, out, path, shape, dtype, mesh, memory, held=held)
    return _summary(shape, stored, dtype)


def certify(
    work: Work,
    hf: Path,
    checkpoint: Path,
    shape: "Shape",
    dtype: Dtype,
    mesh: "Mesh",
    memory: "Memory",
    *,
    held: Dtype,
) -> None:
    """Hold what was written against its source, and leave a manifest beside it. ``held``: the
    precision in which tensors were in memory. Collective."""
    from peergrad.parallel.against_hf import Gap
    from peergrad.parallel.hf.folder import read_folder
    from peergrad.parallel.hf.tensors import tensor_shapes
    from peergrad.parallel.manifest import compare, describe
    from peergrad.parallel.rows import CheckpointTensors
    from peergrad.parallel.streaming import of_folder, outline

    out = work.options.out
    with _removed_on_failure(out, mesh):
        mesh = lay_out(work, shape, whole=True)
        size = sum(_sizes(shape, dtype).values())
        with work.waiting("what was written to be read back", size, mesh.world) as bar:
            model = outline(shape, ParallelConfig(), dtype, mesh)
            found = compare(
                of_folder(read_folder(hf, "--out" if hf == out else "--hf"), shape),
                CheckpointTensors(checkpoint, model, shape),
                mesh,
                order=list(tensor_shapes(shape)),
                tick=bar,
            )
        for finding in found.findings:
            raise RuntimeError(
                f"--out = {str(out)!r}: does not read back as it was written ({finding}), and was "
                "removed; try again on another disk"
            )
        used = {**memory.used(mesh), "largest_layer": max(_sizes(shape, held).values())}
        more = in_bytes(used["peak"] - used["before"])
        work.screen.say(
            f"memory: {in_bytes(used['before'])} before, at most {more} more; the largest layer "
            f"has {in_bytes(used['largest_layer'])}"
        )
        gap = compare_logits(work, hf, checkpoint, shape, dtype)
        if isinstance(gap, Gap) and not gap.fits:
            raise RuntimeError(
                f"--out = {str(out)!r}: gives other logits than transformers ({gap}), and was "
                "removed; convert with --no-logits to look into it"
            )
        facts = {"logits": vars(gap) if isinstance(gap, Gap) else gap, "memory": used}
        manifest = describe(work.options.source, out, found.tables, dtype=dtype.name, **facts)
        with writing("manifest", beside(out)):
            mesh.share(lambda: replace_text(beside(out), manifest))


def _check_options(options: Namespace, source: str) -> None:
    path, out = options.source, options.out
    for new in (out, beside(out)):
        there = os.path.lexists(new)
        require(not there, "--out", str(new), "exists already", "name a new folder")
    inside = out.resolve().is_relative_to(path.resolve())
    require(not inside, "--out", str(out), f"is inside {source}", "name a folder beside it")
    with writing("--out", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out.parent, os.W_OK | os.X_OK):
            raise PermissionError(13, "permission is denied", str(out.parent))


def _target(asked: str | None, stored: set[str]) -> Dtype:
    """The precision to write: as asked, or the one that is stored; of a kind that Megatron does not
    train in bfloat16, and of a mixture the wider."""
    if asked is not None:
        return Dtype[asked]
    wide = stored & {"float32", "float64"}
    return Dtype.float32 if wide else Dtype.bfloat16


@contextmanager
def _removed_on_failure(out: Path, mesh: "Mesh") -> Iterator[None]:
    try:
        yield
    except BaseException:
        if mesh.rank == 0:
            shutil.rmtree(out, ignore_errors=True)
        raise


@dataclass(frozen=True)
class Memory:
    """What this process holds before tensors come and go.

    Example:
        ``Memory(before=612_000_000)``
    """

    before: int  # resident bytes

    @classmethod
    def now(cls) -> "Memory":
        """From here on the most is counted, and what a tensor leaves behind goes to the kernel, not
        to the next one: a trainer would rather keep it (``parallel/device.py``)."""
        with suppress(OSError, AttributeError):  # another C library has its own ways
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
        with suppress(OSError):  # else the mark of the time before stays, and says more than was
            Path("/proc/self/clear_refs").write_text("5")
        return cls(_status("VmRSS"))

    def used(self, mesh: "Mesh") -> dict[str, int]:
        """The most that any rank has held since, and before; in bytes. Collective."""
        peaks = mesh.gather((_status("VmHWM"), self.before))
        peak, before = max(peaks, key=lambda rank: rank[0] - rank[1])
        return {"peak": peak, "before": before}


def _status(name: str) -> int:
    match = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None, name
    return int(match[1]) << 10


def _sizes(shape: "Shape", dtype: Dtype) -> dict[str, int]:
    """Bytes of each layer, and of each tensor beside them."""
    from peergrad.parallel.hf.tensors import tensor_shapes

    found: dict[str, int] = {}
    for name, size in tensor_shapes(shape).items():
        layer = re.match(r"model\.layers\.\d+\.", name)
        key = layer[0] if layer else name
        found[key] = found.get(key, 0) + prod(size) * (4 if dtype is Dtype.float32 else 2)
    return found


def _summary(shape: "Shape", stored: set[str], dtype: Dtype) -> str:
    from peergrad.parallel.hf.tensors import parameters

    rounded = sorted(stored - set(EXACT[dtype.name]))
    kind = f"{dtype.name} (rounded from {' and '.join(rounded)})" if rounded else dtype.name
    return f"{shape.layers} layers, {parameters(shape):,} parameters, {kind}"
