"""Whether an HF folder and a Megatron checkpoint are the same model: tensor by tensor, by the
manifests beside them, by their logits (``tools/verify_conversion.py``). Nothing is written.
"""

from argparse import ArgumentParser
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from peergrad.config import Dtype, ParallelConfig, require
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
    from peergrad.parallel.hf.folder import Folder
    from peergrad.parallel.manifest import Finding
    from peergrad.parallel.mesh import Mesh
    from peergrad.parallel.rows import CheckpointTensors


def run(description: str) -> int:
    """Read the command line, compare, say what was found, and return the exit status."""
    parser = ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--hf", required=True, type=Path, help="HF folder")
    parser.add_argument("--checkpoint", required=True, type=Path, help="Megatron checkpoint")
    options = parse(parser)
    opening = f"comparing {options.hf} with {options.checkpoint}"
    return perform(options, opening, lambda: require_hf_folder(options.hf, "--hf"), verify)


def verify(work: Work) -> str:
    """Compare ``options.hf`` with ``options.checkpoint``, print a line for each finding, and raise
    ValueError with the first of them; what to say if there is none."""
    hf, checkpoint = work.options.hf, step_folder(work.options.checkpoint, work.screen)
    from peergrad.parallel.hf.config import read_shape
    from peergrad.parallel.hf.folder import read_folder

    folder, shape = read_folder(hf, "--hf"), read_shape(str(hf), "--hf")
    _require_same(shape, read_shape(str(checkpoint / "hf"), "--checkpoint"), checkpoint)
    with work.screen.waiting("the libraries to load", announce=True):
        from peergrad.parallel.damage import read_meta
        from peergrad.parallel.manifest import Finding
    try:
        stored = str(read_meta(checkpoint)["dtype"])
    except ValueError as error:
        rule = f"is no whole checkpoint ({error})"
        raise ValueError(f"--checkpoint = {str(checkpoint)!r}: {rule}; name another one") from error
    mesh = lay_out(work, shape, whole=True)
    count, found = _findings(work, folder, checkpoint, shape, mesh)
    for finding in found:
        work.screen.say(str(finding))
    if not found:
        kinds = {tensor.dtype for tensor in folder.tensors.values()}
        narrow = stored == "bfloat16" or "BF16" in kinds
        dtype = Dtype.bfloat16 if narrow else Dtype.float32
        gap = compare_logits(work, hf, checkpoint, shape, dtype)
        if isinstance(gap, str) or gap.fits:
            logits = "logits not compared" if isinstance(gap, str) else "and give the same logits"
            return f"{hf} and {checkpoint} hold the same {count} tensors, {logits}"
        found = [Finding("logits", f"differ: {gap}")]
    wrong = len({finding.name for finding in found})
    raise ValueError(
        f"--hf = {str(hf)!r} and --checkpoint = {str(checkpoint)!r}: {found[0]} (the first of "
        f"{wrong} wrong; {count} tensors read); convert again from the one that is right"
    )


def _findings(
    work: Work, folder: "Folder", checkpoint: Path, shape: "Shape", mesh: "Mesh"
) -> "tuple[int, list[Finding]]":
    """(how many tensors were read, what is wrong). Collective."""
    from peergrad.parallel import damage
    from peergrad.parallel.hf.tensors import tensor_shapes
    from peergrad.parallel.manifest import HF, MEGATRON, Finding, check_manifest, compare
    from peergrad.parallel.rows import CheckpointTensors
    from peergrad.parallel.streaming import of_folder, outline

    found = []
    problem = mesh.share(lambda: damage.damage(checkpoint)) or damage.verify(checkpoint, mesh)
    damaged = [Finding(str(checkpoint), f"is damaged: {problem}")] if problem else []
    model = outline(shape, ParallelConfig(), Dtype.float32, mesh)
    try:
        stored = CheckpointTensors(checkpoint, model, shape)
    except ValueError:
        if damaged:
            return 0, damaged
        raise
    order = list(tensor_shapes(shape))
    size = sum(tensor.size for tensor in folder.tensors.values())
    with work.waiting("all tensors to be compared", size, mesh.world) as bar:
        compared = compare(of_folder(folder, shape), stored, mesh, order=order, tick=bar)
    found = [*compared.findings, *_extra(folder, stored, shape)]
    paths = {HF: folder.path, MEGATRON: checkpoint}
    for side, path in paths.items():
        if beside(path).exists():
            other = paths[MEGATRON if side == HF else HF]
            found += check_manifest(beside(path), side, compared.tables, other)
        else:
            work.screen.say(f"no manifest lies beside {path}")
    return len(compared.tables[HF]), found + damaged


def _extra(folder: "Folder", stored: "CheckpointTensors", shape: "Shape") -> "list[Finding]":
    """Tensors that the model has no place for."""
    from peergrad.parallel.hf.tensors import EMBEDDING, HARMLESS, HEAD, tensor_shapes
    from peergrad.parallel.manifest import Finding
    from peergrad.parallel.rows import OfFile, fingerprint

    def is_copy() -> bool:
        one, two = (OfFile(folder.tensors[name]) for name in (HEAD, EMBEDDING))
        return fingerprint(one, one.dtype) == fingerprint(two, two.dtype)

    expected = tensor_shapes(shape)
    extra = [n for n in folder.tensors if n not in expected and not HARMLESS.fullmatch(n)]
    if shape.tied and HEAD in extra and EMBEDDING in folder.tensors and is_copy():
        extra.remove(HEAD)
    found = [Finding(name, "is extra in the HF folder") for name in extra]
    return found + [Finding(name, "is extra in the checkpoint") for name in stored.unknown()]


def _require_same(ours: "Shape", theirs: "Shape", checkpoint: Path) -> None:
    for name in (field.name for field in fields(ours)):
        one, two = getattr(ours, name), getattr(theirs, name)
        rule = f"is of another model ({name} {two} instead of {one} in --hf)"
        require(one == two, "--checkpoint", str(checkpoint), rule, "name the model's own")
