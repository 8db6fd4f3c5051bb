"""Weights from the trainer into the servers, by broadcast.

The only user of torch.distributed in this package, and only on rank 0 of the trainer: it shares
with the servers a process group of its own, apart from the trainer's groups.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from itertools import chain
from typing import Any, cast
from uuid import uuid4

import torch
import torch.distributed as dist

from peergrad import fp8
from peergrad.config import Fp8Scales, Fp8Serving
from peergrad.config import Proof as ProofMode
from peergrad.config.rollout import host_and_port
from peergrad.data import Group
from peergrad.observing.parts import Parts
from peergrad.rollout.answers import Asked, parse_routes, parse_scores
from peergrad.rollout.buckets import Bucket, NamedTensors, buckets, update_payload
from peergrad.rollout.claim import Claim
from peergrad.rollout.control import Control
from peergrad.rollout.engine import Routes
from peergrad.rollout.errors import (
    DEATH_SECONDS,
    Ended,
    LoadAgain,
    ServerError,
    ServerGone,
    cannot_connect,
    none_ended,
    out_of_reach,
    reason,
)
from peergrad.rollout.held import checksums, new_digests, server_infos
from peergrad.rollout.presence import absent
from peergrad.rollout.proof import Digests, Proof, canary_group, canary_tokens, compare
from peergrad.rollout.requests import Json, score_payload
from peergrad.rollout.versions import spell

log = logging.getLogger(__name__)

CLEAN_UP_SECONDS = 10.0
POLL_SECONDS = 1.0


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

    Servers that are gone once the run has begun are left out, if others are there: ``urls`` are
    those that are left.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        vocab_size: int,
        bucket_mb: int = 512,
        proof: ProofMode = ProofMode.auto,
        timeout: float = 300.0,
        identity: str | None = None,
        takeover: bool = False,
        lost_after: float = 60.0,
        ended: Ended = none_ended,
        routes: Routes | None = None,
        serving: Fp8Serving = Fp8Serving.off,
        scales: Fp8Scales = Fp8Scales.power_of_two,
    ) -> None:
        """``timeout``: seconds that one bucket, and one control request, may take. ``routes``: of a
        mixture of experts, to be asked for with the canary. ``serving``: what the servers hold
        matrices in; ``scales``: of their FP8 blocks, if these are it.

        ``identity``: the run that the servers must belong to (``claim``); None: to nobody.
        ``takeover``: take them from another run. ``lost_after``: seconds for which a server that
        cannot be reached may yet come back. ``ended``: what is known of servers that have ended, as
        ``ManagedServers.ended`` tells it; it explains a request that fails.
        """
        self._control = Control(urls, timeout=timeout, lost_after=lost_after)
        self._limit = bucket_mb << 20
        self._proof = proof
        self._timeout = timedelta(seconds=timeout)
        self._canary, self._routes = canary_tokens(vocab_size), routes
        self._identity = identity
        self._claim = Claim(self._control, identity, takeover=takeover)
        self._serving, self._scales = serving, scales
        self._ended, self._lost_after = ended, lost_after
        self._loaded = False
        self._group: _Broadcast | None = None
        self._abandoned: list[_Broadcast] = []  # to free one would wait for its broadcast
        self._servers: list[Json] | None = None
        self._parts = Parts()  # of the present load

    def load(self, named: NamedTensors, version: int) -> Proof:
        """Broadcast pairs of HF name and full tensor; returns when all servers generate from them.

        Holds one bucket beside what the iterator holds. Raises LoadAgain if a server was not there
        but now all of ``urls`` are, ServerError if one fails or was taken by another run,
        RuntimeError if the servers end up with other weights than were sent, and ValueError if
        another run has them at the first call.
        """
        self._parts = Parts()
        try:
            with self._parts.time("claim"):
                self._claim.check(version)
            proof = self._load(named, version)
        except RuntimeError as error:
            was_away, gone = self._missing(error)
            if self._loaded and was_away and len(gone) < len(self.urls):
                self._leave_behind(gone)
                raise LoadAgain(f"servers were not there: {error}") from error
            if gone:
                raise ServerError(next(iter(gone.values()))) from error
            if (theft := self._claim.theft()) is not None:
                raise theft from error
            raise
        self._loaded = True
        return proof

    @property
    def urls(self) -> list[str]:
        """Of the servers that weights are loaded into."""
        return self._control.urls

    def _missing(self, error: RuntimeError) -> tuple[bool, dict[str, str]]:
        """Whether a server was not there, which may be why ``error`` came about, and those that
        will not come back, each with a word on why: it has ended, or was given time for that."""
        began, wait, was_away = time.monotonic(), DEATH_SECONDS, False
        while True:
            gone = {url: why for url, why in self._ended(wait).items() if url in self.urls}
            if isinstance(error, ServerGone):
                gone.setdefault(str(error.url), str(error))
            away = [] if gone else asyncio.run(absent(self.urls))
            was_away = was_away or bool(gone or away)
            seconds, wait = time.monotonic() - began, POLL_SECONDS
            # One that dies breaks off what was said before it is out of reach.
            there = not away and (was_away or seconds >= DEATH_SECONDS)
            if gone or there or not self._loaded:
                return was_away, gone
            if away and seconds >= self._lost_after:
                return True, {url: out_of_reach(url, seconds) for url in away}
            time.sleep(POLL_SECONDS)

    def _leave_behind(self, gone: Mapping[str, str]) -> None:
        """Go on without the servers that are ``gone``."""
        left = [url for url in self.urls if url not in gone]
        for why in gone.values():
            log.warning("%s; the run goes on with the other servers, now %d", why, len(left))
        self._control.urls, self._servers = left, None
        if self._group is not None:
            self._abandon(self._group)

    def _load(self, named: NamedTensors, version: int) -> Proof:
        began, sent, count = time.monotonic(), 0, 0
        digests = self._new_digests()
        served = self._served(self._parts.each("export", named))
        stream = buckets(_observed(served, digests, self._parts), self._limit)
        first = next(stream, None)
        if first is None:
            raise ValueError("there are no weights to load")
        group = self._joined(first[0].flat.device)
        with self._parts.time("pause"):
            self._control.post("/pause_generation", {"mode": "retract"})
        with self._update_window():
            for bucket, last in chain([first], stream):
                with self._parts.time("send"):
                    self._send(bucket, group, spell(self._identity, version) if last else None)
                sent, count = sent + len(bucket.flat), count + 1
        with self._parts.time("claim"):
            self._claim.confirm(version)
        with self._parts.time("verify"):
            counts = self._compare(digests)
        with self._parts.time("pause"):
            self._control.post("/continue_generation")
        with self._parts.time("engine_canary"):
            canary = self._score_canary(version)
        seconds = time.monotonic() - began
        log.info(
            "sync of version %d took %.2f s (%d bytes in %d buckets, %d servers)",
            *(version, seconds, sent, count, len(self._control.urls)),
        )
        return Proof(
            version,
            *counts,
            canary=canary,
            servers=len(self.urls),
            seconds=self._parts.seconds,
        )

    def close(self) -> None:
        """Leave the group, and the servers to other runs; they may be gone already."""
        if self._group is not None:
            self._destroy(self._group)
            dist.destroy_process_group(self._group.handle)
            self._group = None
        self._claim.release()
        self._control.close()

    @contextmanager
    def _update_window(self) -> Iterator[None]:
        """Between begin and end; the end comes on failure, too, or no update could follow."""
        try:
            with self._parts.time("pause"):
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
        with self._parts.time("pause"):
            self._control.post("/end_weight_update")

    def _send(self, bucket: Bucket, group: "_Broadcast", version: str | None) -> None:
        body = update_payload(bucket, group.name, version)
        answers = self._control.start(
            "/update_weights_from_distributed", [body] * len(self._control.urls)
        )
        # In a thread: NCCL makes its communicator in the first broadcast, and waits there until all
        # have come. A server that refused will not, and is heard meanwhile.
        sent = self._control.run(broadcaster(bucket.flat, group.handle))
        try:
            self._control.finish([*answers, cast(Future[Any], sent)])
            sent.result().wait()
        except BaseException as error:
            self._abandon(group)
            if isinstance(error, ServerError) or not isinstance(error, RuntimeError):
                raise
            raise ServerError(
                f"{', '.join(self._control.urls)}: a broadcast of weights broke off "
                f"({reason(error)}); see whether these servers still run, and their logs"
            ) from error

    def _abandon(self, group: "_Broadcast") -> None:
        """Give up a group in which a broadcast may hang; the next ``load`` makes a new one."""
        self._group = None
        self._abandoned.append(group)
        # Ends NCCL's broadcast, or waits for a communicator that is still being made; Gloo's ends
        # when a server closes its side.
        wait([self._control.run(group.handle.abort)], CLEAN_UP_SECONDS)
        self._destroy(group)

    def _destroy(self, group: "_Broadcast") -> None:
        """Have the servers leave ``group``, those that still answer."""
        body = {"group_name": group.name}
        with suppress(ServerError):
            self._control.post("/destroy_weights_update_group", body, timeout=CLEAN_UP_SECONDS)

    def _served(self, named: NamedTensors) -> NamedTensors:
        """In the form that the servers hold."""
        if self._serving is not Fp8Serving.block:
            yield from named
            return
        for name, tensor in named:
            with self._parts.time("quantise"):
                pairs = fp8.served(name, tensor, self._scales)
            yield from pairs

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
        addresses = [local_address(url) for url in self._control.urls]
        # A server on this machine reaches any of its addresses; one elsewhere not the loopback's.
        address = next((a for a in addresses if not ip_address(a).is_loopback), addresses[0])
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
        try:
            self._control.finish([*answers, cast(Future[Any], handle)])
        except RuntimeError as error:  # torch's own errors are of this kind, too
            raise self._not_joined(error, f"{address}:{store.port}") from error
        return _Broadcast(name, handle.result())

    def _not_joined(self, error: RuntimeError, address: str) -> ServerError:
        if isinstance(error, ServerError) and cannot_connect(error.__cause__):
            return error
        said = str(error) if isinstance(error, ServerError) else reason(error)
        urls = self._control.urls
        return ServerError(
            f"rollout.servers.urls = {urls}: not all of them could join this trainer at {address} "
            f"for weight syncs in {self._timeout.total_seconds():g} s ({said}); every server "
            "must be able to open connections to that address: see routes and firewall, or name "
            "the servers by addresses of a network that they share with the trainer"
        )

    def _server_info(self) -> list[Json]:
        if self._servers is None:
            self._servers = server_infos(self._control)
        return self._servers

    def _new_digests(self) -> Digests | None:
        """None if not even the names of the engine's tensors can be known."""
        known = self._proof is ProofMode.auto
        return new_digests(self._server_info(), self._serving) if known else None

    def _compare(self, digests: Digests | None) -> tuple[int, int]:
        if self._proof is not ProofMode.auto:
            return 0, 0
        return compare(None if digests is None else digests.result(), checksums(self._control))

    def _score_canary(self, version: int) -> Group | None:
        if self._proof is ProofMode.off:
            return None
        payload = score_payload(self._canary, routes=self._routes)
        answers, size = self._control.post("/generate", payload), len(self._canary)
        asked = Asked(
            identity=self._identity,
            oldest=version,
            newest=version,
            prompt_tokens=size,
            routes=self._routes,
        )
        by_url = list(zip(self._control.urls, answers, strict=True))
        scores = [parse_scores(answer, size, url=url, asked=asked) for url, answer in by_url]
        experts = [parse_routes(answer, url=url, asked=asked) for url, answer in by_url]
        return canary_group(self._canary, scores, version, experts)


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


def broadcaster(flat: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], dist.Work]:
    """What begins to send ``flat`` from rank 0, for another thread to do: device and stream are a
    thread's own, and there are this one's."""
    stream = torch.cuda.current_stream(flat.device) if flat.is_cuda else None

    def begin() -> dist.Work:
        if stream is not None:
            torch.cuda.set_device(flat.device)
            torch.cuda.set_stream(stream)
        work: dist.Work = dist.broadcast(flat, src=0, group=group, async_op=True)
        return work

    return begin


def local_address(url: str) -> str:
    """The address of this machine as the server at ``url`` sees it."""
    host, port = host_and_port(url)
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # datagram: chooses a route, sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ServerError(
            f"{url}: there is no way there from this machine ({reason(error)}); correct the host "
            "in rollout.servers.urls",
            url=url,
        ) from error


def _observed(
    named: NamedTensors, digests: Digests | None, parts: Parts
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in named:
        if digests is not None:
            with parts.time("digest"):
                digests.add(name, tensor)
        yield name, tensor
