"""An HF checkpoint with its matrices in FP8 blocks, of one in full precision, as the program
``tools/quantize_fp8.py`` writes it.

It is what servers that somebody else starts are to be started on with ``rollout.servers.fp8=block``
(the run's own need none), and what an FP8 model is evaluated from. Tensors come and go one by one,
in bfloat16 as the trainer has them: the codes are those of a run's first weight sync. What was
written is read back and held against what it was made from.
"""

import os
import shutil
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from peergrad.config import Fp8Scales, require
from peergrad.storage import in_bytes, size_of, writing
from peergrad.work import Work, perform, require_hf_folder

if TYPE_CHECKING:
    from torch import Tensor

    from peergrad.parallel.hf.config import Shape
    from peergrad.parallel.hf.folder import Folder

KEY, OUT = "--hf", "--out"


def run(description: str) -> int:
    """Read the command line, quantise, say what was written, and return the exit status."""
    parser = ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(KEY, dest="source", required=True, type=Path, help="folder to quantise")
    parser.add_argument(OUT, required=True, type=Path, help="new folder")
    parser.add_argument(
        "--scales",
        choices=[scales.name for scales in Fp8Scales],
        default=Fp8Scales.power_of_two.name,
        help="as rollout.servers.fp8_scales; default: %(default)s",
    )
    options = parser.parse_args()
    options.tensor = options.pipeline = 1
    return perform(
        options,
        f"quantising {options.source} to {options.out}",
        lambda: _check_options(options.source, options.out),
        quantise,
    )


def quantise(work: Work) -> str:
    """Write the HF folder ``options.source`` in FP8 blocks as the new folder ``options.out``."""
    source, out, began = work.options.source, work.options.out, time.monotonic()
    scales = Fp8Scales[work.options.scales]
    require_hf_folder(source, KEY)
    # Imported here: --help and wrong options should not have to wait for torch.
    from peergrad.parallel.hf.companions import Companions
    from peergrad.parallel.hf.config import read_shape
    from peergrad.parallel.hf.fit import check_weights
    from peergrad.parallel.hf.folder import read_folder
    from peergrad.parallel.hf.fp8 import check_blocks, in_blocks

    read_folder(source, KEY)  # a folder without weights is more often meant wrong than its config
    shape = read_shape(str(source), KEY)
    check_blocks(KEY, str(source), shape)
    folder = check_weights(str(source), KEY, shape)
    companions = in_blocks(Companions.read(source, KEY), shape, scales)
    if folder.unread:
        work.screen.say(str(folder.unread_line()))
    with work.screen.waiting("the libraries to load", announce=True):
        from peergrad.parallel.hf.files import write_hf

    with work.screen.waiting(f"{out} to be written", announce=True):
        tensors = _served(folder, shape, scales)
        write_hf(tensors, out, companions=companions, replace=False)
    with work.screen.waiting("what was written to be read back", announce=True), _kept(out):
        _compare(read_folder(out, OUT), _served(folder, shape, scales))
    size, seconds = in_bytes(size_of(out)), time.monotonic() - began
    kind = f"{scales.name} scales, {size} in {seconds:.0f} s"
    return f"wrote {out}: {kind}; every tensor read back and compared"


def _served(folder: "Folder", shape: "Shape", scales: Fp8Scales) -> "Iterator[tuple[str, Tensor]]":
    """The tensors of the checkpoint, in the order of the model's."""
    import torch

    from peergrad import fp8
    from peergrad.parallel.hf.files import open_tensors
    from peergrad.parallel.hf.tensors import tensor_shapes

    with open_tensors(folder) as reader:
        for name in tensor_shapes(shape):
            yield from fp8.served(name, reader.get(name).to(torch.bfloat16), scales)


def _compare(written: "Folder", tensors: "Iterator[tuple[str, Tensor]]") -> None:
    import torch

    from peergrad.parallel.hf.files import open_tensors

    with open_tensors(written) as reader:
        for name, tensor in tensors:
            same = torch.equal(reader.get(name).view(torch.uint8), tensor.view(torch.uint8))
            if not same:
                raise RuntimeError(
                    f"{OUT} = {str(written.path)!r}: does not read back as it was written "
                    f"({name}), and was removed; try again on another disk"
                )


@contextmanager
def _kept(out: Path) -> Iterator[None]:
    """Unless the body fails."""
    try:
        yield
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


def _check_options(source: Path, out: Path) -> None:
    require(not os.path.lexists(out), OUT, str(out), "exists already", "name a new folder")
    inside = out.resolve().is_relative_to(source.resolve())
    require(not inside, OUT, str(out), f"is inside {KEY}", "name a folder beside it")
    with writing(OUT, out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out.parent, os.W_OK | os.X_OK):
            raise PermissionError(13, "permission is denied", str(out.parent))
