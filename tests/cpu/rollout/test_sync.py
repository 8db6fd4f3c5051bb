"""Weight syncs to two stand-ins for servers that take part in real Gloo broadcasts."""

import hashlib
import math
import multiprocessing
import socket
import threading
import time
from datetime import timedelta
from itertools import count
from urllib.parse import urlsplit

import httpx
import pytest
import torch
import torch.distributed as dist
from fake_sglang import FakeServer, Hanging

from peergrad import fp8
from peergrad.config import Fp8Scales, Fp8Serving
from peergrad.config import Proof as ProofMode
from peergrad.rollout import claim
from peergrad.rollout import sync as module
from peergrad.rollout.errors import LoadAgain, ServerError
from peergrad.rollout.proof import CANARY_TOKENS
from peergrad.rollout.sync import WeightSync, join_group, local_address

TIMEOUT = timedelta(minutes=2)


class Receiver:
    """What a server does with an update, in plain form. ``faults``: paths that fail or lie, or
    ``version=X``: it was given the weight version X."""

    def __init__(self):
        self.faults, self.group, self.held, self.version = set(), None, {}, None

    def routes(self):
        update = ("init_weights_update_group", "update_weights_from_distributed")
        others = ("destroy_weights_update_group", "server_info", "weights_checker", "generate")
        mark = ("model_info", "update_weight_version")
        return {path: getattr(self, path) for path in (*update, *others, *mark)}

    def model_info(self, _):
        return 200, {"weight_version": self.version}

    def update_weight_version(self, body):
        self.version = body["new_version"]
        return 200, {"success": True}

    def server_info(self, _):
        sizes = {"tp_size": 1, "pp_size": 1}
        return 200, {**sizes, "device": "cpu", "dtype": "float32", "quantization": None}

    def init_weights_update_group(self, body):
        self.held = {}  # another sync may send other tensors
        world = body["world_size"]
        store = dist.TCPStore(body["master_address"], body["master_port"], world, timeout=TIMEOUT)
        self.group = join_group(
            store, body["group_name"], body["rank_offset"], world, body["backend"], TIMEOUT
        )
        return 200, {"success": True}

    def destroy_weights_update_group(self, _):
        dist.destroy_process_group(self.group)
        self.group = None
        return 200, {"success": True}

    def update_weights_from_distributed(self, body):
        if "update" in self.faults:
            return 400, {"message": "out of memory"}
        dtypes = [getattr(torch, name) for name in body["dtypes"]]
        sizes = [math.prod(s) * d.itemsize for s, d in zip(body["shapes"], dtypes, strict=True)]
        flat = torch.empty(sum(sizes), dtype=torch.uint8)
        dist.broadcast(flat, src=0, group=self.group)
        for name, raw in zip(body["names"], flat.split(sizes), strict=True):
            self.held[name] = hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:16]
        self.version = body["weight_version"] or self.version
        return 200, {"success": True}

    def weights_checker(self, _):
        held = dict.fromkeys(self.held, "0" * 16) if "checksum" in self.faults else self.held
        return 200, {"ranks": [{"checksums": held}]}

    def generate(self, _):
        scores = [[None, 0, None]] + [[-0.5, 0, None]] * (CANARY_TOKENS - 1)
        version = "other:3" if "canary" in self.faults else self.version
        return 200, {"meta_info": {"input_token_logprobs": scores, "weight_version": version}}


def serve(connection):
    """The stand-in's process: told of faults, asked for (requests, version)."""
    receiver = Receiver()
    with FakeServer(lambda _: (200, {"success": True}), **receiver.routes()) as server:
        connection.send(server.url)
        while True:
            receiver.faults = connection.recv()
            for fault in receiver.faults:
                if fault.startswith("version="):
                    receiver.version = fault.removeprefix("version=")
            connection.send((list(server.requests), receiver.version))
            server.requests.clear()


class Servers:
    def __init__(self, count):
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for _ in range(count):
            ours, theirs = context.Pipe()
            self._processes.append(context.Process(target=serve, args=(theirs,), daemon=True))
            self._processes[-1].start()
            self._pipes.append(ours)
        self.urls = [pipe.recv() for pipe in self._pipes]

    def ask(self, *faults):
        """Set each server's faults; return each one's (requests since, version)."""
        for pipe, fault in zip(self._pipes, faults or [set()] * len(self.urls), strict=True):
            pipe.send(fault)
        return [pipe.recv() for pipe in self._pipes]

    def stop(self):
        for process in self._processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def servers():
    started = Servers(2)
    yield started
    started.stop()


@pytest.fixture
def sync(servers):
    built = WeightSync(servers.urls, vocab_size=50, bucket_mb=1, timeout=TIMEOUT.seconds)
    yield built
    built.close()
    servers.ask()


MINE = "runs/a-1f3a"


@pytest.fixture
def owned(servers, monkeypatch):
    """Builds syncs of a run of its own, on servers that nobody has."""
    monkeypatch.setattr(claim, "CLAIM_SECONDS", 0.05)
    servers.ask({"version=default"}, {"version=default"})
    made = []

    def build(identity=MINE, **options):
        options = {"vocab_size": 50, "bucket_mb": 1, "timeout": TIMEOUT.seconds, **options}
        made.append(WeightSync(servers.urls, identity=identity, **options))
        return made[-1]

    yield build
    for sync in made:
        sync.close()
    servers.ask()


def weights(count=5):
    """0.4 MB each: two fit into a bucket."""
    torch.manual_seed(0)
    return [(f"model.w{i}.weight", torch.randn(100_000)) for i in range(count)]


def paths(requests):
    return [path[1:] for path, _ in requests]


def test_all_servers_get_all_buckets_in_the_one_safe_order(servers, sync):
    proof = sync.load(weights(), 7)
    assert (proof.version, proof.verified, proof.unverified) == (7, 5, 0)
    assert [r.versions for r in proof.canary.rollouts] == [((7, 0, CANARY_TOKENS - 1),)] * 2
    for rank, (requests, version) in enumerate(servers.ask(), start=1):
        assert paths(requests) == [
            "server_info",
            "init_weights_update_group",
            "pause_generation",
            "begin_weight_update",
            *["update_weights_from_distributed"] * 3,
            "end_weight_update",
            "weights_checker",
            "continue_generation",
            "generate",
        ]
        assert requests[1][1]["rank_offset"] == rank
        assert requests[1][1]["world_size"] == 3
        updates = [body for path, body in requests if path.startswith("/update")]
        assert [len(body["names"]) for body in updates] == [2, 2, 1]
        assert [body["flush_cache"] for body in updates] == [False, False, True]
        assert [body["weight_version"] for body in updates] == [None, None, "7"]
        assert version == "7"
    sync.load(weights(), 8)  # the group is there, and so is what the servers are
    assert paths(servers.ask()[0][0])[0] == "pause_generation"


def test_servers_of_fp8_blocks_get_codes_and_scales(servers):
    """Also where those before leave a bucket at an odd place, and of more than a bucket holds."""
    torch.manual_seed(0)
    name = "model.layers.0.mlp.{}_proj.weight"
    named = [("model.norm.weight", torch.randn(3).bfloat16())]
    named += [(name.format(part), torch.randn(300, 1001).bfloat16()) for part in ("up", "down")]
    named += [(name.format("gate"), torch.randn(1500, 1000).bfloat16())]
    sync = WeightSync(
        *(servers.urls,),
        **{"vocab_size": 50, "bucket_mb": 1, "proof": ProofMode.canary},
        **{"timeout": TIMEOUT.seconds, "serving": Fp8Serving.block},
    )
    proof = sync.load(named, 7)
    assert (proof.verified, proof.unverified) == (0, 0) and proof.seconds["quantise"] > 0
    sent = [named[0]]
    for what, weight in named[1:]:
        codes, scales = fp8.quantise(weight, Fp8Scales.power_of_two)
        sent += [(what, codes), (f"{what}_scale_inv", scales)]
    for url in servers.urls:
        answer = httpx.post(f"{url}/weights_checker", json={}).json()
        held = answer["ranks"][0]["checksums"]
        for what, tensor in sent:
            raw = tensor.view(torch.uint8).numpy().tobytes()
            assert held[what] == hashlib.sha256(raw).hexdigest()[:16], what
    requests, _ = servers.ask()[0]
    updates = [body for path, body in requests if path.startswith("/update_weights")]
    assert [n for body in updates for n in body["names"]] == [n for n, _ in sent]
    dtypes = [dtype for body in updates for dtype in body["dtypes"]]
    assert dtypes == ["bfloat16", *["float8_e4m3fn", "float32"] * 3]
    named[2][1][7, 7] = math.nan
    with pytest.raises(ValueError, match=rf"^{named[2][0]}: has values that are not finite"):
        sync.load(named, 8)
    assert paths(servers.ask()[0][0])[-1] == "end_weight_update"
    sync.close()
    servers.ask()


def test_a_server_that_refuses_does_not_leave_the_broadcast_hanging(servers, sync):
    servers.ask(set(), {"update"})
    began = time.monotonic()
    with pytest.raises(ServerError, match=rf"{servers.urls[1]}: /update\S+ answered 400: out of"):
        sync.load(weights(), 9)
    group = sync._abandoned[0].handle
    dist.destroy_process_group(group)
    del group, sync._abandoned[:]  # would wait for a broadcast that still hangs
    assert time.monotonic() - began < TIMEOUT.seconds / 2
    for requests, _ in servers.ask():
        assert "end_weight_update" in paths(requests)
        assert "continue_generation" not in paths(requests)
    assert sync.load(weights(), 10).verified == 5
    requests, version = servers.ask()[1]
    assert "init_weights_update_group" in paths(requests)  # the broken group is not used again
    assert version == "10"


class Lazy(dist.ProcessGroup):
    """As NCCL's groups are: who first sends or gives up waits until all have come."""

    def __init__(self, rank, world, all_came):
        super().__init__(rank, world)
        self.all_came, self.waiting = all_came, threading.Event()

    def broadcast(self, *_):
        self.waiting.set()
        self.abort()

    def abort(self):
        assert self.all_came.wait(60), "the first broadcast hangs"


def test_a_refusal_is_heard_while_the_communicator_waits_for_that_server(monkeypatch):
    all_came = threading.Event()
    made = []

    def lazily(store, name, rank, world, backend, timeout):
        made.append(Lazy(rank, world, all_came))
        dist.distributed_c10d._world.pg_group_ranks[made[-1]] = {i: i for i in range(world)}
        return made[-1]

    def refuse(_):
        made[-1].waiting.wait()
        return 400, {"message": "out of memory"}

    monkeypatch.setattr(module, "join_group", lazily)
    monkeypatch.setattr(module, "CLEAN_UP_SECONDS", 0.2)
    info = {"server_info": Receiver().server_info, "update_weights_from_distributed": refuse}
    try:
        with FakeServer(lambda _: (200, {"success": True}), **info) as server:
            sync = WeightSync([server.url], vocab_size=50, timeout=TIMEOUT.seconds)
            with pytest.raises(
                ServerError, match=rf"^{server.url}: /update\S+ answered 400: out of"
            ):
                sync.load(weights(), 9)
            assert paths(server.requests)[-2:] == [
                "destroy_weights_update_group",
                "end_weight_update",
            ]
    finally:
        all_came.set()
        dist.distributed_c10d._world.pg_group_ranks.pop(made[-1])


def test_one_server_with_other_weights_stops_generation(servers, sync):
    servers.ask(set(), {"checksum"})
    with pytest.raises(RuntimeError) as error:
        sync.load(weights(), 11)
    assert f"{servers.urls[1]} holds other values than {servers.urls[0]} of" in str(error.value)
    assert f"{servers.urls[1]} holds other values than were sent of" in str(error.value)
    assert "continue_generation" not in paths(servers.ask()[0][0])


def test_a_failing_iterator_closes_the_window_and_shows_its_own_error(servers, sync):
    def broken():
        yield from weights(4)
        raise FloatingPointError("cannot gather")

    with pytest.raises(FloatingPointError, match="cannot gather"):
        sync.load(broken(), 12)
    assert paths(servers.ask()[0][0])[-1] == "end_weight_update"


def test_the_trainers_own_groups_are_left_alone(servers):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sync = WeightSync(servers.urls, vocab_size=50, timeout=TIMEOUT.seconds)
        assert sync.load(weights(), 13).verified == 5
        sync.close()
        ones = torch.ones(2)
        dist.all_reduce(ones)
        assert ones.tolist() == [1, 1]
    finally:
        dist.destroy_process_group()
        servers.ask()


def test_no_proof_asks_for_none(servers):
    sync = WeightSync(servers.urls, vocab_size=50, proof=ProofMode.off, timeout=TIMEOUT.seconds)
    proof = sync.load(weights(), 13)
    sync.close()
    assert (proof.verified, proof.unverified, proof.canary) == (0, 0, None)
    assert not {"weights_checker", "generate"} & set(paths(servers.ask()[0][0]))


def test_a_dead_server_is_named():
    with FakeServer() as server:
        url = server.url
    with pytest.raises(ServerError) as error:
        WeightSync([url], vocab_size=50).load(weights(), 1)
    assert str(error.value) == (
        f"{url}: no answer to GET /server_info (connection refused); see whether that server still "
        "runs, and its log"
    )


def test_this_machine_as_a_server_sees_it():
    assert local_address("http://127.0.0.1:30000") == "127.0.0.1"


def test_servers_are_taken_first_and_carry_the_run_with_the_version(servers, owned):
    sync = owned()
    proof = sync.load(weights(), 7)
    assert (proof.version, proof.verified) == (7, 5)
    assert proof.canary.rollouts[0].versions == ((7, 0, CANARY_TOKENS - 1),)
    for requests, version in servers.ask():
        assert version == f"{MINE}:7"
        assert paths(requests) == [
            "model_info",
            "update_weight_version",
            "model_info",
            "server_info",
            "init_weights_update_group",
            "pause_generation",
            "begin_weight_update",
            *["update_weights_from_distributed"] * 3,
            "end_weight_update",
            "model_info",
            "weights_checker",
            "continue_generation",
            "generate",
        ]
    sync.load(weights(), 8)
    assert paths(servers.ask()[0][0])[:2] == ["model_info", "pause_generation"]
    sync.close()
    assert [version for _, version in servers.ask()] == ["0", "0"]


def test_a_server_that_another_run_took_stops_the_push_before_it_changes_anything(servers, owned):
    sync = owned()
    sync.load(weights(), 7)
    servers.ask(set(), {"version=other:3"})
    with pytest.raises(ServerError) as error:
        sync.load(weights(), 8)
    assert str(error.value).startswith(
        f"{servers.urls[1]}: holds weights of run 'other' (version 3) while this run is at version "
        "7: a server belongs to one run at a time"
    )
    for requests, _ in servers.ask():
        assert set(paths(requests)) == {"model_info"}
    sync.close()
    assert [version for _, version in servers.ask()] == ["0", "other:3"]


def test_a_push_that_another_run_disturbs_is_explained_by_it(servers, owned):
    sync = owned()
    sync.load(weights(), 7)

    def stolen():
        yield from weights(4)
        servers.ask(set(), {"version=other:3", "update"})
        yield from weights()[4:]

    with pytest.raises(ServerError, match="holds weights of run 'other'") as error:
        sync.load(stolen(), 8)
    assert "answered 400" in str(error.value.__cause__)
    group = sync._abandoned[0].handle
    dist.destroy_process_group(group)
    del group, sync._abandoned[:]


def test_a_canary_scored_with_another_runs_weights_is_an_error(servers, owned):
    servers.ask(set(), {"canary"})
    with pytest.raises(ServerError, match=rf"{servers.urls[1]}: answered with .* run 'other'"):
        owned().load(weights(), 7)


def test_a_dead_managed_server_explains_what_failed():
    with FakeServer() as server:
        url = server.url
    words = {url: "server 0 ended with exit code 3"}
    sync = WeightSync([url], vocab_size=50, ended=lambda wait: words)
    with pytest.raises(ServerError, match=r"^server 0 ended with exit code 3$") as error:
        sync.load(weights(), 1)
    assert "connection refused" in str(error.value.__cause__)


def unreached(**options):
    """A sync that has been used, and whose server is not there any more."""
    with FakeServer() as server:
        url = server.url
    sync = WeightSync([url], vocab_size=50, **options)
    sync._loaded = True
    return url, sync


def test_a_server_that_takes_its_time_to_end_is_waited_for_no_longer_than_that(monkeypatch):
    monkeypatch.setattr("peergrad.rollout.sync.POLL_SECONDS", 0.01)
    told = [{}] * 4
    url, sync = unreached(ended=lambda wait: told.pop() if told else {url: "server 0 ended"})
    with pytest.raises(ServerError, match=r"^server 0 ended$"):
        sync.load(weights(), 1)


def test_a_server_is_given_time_to_come_back(monkeypatch):
    monkeypatch.setattr("peergrad.rollout.sync.POLL_SECONDS", 0.05)
    looks = count(1)
    with socket.socket() as back:

        def ended(_):
            if next(looks) == 3:
                back.bind(("127.0.0.1", urlsplit(url).port))
                back.listen()
            return {}

        url, sync = unreached(lost_after=600.0, ended=ended)
        with pytest.raises(LoadAgain, match="connection refused"):
            sync.load(weights(), 1)
    assert sync.urls == [url] and next(looks) == 4
    url, sync = unreached(lost_after=0.2)
    with pytest.raises(ServerError, match=rf"^{url}: cannot be reached for \d+ s; see "):
        sync.load(weights(), 1)


def test_servers_that_do_not_reach_the_trainer_are_told_the_address():
    info = {"tp_size": 1, "pp_size": 1, "device": "cpu", "dtype": "float32", "quantization": None}
    with FakeServer(lambda _: (200, info)) as server:  # says yes, and never joins
        sync = WeightSync([server.url], vocab_size=50)
        sync._timeout = timedelta(seconds=3)  # for joining; a request has more
        with pytest.raises(
            ServerError,
            match=r"^rollout\.servers\.urls = .*join this trainer at 127\.0\.0\.1:\d+ .*in 3 s.*"
            "every server must be able to open connections to that address",
        ) as error:
            sync.load(weights(), 1)
    assert "\n" not in str(error.value)


def test_a_host_that_does_not_exist_has_no_address():
    with pytest.raises(ServerError, match=r"^http://no\.such\.invalid:1: .*rollout\.servers\.urls"):
        local_address("http://no.such.invalid:1")


def test_a_server_that_tells_too_little_is_named():
    with (
        FakeServer(lambda _: (200, {"tp_size": 1})) as server,
        pytest.raises(ServerError, match=rf"^{server.url}: /server_info tells no pp_size; use SGL"),
    ):
        WeightSync([server.url], vocab_size=50).load(weights(), 1)


def test_a_server_whose_ranks_would_be_miscounted_is_refused_before_anything_is_sent():
    info = Receiver().server_info(None)[1] | {"pp_size": 2}
    with FakeServer(lambda _: (200, info)) as server:
        with pytest.raises(ServerError, match=rf"^{server.url}: has pp_size = 2, whose stages .*"):
            WeightSync([server.url], vocab_size=50).load(weights(), 1)
        assert paths(server.requests) == ["server_info"]


def test_a_server_that_hangs_is_named_with_the_time_it_was_given():
    with (
        Hanging() as server,
        pytest.raises(ServerError, match=rf"^{server.url}: no answer to GET /server_info \(none "),
    ):
        WeightSync([server.url], vocab_size=50, timeout=0.3).load(weights(), 1)


def test_a_server_that_dies_is_given_time_to_be_out_of_reach(monkeypatch):
    """Its connections break first, and until the last is closed others can be opened."""
    urls = ["http://127.0.0.1:1", "http://127.0.0.1:2"]
    found = WeightSync(urls, vocab_size=9, lost_after=0.0)
    found._loaded = True
    away = iter([[], urls[1:], [], [], []])

    async def absent(asked):
        return next(away)

    monkeypatch.setattr(module, "absent", absent)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.0)
    error = RuntimeError("the connection broke before the answer")
    try:
        was_away, gone = found._missing(error)
        assert was_away and list(gone) == urls[1:]
        monkeypatch.setattr(module, "DEATH_SECONDS", 0.0)
        assert found._missing(error) == (False, {})  # it was there all the time
    finally:
        found.close()
