"""A server belongs to one run at a time: taking, keeping, losing and leaving stand-ins."""

import re
import threading
import time
from itertools import count
from types import SimpleNamespace

import pytest
from fake_sglang import FakeServer, Mark

from peergrad.rollout import claim as module
from peergrad.rollout.claim import Claim
from peergrad.rollout.control import Control
from peergrad.rollout.errors import ServerError
from peergrad.rollout.versions import owner, spell

OURS, OTHER = "runs/a-1f3a", "runs/b:2-9c0d"  # a colon in the name is part of the name


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "CLAIM_SECONDS", 0.05)


@pytest.fixture
def server():
    mark = Mark()
    with FakeServer(**mark.routes()) as fake:
        fake.mark = mark
        yield fake


@pytest.fixture
def claim(server):
    """Builds claims of the one server."""
    controls = []

    def build(identity=OURS, **options):
        controls.append(Control([server.url], timeout=120.0))
        return Claim(controls[-1], identity, **options)

    yield build
    for control in controls:
        control.close()


def push(claim, mark, version):
    """What a weight sync does to the mark."""
    claim.check(version)
    mark.version = spell(claim._identity, version)
    claim.confirm(version)


def test_a_version_is_read_as_it_was_spelt():
    assert spell(None, 3) == "3" and owner("3") is None
    assert owner(spell(OTHER, 12)) == (OTHER, 12)
    assert owner(spell(OURS, -1)) == (OURS, -1)
    for free in ("default", "0", "", ":3", "v1.2", "step:one", "a:", "a:1_0", "a:\u0663"):
        assert owner(free) is None
    with pytest.raises(ValueError, match="identity"):
        spell("two\nlines", 1)


@pytest.mark.parametrize("free", ["default", "0", "v2"])
def test_a_free_server_is_taken_before_anything_is_pushed(server, claim, free):
    server.mark.version = free
    held = claim()
    held.check(4)
    assert server.mark.version == f"{OURS}:-1"
    push(held, server.mark, 4)
    push(held, server.mark, 5)
    held.release()
    assert owner(server.mark.version) is None
    push(claim(OTHER), server.mark, 0)


def test_another_runs_server_is_refused_until_it_is_left(server, claim):
    server.mark.version = f"{OTHER}:12"
    with pytest.raises(ValueError) as error:
        claim().check(0)
    assert str(error.value) == (
        f"rollout.servers.urls = {server.url!r}: belongs to run {OTHER!r} (weight version 12), and "
        "a server belongs to one run at a time; end that run, or give this one another server; "
        "if that run is dead, restart the server or set rollout.servers.takeover=true"
    )
    assert server.mark.version == f"{OTHER}:12"
    assert {path for path, _ in server.requests} == {"/model_info"}


def test_a_run_that_has_just_come_is_refused_as_well(server, claim):
    server.mark.version = f"{OTHER}:-1"
    with pytest.raises(ValueError, match=r"belongs to run 'runs/b:2-9c0d' \(nothing pushed yet\)"):
        claim().check(0)


def test_a_run_refused_does_not_release_what_it_never_held(server, claim):
    server.mark.version = f"{OTHER}:12"
    refused = claim()
    with pytest.raises(ValueError):
        refused.check(0)
    refused.release()
    assert server.mark.version == f"{OTHER}:12"


def test_the_same_run_goes_on_after_it_was_killed(server, claim, monkeypatch):
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=time.monotonic))  # no sleep
    server.mark.version = f"{OURS}:12"
    held = claim()
    held.check(8)
    assert server.mark.version == f"{OURS}:-1"
    push(held, server.mark, 8)


def test_takeover_takes_a_dead_runs_server_and_says_so(server, claim, caplog):
    server.mark.version = f"{OTHER}:12"
    push(claim(takeover=True), server.mark, 0)
    assert f"taken over from run {OTHER!r} (weight version 12)" in caplog.text


def test_a_push_by_another_run_ends_this_one_at_its_next(server, claim):
    held = claim()
    push(held, server.mark, 4)
    assert held.theft() is None
    push(claim(OTHER, takeover=True), server.mark, 12)
    with pytest.raises(ServerError) as error:
        held.check(5)
    assert str(error.value) == (
        f"{server.url}: holds weights of run {OTHER!r} (version 12) while this run is at version 4"
        ": a server belongs to one run at a time; give each run servers of its own"
    )
    assert str(held.theft()) == str(error.value)
    held.release()
    assert server.mark.version == f"{OTHER}:12"


def test_a_push_by_another_run_during_ours_is_found(server, claim):
    held = claim()
    held.check(0)
    server.mark.version = f"{OTHER}:0"
    with pytest.raises(ServerError, match="holds weights of run 'runs/b:2-9c0d'"):
        held.confirm(0)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ("default", "weights 'default' that no run has pushed.* restarted or released by hand"),
        (f"{OURS}:6", "version 6 of this run's weights.* another process of the same run is alive"),
    ],
)
def test_other_surprises_are_named_for_what_they_are(server, claim, found, words):
    held = claim()
    push(held, server.mark, 4)
    server.mark.version = found
    with pytest.raises(ServerError, match=words):
        held.check(5)


def test_a_push_that_failed_may_be_repeated(server, claim):
    held = claim()
    push(held, server.mark, 4)
    held.check(5)  # and the server still has version 4
    held.check(6)
    server.mark.version = f"{OURS}:6"
    held.confirm(6)


def test_of_two_runs_at_the_same_moment_at_most_one_holds_the_server(server, monkeypatch):
    """Both have read that it is free before either writes; the second writes as late as it may,
    while the first waits for that."""
    both, waiting, written = threading.Barrier(2), threading.Event(), threading.Event()
    reads, writes = count(1), count(1)
    read, write = server.mark.model_info, server.mark.update

    def model_info(body):
        answer = read(body)
        if next(reads) <= 2:
            both.wait(60)
        return answer

    def update(body):
        if next(writes) == 1:
            return write(body)
        waiting.wait(30)
        answer = write(body)
        written.set()
        return answer

    def sleep(seconds):
        assert seconds >= module.CLAIM_SECONDS
        waiting.set()
        assert written.wait(60)

    errors = []

    def take(held):
        try:
            held.check(0)
        except ServerError as error:
            errors.append(str(error))

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
    monkeypatch.setattr(module, "time", clock)
    server.mark.model_info, server.mark.update = model_info, update
    with FakeServer(**server.mark.routes()) as slow:
        runs = [Claim(Control([slow.url], timeout=120.0), name) for name in (OURS, OTHER)]
        threads = [threading.Thread(target=take, args=(run,)) for run in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    (error,) = errors
    assert re.fullmatch(
        rf"{slow.url}: was taken by run '\S+' while this run has pushed none: a server belongs to "
        "one run at a time; give each run servers of its own",
        error,
    )


def test_without_identity_nothing_is_asked_or_marked(server, claim):
    nobody = claim(None)
    nobody.check(0)
    nobody.confirm(0)
    nobody.release()
    assert nobody.theft() is None and not server.requests


def test_release_never_fails(server, claim):
    held = claim()
    push(held, server.mark, 1)
    server.mark.update = None
    server.__exit__()
    held.release()
