"""Weights from the trainer into the servers, by broadcast.

The only user of torch.distributed in this package, and only on rank 0 of the trainer: it shares
with the servers a process group of its own, apart from the trainer's groups.
"""

import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any, cast
from urllib.parse import urlsplit
from uuid import uuid4

import torch
import torch.distributed as dist

from peergrad.config import Proof as ProofMode
from peergrad.data import Group
from peergrad.rollout.buckets import Bucket, NamedTensors, buckets, update_payload
from peergrad.rollout.control import Control, finish
from peergrad.rollout.proof import Digests, Proof, canary_group, canary_tokens, compare
from peergrad.rollout.sglang import Json, ServerError, score_payload

CLEAN_UP_SECONDS = 10.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def init_payload(
    address: str, port: int, rank: int, world: int, group_name: str, backend: str
) -> Json:
    """Body of /init_weights_update_group for the server whose first rank is ``rank``."""
    return {
        "master_address": address,
        "master_port": port,
        "rank_offset": rank,
        "world_size": world,
        "group_name": group_name,
        "backend": backend,
    }


class WeightSync:
    """Loads weights into every server at once. One caller at a time, in one process.

    The order is what makes it safe: pause everywhere, so that no token is drawn from mixed weights;
    buckets between begin and end; the new version and an empty cache with the last bucket; the
    digests are compared *before* generation goes on. Requests in flight resume by themselves and
    continue with the new weights. After a failure in between, the servers stay paused, for their
    weights are then neither the old nor the new; a later ``load`` that succeeds puts it right.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        vocab_size: int,
        bucket_mb: int = 512,
        proof: ProofMode = ProofMode.auto,
        timeout: float = 300.0,
    ) -> None:
        """``timeout``: seconds that one bucket, and one control request, may take."""
        self._control = Control(urls, timeout=timeout)
        self._limit = bucket_mb << 20
        self._proof = proof
        self._timeout = timedelta(seconds=timeout)
        self._canary = canary_tokens(vocab_size)
        self._group: _Broadcast | None = None
        self._abandoned: list[_Broadcast] = []  # to free one would wait for its broadcast
        self._servers: list[Json] | None = None

    def load(self, named: NamedTensors, version: int) -> Proof:
        """Broadcast pairs of HF name and full tensor; returns when all servers generate from them.

        Holds one bucket beside what the iterator holds. Raises ServerError if a server fails, and
        RuntimeError if the servers end up with other weights than were sent.
        """
        digests = self._new_digests()
        stream = buckets(_observed(named, digests), self._limit)
        first = next(stream, None)
        if first is None:
            raise ValueError("there are no weights to load")
        group = self._joined(first[0].flat.device)
        self._control.post("/pause_generation", {"mode": "retract"})
        with self._update_window():
            for bucket, last in chain([first], stream):
                self._send(bucket, group, version if last else None)
        counts = self._compare(digests)
        self._control.post("/continue_generation")
        return Proof(version, *counts, canary=self._score_canary(version))

    def close(self) -> None:
        """Leave the group; the servers may be gone already."""
        if self._group is not None:
            self._destroy(self._group)
            dist.destroy_process_group(self._group.handle)
            self._group = None
        self._control.close()

    @contextmanager
    def _update_window(self) -> Iterator[None]:
        """Between begin and end; the end comes on failure, too, or no update could follow."""
        try:
            self._control.post("/begin_weight_update")
        except ServerError:  # left open by a trainer that was killed
            self._control.post("/end_weight_update")
            self._control.post("/begin_weight_update")
        try:
            yield
        except BaseException:
            with suppress(ServerError):  # a server may hang in a broadcast that nobody else joined
                self._control.post("/end_weight_update", timeout=CLEAN_UP_SECONDS)
            raise
        self._control.post("/end_weight_update")

    def _send(self, bucket: Bucket, group: "_Broadcast", version: int | None) -> None:
        body = update_payload(bucket, group.name, version)
        answers = self._control.start(
            "/update_weights_from_distributed", [body] * len(self._control.urls)
        )
        work = dist.broadcast(bucket.flat, src=0, group=group.handle, async_op=True)
        try:
            finish(answers)  # first: a server that refused will never join the broadcast
            work.wait()
        except BaseException:
            self._abandon(group)
            raise

    def _abandon(self, group: "_Broadcast") -> None:
        """Give up a group in which a broadcast may hang; the next ``load`` makes a new one."""
        self._group = None
        self._abandoned.append(group)
        group.handle.abort()  # ends NCCL's broadcast; Gloo's ends when a server closes its side
        self._destroy(group)

    def _destroy(self, group: "_Broadcast") -> None:
        """Have the servers leave ``group``, those that still answer."""
        body = {"group_name": group.name}
        with suppress(ServerError):
            self._control.post("/destroy_weights_update_group", body, timeout=CLEAN_UP_SECONDS)

    def _joined(self, device: torch.device) -> "_Broadcast":
        if self._group is None:
            self._group = self._join("nccl" if device.type == "cuda" else "gloo")
        return self._group

    def _join(self, backend: str) -> "_Broadcast":
        """A new group of this process and every rank of every server."""
        sizes = [int(server["tp_size"]) for server in self._server_info()]
        ranks = [1 + sum(sizes[:k]) for k in range(len(sizes))]
        world = 1 + sum(sizes)
        name = f"peergrad-{uuid4().hex[:8]}"  # unique: servers keep the groups of dead trainers
        address = local_address(self._control.urls[0])
        store = dist.TCPStore(  # type: ignore[attr-defined]  # public, though not in __all__
            address, 0, world, is_master=True, timeout=self._timeout, wait_for_workers=False
        )
        answers = self._control.start(
            "/init_weights_update_group",
            [init_payload(address, store.port, rank, world, name, backend) for rank in ranks],
        )
        # In a thread: joining waits for the servers, and must not hide that one has refused.
        handle = self._control.run(
            lambda: join_group(store, name, 0, world, backend, self._timeout)
        )
        finish([*answers, cast(Future[Any], handle)])
        return _Broadcast(name, handle.result())

    def _server_info(self) -> list[Json]:
        if self._servers is None:
            self._servers = self._control.get("/server_info")
        return self._servers

    def _new_digests(self) -> Digests | None:
        """None if not even the names of the engine's tensors can be known."""
        servers = self._server_info()
        if self._proof is not ProofMode.auto or any(s["quantization"] for s in servers):
            return None
        known = all(s["device"] == "cpu" and s["tp_size"] == s["pp_size"] == 1 for s in servers)
        dtypes = {s["dtype"] for s in servers}
        return Digests(DTYPES.get(dtypes.pop()) if known and len(dtypes) == 1 else None)

    def _compare(self, digests: Digests | None) -> tuple[int, int]:
        if self._proof is not ProofMode.auto:
            return 0, 0
        answers = self._control.post("/weights_checker", {"action": "checksum"})
        held = {
            url: [rank["checksums"] for rank in answer["ranks"]]
            for url, answer in zip(self._control.urls, answers, strict=True)
        }
        return compare(None if digests is None else digests.result(), held)

    def _score_canary(self, version: int) -> Group | None:
        if self._proof is ProofMode.off:
            return None
        answers = self._control.post("/generate", score_payload(self._canary))
        return canary_group(self._canary, answers, version)


@dataclass(frozen=True)
class _Broadcast:
    name: str
    handle: dist.ProcessGroup


def join_group(
    store: Any, name: str, rank: int, world: int, backend: str, timeout: timedelta
) -> dist.ProcessGroup:
    """Join a group outside the default one, at the place where SGLang's servers look for it.

    The one use of private torch API: ``new_group`` only makes groups of ranks that share a default
    group, and each server has its own.
    """
    from torch.distributed import distributed_c10d

    c10d: Any = distributed_c10d
    group: dist.ProcessGroup
    group, _ = c10d._new_process_group_helper(
        world,
        rank,
        [],
        c10d.Backend(backend),
        c10d.PrefixStore(name, store),
        group_name=name,
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[group] = {member: member for member in range(world)}
    return group


def local_address(url: str) -> str:
    """The address of this machine as the server at ``url`` sees it."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 80
    family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # datagram: chooses a route, sends nothing
        return str(probe.getsockname()[0])


def _observed(named: NamedTensors, digests: Digests | None) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in named:
        if digests is not None:
            digests.add(name, tensor)
        yield name, tensor
