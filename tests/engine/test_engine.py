"""The real SGLang server on CPU: generation, weight syncs and their proof, against transformers."""

import asyncio
from dataclasses import replace

import httpx
import numpy as np
import pytest
import torch

from peergrad.config import Proof as ProofMode
from peergrad.data import Group
from peergrad.rollout import sync as sync_module
from peergrad.rollout.engine import Sampling
from peergrad.rollout.sglang import ServerError, SGLangEngine
from peergrad.rollout.sync import WeightSync

pytestmark = pytest.mark.engine

PROMPTS = [[5, 9, 30], list(range(3, 60)), [70]]
VOCAB = 100  # no multiple of 64: the server appends rows
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def new_sync(server):
    made = []

    def build(**options) -> WeightSync:
        options = {"vocab_size": VOCAB, "bucket_mb": 1, "timeout": 60.0, **options}
        made.append(WeightSync([server.url], **options))
        return made[-1]

    yield build
    for sync in made:
        sync.close()


@pytest.fixture(scope="module")
def url(server, new_sync, models):
    """The shared server with the weights A, version 0, whatever its last user left."""
    sync = new_sync()
    push(sync, models["A"], 0)
    sync.close()
    return server.url


@pytest.fixture(scope="module")
def sync(new_sync, url):
    return new_sync()


def run(url, use):
    """``await use(engine)`` in an event loop of its own."""

    async def main():
        engine = SGLangEngine([url], request_timeout=60.0)
        try:
            return await use(engine)
        finally:
            await engine.aclose()

    return asyncio.run(main())


def generate(url, prompt, sampling):
    return run(url, lambda engine: engine.generate(prompt, sampling, request_id="test"))


@torch.no_grad()
def logprobs(model, tokens, temperature=1.0):
    """Of tokens[1:], by transformers."""
    tokens = torch.as_tensor(np.asarray(tokens)).long()
    logits = model(tokens[None]).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0].numpy()


def gap(model, prompt, rollout, temperature=1.0, start=0, end=None):
    """Largest difference over the answer's tokens [start, end)."""
    own = logprobs(model, [*prompt, *rollout.tokens], temperature)[len(prompt) - 1 :]
    return np.abs(own - rollout.logprobs)[start:end].max()


def canary_gap(model, canary: Group):
    return max(gap(model, canary.prompt.tokens, rollout) for rollout in canary.rollouts)


def push(sync, model, version, **changes):
    return sync.load({**model.state_dict(), **changes}.items(), version)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_transformers(url, models, temperature):
    sampling = Sampling(n=4, max_new_tokens=24, temperature=temperature)
    for prompt in PROMPTS:
        for rollout in generate(url, prompt, sampling):
            assert gap(models["A"], prompt, rollout, temperature) < TOLERANCE
            assert rollout.versions == ((0, 0, len(rollout.tokens)),)
            ended = rollout.tokens[-1] == 1  # perhaps with the last token that it might have
            assert rollout.finish == ("stop" if ended else "length")
            assert ended or len(rollout.tokens) == 24


def test_greedy_takes_the_likeliest_token(url, models):
    (rollout,) = generate(url, PROMPTS[0], Sampling(n=1, max_new_tokens=16, temperature=0.0))
    tokens = torch.tensor([*PROMPTS[0], *rollout.tokens])
    with torch.no_grad():
        best = models["A"](tokens[None]).logits[0].argmax(-1)
    assert best[len(PROMPTS[0]) - 1 : -1].tolist() == rollout.tokens.tolist()


def test_an_answer_ends_with_its_stop_token(url):
    sampling = Sampling(n=8, max_new_tokens=200, stop_token_ids=tuple(range(40, VOCAB)))
    for rollout in generate(url, PROMPTS[0], sampling):
        assert rollout.finish == "stop"
        assert rollout.tokens[-1] in (1, *sampling.stop_token_ids)
        assert (rollout.tokens[:-1] < 40).all()


def test_scores_are_those_of_transformers(url, models):
    tokens = np.arange(3, 60)
    scores = run(url, lambda engine: engine.score(tokens))
    assert np.abs(scores - logprobs(models["A"], tokens)).max() < TOLERANCE


def test_a_prompt_longer_than_the_context_is_refused_with_the_servers_words(url):
    with pytest.raises(ServerError, match=r"answered 400: .*context length"):
        generate(url, [5] * 600, Sampling(n=1, max_new_tokens=8))


def test_aborted_answers_are_drawn_again(url, models):
    async def abort_in_flight(engine):
        sampling = Sampling(n=8, max_new_tokens=400)
        task = asyncio.create_task(engine.generate(PROMPTS[0], sampling, request_id="abort"))
        await asyncio.sleep(0.3)
        await engine.abort()
        return await task

    rollouts = run(url, abort_in_flight)
    assert len(rollouts) == 8
    assert {rollout.finish for rollout in rollouts} <= {"stop", "length"}
    assert max(gap(models["A"], PROMPTS[0], rollout) for rollout in rollouts) < TOLERANCE


def test_weights_go_there_and_back(url, sync, models):
    for version, name in enumerate("ABA", start=1):
        proof = push(sync, models[name], version)
        assert (proof.version, proof.verified, proof.unverified) == (version, 19, 0)
        assert canary_gap(models[name], proof.canary) < TOLERANCE
        for rollout in generate(url, PROMPTS[1], Sampling(n=2, max_new_tokens=16)):
            assert gap(models[name], PROMPTS[1], rollout) < TOLERANCE
            assert rollout.versions == ((version, 0, len(rollout.tokens)),)


def test_a_request_in_flight_goes_on_with_the_new_weights(url, sync, models):
    push(sync, models["A"], 10)

    async def push_after(delay, engine):
        sampling = Sampling(n=16, max_new_tokens=400)
        task = asyncio.create_task(engine.generate(PROMPTS[0], sampling, request_id="swap"))
        await asyncio.sleep(delay)
        await asyncio.to_thread(push, sync, models["B"], 11)
        return await task

    for delay in (0.2, 0.5, 1.0, 2.0, 0.05, 4.0, 8.0):  # until it falls within a generation
        rollouts = run(url, lambda engine, delay=delay: push_after(delay, engine))
        mixed = [rollout for rollout in rollouts if len(rollout.versions) == 2]
        if mixed:
            break
        push(sync, models["A"], 10)
    assert mixed
    for rollout in mixed:
        (old, _, swap), (new, start, end) = rollout.versions
        assert (old, new, swap, end) == (10, 11, start, len(rollout.tokens))
        assert gap(models["A"], PROMPTS[0], rollout, end=swap) < TOLERANCE
        assert gap(models["B"], PROMPTS[0], rollout, start=swap) < TOLERANCE


def test_a_name_that_the_engine_does_not_know_is_found(sync, models):
    weights = models["B"].state_dict()
    weights["model.layers.1.self_attn.norm_q.weight"] = weights.pop(
        "model.layers.1.self_attn.q_norm.weight"
    )
    with pytest.raises(RuntimeError) as error:
        sync.load(weights.items(), 20)
    assert "no tensor called model.layers.1.self_attn.norm_q.weight" in str(error.value)
    assert "never sent model.layers.1.self_attn.q_norm.weight" in str(error.value)
    assert push(sync, models["A"], 21).verified == 19


def test_names_exchanged_on_the_way_are_found(sync, models, monkeypatch):
    one, two = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    exchanged = {one: two, two: one}

    def exchange(bucket, *rest):
        names = [exchanged.get(name, name) for name in bucket.names]
        return payload(replace(bucket, names=names), *rest)

    payload = sync_module.update_payload
    monkeypatch.setattr(sync_module, "update_payload", exchange)
    with pytest.raises(RuntimeError, match=f"other values than were sent of {one}, {two}"):
        push(sync, models["B"], 22)
    monkeypatch.undo()
    push(sync, models["A"], 23)


def test_tensors_exchanged_before_they_were_sent_show_on_the_canary(sync, models):
    """The trainer's own mistake: it sent what it says it sent, but that is not its model."""
    one, two = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    weights = models["B"].state_dict()
    proof = push(sync, models["B"], 24, **{one: weights[two], two: weights[one]})
    assert proof.verified == 19
    assert canary_gap(models["B"], proof.canary) > 0.1


def test_a_skipped_sync_shows_on_the_canary(sync, models):
    proof = push(sync, models["A"], 25)
    assert canary_gap(models["A"], proof.canary) < TOLERANCE
    assert canary_gap(models["B"], proof.canary) > 1


def test_after_a_failed_update_nothing_is_generated_until_one_succeeds(url, sync, models):
    with pytest.raises(ServerError, match=rf"{url}.* answered 400: .*partially updated"):
        push(sync, models["B"], 26, **{"model.norm.weight": torch.ones(65)})
    assert httpx.get(f"{url}/ready").status_code == 503
    assert httpx.get(f"{url}/health").status_code == 200
    proof = push(sync, models["A"], 27)
    assert canary_gap(models["A"], proof.canary) < TOLERANCE
    assert httpx.get(f"{url}/ready").status_code == 200


def test_a_new_trainer_takes_over_from_one_that_was_killed(url, new_sync, models):
    for path, body in (("pause_generation", {"mode": "retract"}), ("begin_weight_update", {})):
        httpx.post(f"{url}/{path}", json=body).raise_for_status()
    proof = push(new_sync(), models["A"], 28)
    assert canary_gap(models["A"], proof.canary) < TOLERANCE


@pytest.mark.parametrize("mode", [ProofMode.canary, ProofMode.off])
def test_lesser_proofs(new_sync, models, mode):
    proof = push(new_sync(proof=mode), models["A"], 29)
    assert (proof.verified, proof.unverified) == (0, 0)
    assert (proof.canary is None) == (mode is ProofMode.off)
