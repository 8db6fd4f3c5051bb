"""Whether servers that somebody else started hold the weights of ``model.path``.

One that a run has used holds what that run sent last, and none tells where its weights are from.
"""

from collections.abc import Sequence

from peergrad.config import Config, Proof, require
from peergrad.parallel.hf.config import read_shape
from peergrad.parallel.hf.files import open_tensors
from peergrad.parallel.hf.folder import read_folder
from peergrad.parallel.hf.tensors import tensor_shapes
from peergrad.rollout.control import Control
from peergrad.rollout.errors import some_of
from peergrad.rollout.held import checksums, new_digests, server_infos
from peergrad.rollout.proof import unequal
from peergrad.rollout.requests import Json


def check_served(config: Config, control: Control) -> bool:
    """Raise ValueError for a server with other weights than those of ``model.path``; whether that
    could be told. It cannot of servers that compute on GPUs, or share tensors among ranks: their
    digests are of another kind; nor with ``rollout.proof`` other than auto."""
    infos = server_infos(control)
    digests = new_digests(infos, config.rollout.servers.fp8)
    if digests is None or digests.dtype is None or config.rollout.proof is not Proof.auto:
        _require_loaded(control, infos)
        return False
    path = config.model.path
    with open_tensors(read_folder(path)) as reader:
        for name in tensor_shapes(read_shape(path)):
            digests.add(name, reader.get(name).to(digests.dtype))
    known = {name: digest for name, digest in digests.result().items() if digest is not None}
    for url, ranks in checksums(control).items():
        wrong = unequal(known, ranks)
        require(
            not wrong,
            "rollout.servers.urls",
            url,
            f"holds other weights than model.path = {path!r}, of {some_of(wrong)}",
            "start it anew with that model, or name another server",
        )
    return True


def _require_loaded(control: Control, infos: Sequence[Json]) -> None:
    """Of a server that started without weights nobody knows whether a run has sent it any."""
    for url, info in zip(control.urls, infos, strict=True):
        rule = "was started without weights (--load-format dummy), and cannot tell what it holds"
        remedy = "start one with the model's weights; python tools/quantize_fp8.py makes FP8 ones"
        loaded = info.get("load_format") != "dummy"
        require(loaded, "rollout.servers.urls", url, rule, remedy)
