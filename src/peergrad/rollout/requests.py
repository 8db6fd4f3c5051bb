"""How groups become requests: many short ones share one, a long one has its own.

What a request costs a server beside its tokens (HTTP, JSON, a round trip for the shared prompt) is
5 ms of a core; a group of 8 answers of 3 tokens is not worth that. Contract tests hold the bodies
against SGLang's own request classes, because SGLang silently ignores a misspelt field.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from peergrad.rollout.engine import Routes, Sampling

Json = dict[str, Any]

SHORT_PROMPT = 32
"""Tokens of a prompt up to which it costs less to compute it for each answer than to have the
server compute it first, alone, and then the answers."""
SHORT_ANSWER = 64
"""Tokens up to which an answer may share a request, where all wait for the longest."""
SHARED_TOKENS = 8192
"""Answer tokens that the groups of one request may come to: a server has other ones to begin with
while a request of thousands of answers is written and read."""

PLAIN = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "ignore_eos": False,
}
"""Said although they are SGLang's defaults: a server may have defaults of its own, and would draw
from another distribution than the trainer's."""


@dataclass(frozen=True)
class Draw:
    """Answers wanted of one prompt.

    Example:
        ``Draw([5, 9, 2], Sampling(n=8, max_new_tokens=512), "ab12/17/p/0")``
    """

    prompt: Sequence[int] | np.ndarray
    sampling: Sampling
    request_id: str

    @property
    def short(self) -> bool:
        answer = self.sampling.max_new_tokens
        return len(self.prompt) <= SHORT_PROMPT and answer <= SHORT_ANSWER

    @property
    def most(self) -> int:
        """Answer tokens that it may come to."""
        return self.sampling.n * self.sampling.max_new_tokens


def together(draws: Sequence[Draw], servers: int = 1) -> list[list[Draw]]:
    """Which draws go into one request, in their order: equally sampled short ones, of up to
    ``SHARED_TOKENS``, but never so many that one of ``servers`` would have none; every other one
    alone."""
    most = -(-len(draws) // servers)
    requests: list[list[Draw]] = []
    room = 0
    for draw in draws:
        last = requests[-1] if requests else []
        if last and len(last) < most and draw.most <= room and _alike(last[-1], draw):
            last.append(draw)
        else:
            requests.append([draw])
            room = SHARED_TOKENS
        room -= draw.most
    return requests


def _alike(one: Draw, other: Draw) -> bool:
    equally = replace(one.sampling, n=1) == replace(other.sampling, n=1)
    return one.short and other.short and equally


def generate_payload(draws: Sequence[Draw]) -> Json:
    """Body of POST /generate for the answers to ``draws``, which come in that order."""
    first = draws[0]
    params = _params(first.sampling)
    payload = {"return_logprob": True, "sampling_params": params}
    if first.sampling.routes is not None:
        payload["return_routed_experts"] = True
    if len(draws) == 1 and (first.sampling.n == 1 or not first.short):
        params["n"] = first.sampling.n
        return {**payload, "rid": first.request_id, "input_ids": _ids(first.prompt)}
    answers = [(draw, k) for draw in draws for k in range(draw.sampling.n)]
    return {
        **payload,
        "rid": [f"{draw.request_id}/{k}" for draw, k in answers],
        "input_ids": [_ids(draw.prompt) for draw, _ in answers],
    }


def score_payload(tokens: Sequence[int] | np.ndarray, *, routes: Routes | None = None) -> Json:
    """Body of POST /generate that draws nothing and scores every token of the input."""
    payload = {
        "input_ids": _ids(tokens),
        "return_logprob": True,
        "logprob_start_len": 0,
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
    }
    return payload if routes is None else {**payload, "return_routed_experts": True}


def _params(sampling: Sampling) -> Json:
    return {
        "n": 1,
        "temperature": sampling.temperature,
        "max_new_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        **PLAIN,
    }


def _ids(tokens: Sequence[int] | np.ndarray) -> list[int]:
    found: list[int] = np.asarray(tokens).tolist()
    return found
