"""The real server belongs to one run at a time, and says what it is before anything is loaded."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from peergrad.config import Config, Dtype, ServerMode
from peergrad.rollout import probe as probe_module
from peergrad.rollout.engine import Sampling
from peergrad.rollout.errors import ServerError
from peergrad.rollout.probe import probe
from peergrad.rollout.sglang import SGLangEngine
from peergrad.rollout.sync import WeightSync
from peergrad.rollout.versions import owner

pytestmark = pytest.mark.engine

A, B = "runs/a-1f3a", "runs/b:2-9c0d"
VOCAB = 100


@pytest.fixture
def url(server):
    return server.url


@pytest.fixture
def new_sync(url):
    """Builds the syncs of runs, each with a server that nobody has to begin with."""
    post(url, "update_weight_version", new_version="default", abort_all_requests=False)
    made = []

    def build(identity, **options) -> WeightSync:
        options = {"vocab_size": VOCAB, "bucket_mb": 1, "timeout": 60.0, **options}
        made.append(WeightSync([url], identity=identity, **options))
        return made[-1]

    yield build
    for sync in made:
        sync.close()


def post(url, path, **body):
    httpx.post(f"{url}/{path}", json=body, timeout=60.0).raise_for_status()


def carried(url):
    return httpx.get(f"{url}/model_info", timeout=60.0).json()["weight_version"]


def push(sync, models, name, version):
    return sync.load(models[name].state_dict().items(), version)


def generate(url, identity, newest, during=None):
    """An answer. With ``during`` many long ones, so that it runs while they are drawn."""

    async def main():
        engine = SGLangEngine([url], request_timeout=60.0, identity=identity)
        engine.set_version(newest)
        try:
            many = Sampling(n=16, max_new_tokens=400)
            sampling = Sampling(n=1, max_new_tokens=8) if during is None else many
            answer = asyncio.create_task(engine.generate([5, 9], sampling, request_id="p"))
            if during is not None:
                await asyncio.sleep(0.1)
                await asyncio.to_thread(during)
            return (await answer)[0]
        finally:
            await engine.aclose()

    return asyncio.run(main())


def test_another_run_is_refused_while_the_server_is_held_and_welcome_after(url, new_sync, models):
    first, second = new_sync(A), new_sync(B)
    push(first, models, "A", 4)
    assert carried(url) == f"{A}:4"
    assert generate(url, A, 4).versions[0][0] == 4
    with pytest.raises(ValueError, match=r"servers\.urls = .*belongs to run 'runs/a-1f3a'"):
        push(second, models, "B", 0)
    assert push(first, models, "A", 5).verified == 19
    first.close()
    assert owner(carried(url)) is None
    assert push(second, models, "B", 0).verified == 19
    assert generate(url, B, 0).versions[0][0] == 0


def test_a_push_by_another_run_ends_this_ones_answers_and_pushes(url, new_sync, models):
    first, second = new_sync(A), new_sync(B, takeover=True)
    push(first, models, "A", 4)
    line = (
        f"weights of run {B!r} (version 12) while this run is at version 4: a server belongs to "
        "one run at a time; give each run servers of its own"
    )
    taken = rf"^{url}: (was taken by|answered with weights of) run '{B}'.* belongs to one run at a"
    with pytest.raises(ServerError, match=taken):  # drawn in part with the weights of each
        generate(url, A, 4, during=lambda: push(second, models, "B", 12))
    with pytest.raises(ServerError) as error:
        generate(url, A, 4)
    assert str(error.value) == f"{url}: answered with {line}"
    with pytest.raises(ServerError) as error:
        push(first, models, "A", 5)
    assert str(error.value) == f"{url}: holds {line}"
    first.close()
    assert carried(url) == f"{B}:12"


def test_a_run_takes_its_own_server_back_after_it_was_killed(url, new_sync, models):
    push(new_sync(A), models, "A", 9)
    for path, body in (("pause_generation", {"mode": "retract"}), ("begin_weight_update", {})):
        post(url, path, **body)  # where it was killed
    assert push(new_sync(A), models, "B", 6).verified == 19
    assert carried(url) == f"{A}:6"
    assert generate(url, A, 6).versions[0][0] == 6


@pytest.fixture
def config(url, paths):
    config = Config()
    config.model.path, config.model.dtype = str(paths["A"]), Dtype.float32
    config.data.max_prompt_tokens, config.rollout.max_new_tokens = 200, 100
    config.rollout.servers.mode, config.rollout.servers.urls = ServerMode.external, [url]
    return config


def test_what_a_server_tells_of_itself(url, config, paths, new_sync):
    (facts,) = probe(config)
    assert facts.url == url and facts.sglang.startswith("0.5.")
    assert (facts.weight_version, facts.model_path) == ("default", str(paths["A"]))
    assert (facts.model_type, facts.architectures) == ("qwen3", ("Qwen3ForCausalLM",))
    assert (facts.vocab_size, facts.layers, facts.context) == (VOCAB, 2, 512)
    assert (facts.dtype, facts.tensor, facts.warnings) == ("float32", 1, ())
    config.model.dtype = Dtype.bfloat16
    assert "computes in float32, model.dtype = bfloat16" in probe(config)[0].warnings[0]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("vocab_size", 99, "vocab_size 100, not 99"),
        ("num_hidden_layers", 3, "num_hidden_layers 2, not 3"),
        ("model_type", "llama", "model_type qwen3, not llama"),
    ],
)
def test_another_model_than_the_runs_is_found(config, tmp_path, key, value, words):
    ours = json.loads((Path(config.model.path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**ours, key: value}))
    config.model.path = str(tmp_path)
    with pytest.raises(ValueError, match=rf"{words}; start it with the run's model"):
        probe(config)


def test_a_context_that_is_too_short_is_found(config):
    config.data.max_prompt_tokens = 413
    with pytest.raises(ValueError, match=r"room for 512 tokens, but .* = 413 \+ 100; lower one"):
        probe(config)


def test_two_names_of_one_server_are_found(config, url):
    config.rollout.servers.urls = [url, url.replace("127.0.0.1", "localhost")]
    with pytest.raises(ValueError, match=rf"localhost:\d+': is the same server as {url}; name"):
        probe(config)


def test_a_server_that_is_held_is_found_before_anything_is_loaded(config, new_sync, models):
    push(new_sync(A), models, "A", 3)
    for identity in (None, B):
        with pytest.raises(ValueError, match=r"belongs to run 'runs/a-1f3a' \(weight version 3\)"):
            probe(config, identity)
    assert probe(config, A)[0].weight_version == f"{A}:3"
    config.rollout.servers.takeover = True
    assert probe(config, B)


def test_a_paused_server_answers_what_it_can(url, config, monkeypatch):
    monkeypatch.setattr(probe_module, "SECONDS", 1.0)
    post(url, "pause_generation", mode="retract")
    try:
        facts = probe(config)[0]
    finally:
        post(url, "continue_generation")
    assert (facts.vocab_size, facts.layers) == (None, 2)
