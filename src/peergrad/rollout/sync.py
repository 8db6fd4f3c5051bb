"""Weights from the trainer into the servers, by broadcast.

The only user of torch.distributed in this package, and only rank 0 of the trainer uses it: it shares
with the servers a process group of its own, apart from the trainer's groups.
"""

import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import torch
import torch.distributed as dist

from peergrad.config import Proof as ProofMode
from peergrad.rollout.control import Control, finish
from peergrad.rollout.proof import Digests, Proof, canary_group, canary_tokens, compare
from peergrad.rollout.sglang import Json, ServerError, parse_scores, score_payload

NamedTensors = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Bucket:
    """Tensors laid end to end in one buffer, [bytes] uint8, each aligned to its own element size."""

    flat: torch.Tensor
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]


def buckets(named: NamedTensors, limit: int) -> Iterator[tuple[Bucket, bool]]:
    """Yield (bucket, is it the last?), at most ``limit`` bytes each unless one tensor is larger.

    One buffer serves all buckets: a bucket is void once the next is asked for. A bucket also ends
    early where the next tensor would lie unaligned, which the server refuses.
    """
    flat: torch.Tensor | None = None
    entries: list[tuple[str, torch.dtype, list[int]]] = []
    offset = 0
    for name, tensor in named:
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
        if entries and (offset + len(raw) > limit or offset % tensor.element_size()):
            assert flat is not None
            yield _bucket(flat[:offset], entries), False
            entries, offset = [], 0
        if flat is None or len(raw) > len(flat):
            flat = torch.empty(max(limit, len(raw)), dtype=torch.uint8, device=tensor.device)
        flat[offset : offset + len(raw)] = raw
        offset += len(raw)
        entries.append((name, tensor.dtype, list(tensor.shape)))
    if flat is not None:
        yield _bucket(flat[:offset], entries), True


def _bucket(flat: torch.Tensor, entries: list[tuple[str, torch.dtype, list[int]]]) -> Bucket:
    names, dtypes, shapes = zip(*entries, strict=True)
    return Bucket(flat, [*names], [str(dtype).removeprefix("torch.") for dtype in dtypes], [*shapes])


def update_payload(bucket: Bucket, group_name: str, version: int | None) -> Json:
    """Body of /update_weights_from_distributed; ``version`` goes with the last bucket only."""
    return {
        "names": bucket.names,
        "dtypes": bucket.dtypes,
        "shapes": bucket.shapes,
        "group_name": group_name,
        "load_format": "flattened_bucket",
        "flush_cache": version is not None,
        "weight_version": None if version is None else str(version),
    }


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
        self._group: _Group | None = None
        self._abandoned: list[_Group] = []  # freeing a group waits for its hung broadcast
        self._servers: list[Json] | None = None

    def load(self, named: NamedTensors, version: int) -> Proof:
        """Broadcast ``(HF name, full tensor)`` pairs; returns once every server generates from them.

        Holds one bucket beside what the iterator holds. Raises ServerError if a server fails, and
        RuntimeError if the servers end up with other weights than were sent.
        """
        digests = self._new_digests()
        stream = buckets(_observed(named, digests), self._limit)
        bucket, last = next(stream, (None, True))
        if bucket is None:
            raise ValueError("there are no weights to load")
        group = self._joined(bucket.flat.device)
        self._control.post("/pause_generation", {"mode": "retract"})
        with self._update_window():
            while True:
                self._send(bucket, group, version if last else None)
                if last:
                    break
                bucket, last = next(stream)
        counts = self._compare(digests)
        self._control.post("/continue_generation")
        return Proof(version, *counts, canary=self._score_canary(version))

    def close(self) -> None:
        """Leave the group; the servers may be gone already."""
        if self._group is not None:
            with suppress(ServerError):
                self._control.post("/destroy_weights_update_group", {"group_name": self._group.name})
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
            with suppress(ServerError):
                self._control.post("/end_weight_update")
            raise
        self._control.post("/end_weight_update")

    def _send(self, bucket: Bucket, group: "_Group", version: int | None) -> None:
        body = update_payload(bucket, group.name, version)
        answers = self._control.start(
            "/update_weights_from_distributed", [body] * len(self._control.urls)
        )
        work = dist.broadcast(bucket.flat, src=0, group=group.handle, async_op=True)
        try:
            finish(answers)  # first: a server that refused will never join the broadcast
            work.wait()
        except BaseException:
            group.handle.abort()  # stops NCCL; Gloo ends by its timeout
            self._abandoned.append(group)
            self._group = None
            raise

    def _joined(self, device: torch.device) -> "_Group":
        if self._group is None:
            self._group = self._join("nccl" if device.type == "cuda" else "gloo")
        return self._group

    def _join(self, backend: str) -> "_Group":
        """A new group of this process and every rank of every server."""
        sizes = [int(server["tp_size"]) for server in self._server_info()]
        ranks = [1 + sum(sizes[:k]) for k in range(len(sizes))]
        world = 1 + sum(sizes)
        name = f"peergrad-{uuid4().hex[:8]}"  # unique: servers keep the groups of dead trainers
        address = local_address(self._control.urls[0])
        store = dist.TCPStore(
            address, 0, world, is_master=True, timeout=self._timeout, wait_for_workers=False
        )
        answers = self._control.start(
            "/init_weights_update_group",
            [init_payload(address, store.port, rank, world, name, backend) for rank in ranks],
        )
        # In a thread: joining waits for the servers, and must not hide that one has refused.
        handle = self._control.run(lambda: _rank_zero(store, name, world, backend, self._timeout))
        finish([*answers, handle])
        return _Group(name, handle.result())

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
        return Digests(getattr(torch, *dtypes, None) if known and len(dtypes) == 1 else None)

    def _compare(self, digests: Digests | None) -> tuple[int, int]:
        if self._proof is not ProofMode.auto:
            return 0, 0
        answers = self._control.post("/weights_checker", {"action": "checksum"})
        held = {
            url: [rank["checksums"] for rank in answer["ranks"]]
            for url, answer in zip(self._control.urls, answers, strict=True)
        }
        return compare(None if digests is None else digests.result(), held)

    def _score_canary(self, version: int) -> Any:
        if self._proof is ProofMode.off:
            return None
        answers = self._control.post("/generate", score_payload(self._canary))
        return canary_group(self._canary, answers, version)


@dataclass(frozen=True)
class _Group:
    name: str
    handle: dist.ProcessGroup


def _rank_zero(
    store: dist.TCPStore, name: str, world: int, backend: str, timeout: timedelta
) -> dist.ProcessGroup:
    """Rank 0 of a group outside the default one. The one place that needs private torch API:
    ``new_group`` only makes groups of ranks that share a default group, and servers have their own.
    """
    from torch.distributed import distributed_c10d as c10d

    group, _ = c10d._new_process_group_helper(
        world,
        0,
        [],
        c10d.Backend(backend),
        dist.PrefixStore(name, store),
        group_name=name,
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
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
