"""Whether servers that somebody else started hold the weights of ``model.path``.

One that a run has used holds what that run sent last, and none tells where its weights are from.
"""

from peergrad.config import Config, Proof, require
from peergrad.parallel.hf.config import read_shape
from peergrad.parallel.hf.files import open_tensors
from peergrad.parallel.hf.folder import read_folder
from peergrad.parallel.hf.tensors import tensor_shapes
from peergrad.rollout.control import Control
from peergrad.rollout.held import checksums, new_digests, server_infos
from peergrad.rollout.proof import some_of, unequal


def check_served(config: Config, control: Control) -> bool:
    """Raise ValueError for a server with other weights than those of ``model.path``; whether that
    could be told. It cannot of servers that compute on GPUs, or share tensors among ranks: their
    digests are of another kind; nor with ``rollout.proof`` other than auto."""
    digests = new_digests(server_infos(control))
    if digests is None or digests.dtype is None or config.rollout.proof is not Proof.auto:
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
