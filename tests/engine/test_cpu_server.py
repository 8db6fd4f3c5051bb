"""What a managed server on a CPU does otherwise than SGLang by itself: attention, prefix cache."""

import asyncio

import httpx
import numpy as np
import pytest
import torch

from peergrad.rollout.engine import Sampling
from peergrad.rollout.sglang import SGLangEngine
from peergrad.rollout.sync import WeightSync

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU server has SGLang's own"),
]
LONG = [3 + (7 * i * i + i) % 90 for i in range(300)]


@pytest.fixture(scope="module")
def url(server, models):
    """The shared server with the weights A, version 0, its cache empty."""
    sync = WeightSync([server.url], vocab_size=100, bucket_mb=1, timeout=60.0)
    sync.load(models["A"].state_dict().items(), 0)
    sync.close()
    return server.url


def test_requests_of_any_length_at_once_have_transformers_logprobs(url, models):
    """One long prompt among short ones, some with a prefix in the cache, answers of many lengths:
    blocks form and dissolve while prompts are taken in."""
    prompts = [LONG, *([5, 9 + i, 30][: 1 + i % 3] for i in range(40)), LONG[:150], LONG[:200]]
    lengths = [3 + (11 * i) % 90 for i in range(len(prompts))]

    async def all_at_once():
        engine = SGLangEngine([url], request_timeout=60.0)
        try:
            return await asyncio.gather(
                *(
                    engine.generate(
                        prompt, Sampling(n=3, max_new_tokens=length), request_id=str(index)
                    )
                    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
                )
            )
        finally:
            await engine.aclose()

    for prompt, rollouts in zip(prompts, asyncio.run(all_at_once()), strict=True):
        for rollout in rollouts:
            tokens = torch.tensor([*prompt, *rollout.tokens.tolist()])
            with torch.no_grad():
                logits = models["A"](tokens[None]).logits[0, len(prompt) - 1 : -1].float()
            chosen = logits.log_softmax(-1).gather(1, tokens[len(prompt) :, None])[:, 0]
            assert np.abs(chosen.numpy() - rollout.logprobs).max() < 1e-5


@pytest.mark.parametrize(
    ("prompt", "cached"),
    [
        (LONG[::-1], 299),  # all but the token whose logits are asked for
        ([7, 8, 9, 10, 11], 0),  # computing them again costs less than remembering them
    ],
    ids=["long", "short"],
)
def test_a_group_shares_its_prompt_if_that_is_worth_it(url, prompt, cached):
    body = {"input_ids": prompt, "sampling_params": {"n": 4, "max_new_tokens": 2}}
    answers = httpx.post(f"{url}/generate", json=body, timeout=60.0).json()
    assert [answer["meta_info"]["cached_tokens"] for answer in answers] == [cached] * 4
