"""The engine behind one or more SGLang servers, over HTTP.

Payload builders and answer parsers are plain functions: contract tests hold them against SGLang's
own request classes, because SGLang silently ignores a misspelt field.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
import tenacity

from peergrad.data import Rollout
from peergrad.rollout.engine import Sampling

Json = dict[str, Any]


class ServerError(RuntimeError):
    """A server refused or failed a request. The message names the server and quotes it."""


class ServerUnavailable(ServerError):
    """A 5xx answer: another attempt may succeed."""


def generate_payload(
    prompt_tokens: Sequence[int] | np.ndarray, sampling: Sampling, request_id: str
) -> Json:
    """Body of POST /generate for ``sampling.n`` answers to one prompt."""
    return {
        "rid": request_id,
        "input_ids": np.asarray(prompt_tokens).tolist(),
        "return_logprob": True,
        "sampling_params": {
            "n": sampling.n,
            "temperature": sampling.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "max_new_tokens": sampling.max_new_tokens,
            "stop_token_ids": list(sampling.stop_token_ids),
        },
    }


def score_payload(tokens: Sequence[int] | np.ndarray) -> Json:
    """Body of POST /generate that draws nothing and scores every token of the input."""
    return {
        "input_ids": np.asarray(tokens).tolist(),
        "return_logprob": True,
        "logprob_start_len": 0,
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
    }


def parse_rollout(answer: Mapping[str, Any]) -> Rollout:
    """One sample of a /generate answer. Raises ServerError if it does not add up."""
    meta = answer["meta_info"]
    scored = meta["output_token_logprobs"]  # [(logprob, token id, text or None)]
    tokens = np.array([token for _, token, _ in scored], np.int32)
    if tokens.tolist() != answer["output_ids"]:
        raise ServerError(
            f"the server returned {len(answer['output_ids'])} tokens but logprobs of {len(tokens)} "
            "or of others; every token needs the logprob that it was drawn with"
        )
    return Rollout(
        tokens=tokens,
        logprobs=np.array([logprob for logprob, _, _ in scored], np.float32),
        versions=_parse_versions(meta["weight_versions"], len(tokens)),
        finish=meta["finish_reason"]["type"],
        text=answer.get("text") or "",
    )


def _parse_versions(spans: list[Json], length: int) -> tuple[tuple[int, int, int], ...]:
    try:
        versions = tuple((int(s["version"]), s["start"], s["end"]) for s in spans if length)
    except ValueError as error:
        raise ServerError(
            f"weight versions must be whole numbers, got {spans}; start external servers with "
            "--weight-version 0"
        ) from error
    bounds = [0, *(end for _, _, end in versions)]
    if [start for _, start, _ in versions] != bounds[:-1] or bounds[-1] != length:
        raise ServerError(f"weight versions {spans} do not cover the answer's {length} tokens")
    return versions


def parse_scores(answer: Mapping[str, Any], length: int) -> np.ndarray:
    """Logprobs of all input tokens but the first, [length - 1] float32."""
    scored = answer["meta_info"]["input_token_logprobs"]
    if len(scored) != length:
        raise ServerError(f"asked to score {length} tokens, the server scored {len(scored)}")
    return np.array([logprob for logprob, _, _ in scored[1:]], np.float32)


def check(response: httpx.Response) -> httpx.Response:
    """Pass a 2xx answer on; raise with the server's own message otherwise."""
    if response.is_success:
        return response
    kind = ServerUnavailable if response.is_server_error else ServerError
    raise kind(f"{response.request.url} answered {response.status_code}: {_message(response)}")


def _message(response: httpx.Response) -> str:
    """SGLang answers {"message"}, {"error"} or {"error": {"message"}}, else plain text."""
    try:
        body = response.json()
        body = body.get("error", body)
        return str(body["message"] if isinstance(body, dict) else body)
    except (ValueError, KeyError, AttributeError):
        return response.text[:2000]


class SGLangEngine:
    """Spreads prompts over servers, each group whole, to the one with the fewest groups in flight.

    Connection errors, timeouts and 5xx answers are tried again with growing pauses, on another
    server if there is one; a 4xx answer is an error in the request and raises at once.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        max_concurrency: int = 256,
        request_timeout: float = 600.0,
        retries: int = 5,
    ) -> None:
        self._in_flight = Counter({url.rstrip("/"): 0 for url in urls})
        self._slots = asyncio.Semaphore(max_concurrency)
        self._attempts = retries + 1
        self._client_id = uuid4().hex[:8]  # servers may be shared: keeps request ids unique
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(request_timeout, connect=10.0, pool=None),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,  # a cluster's web proxy has no part in this
        )

    async def generate(
        self, prompt_tokens: Sequence[int] | np.ndarray, sampling: Sampling, *, request_id: str
    ) -> list[Rollout]:
        """See ``Engine``. Aborted answers are drawn again, at most ``retries`` times."""
        rollouts: list[Rollout] = []
        async with self._slots:
            for attempt in range(self._attempts):
                missing = Sampling(**{**vars(sampling), "n": sampling.n - len(rollouts)})
                rid = f"{self._client_id}/{request_id}/{attempt}"
                answer = await self._post_generate(generate_payload(prompt_tokens, missing, rid))
                samples = answer if isinstance(answer, list) else [answer]
                drawn = [parse_rollout(sample) for sample in samples]
                rollouts += [rollout for rollout in drawn if rollout.finish != "abort"]
                if len(rollouts) == sampling.n:
                    return rollouts
        raise ServerError(
            f"prompt {request_id} was aborted {self._attempts} times; something else than this run "
            "aborts requests on the servers, or raise rollout.retries"
        )

    async def score(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        answer = await self._post_generate(score_payload(tokens))
        return parse_scores(answer, len(tokens))

    async def abort(self) -> None:
        for url in self.urls:
            check(await self._http.post(f"{url}/abort_request", json={"abort_all": True}))

    async def aclose(self) -> None:
        await self._http.aclose()

    @property
    def urls(self) -> list[str]:
        return list(self._in_flight)

    async def _post_generate(self, payload: Json) -> Any:
        """The decoded answer of POST /generate, from the first server that gives one."""
        tried: set[str] = set()
        attempts = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=20),
            retry=tenacity.retry_if_exception_type((httpx.TransportError, ServerUnavailable)),
        )
        try:
            async for attempt in attempts:
                with attempt:
                    return await self._post_once(payload, tried)
        except tenacity.RetryError as error:
            last = error.last_attempt.exception()
            raise ServerError(
                f"no answer to /generate from {sorted(tried)} in {self._attempts} attempts "
                f"(last: {last!r}); see the servers' logs, or raise rollout.request_timeout"
            ) from last
        raise AssertionError("unreachable")

    async def _post_once(self, payload: Json, tried: set[str]) -> Any:
        # A dead server has nothing in flight: without ``tried`` it would win every retry.
        fresh = [url for url in self.urls if url not in tried] or self.urls
        url = min(fresh, key=self._in_flight.__getitem__)
        tried.add(url)
        self._in_flight[url] += 1
        try:
            return check(await self._http.post(f"{url}/generate", json=payload)).json()
        finally:
            self._in_flight[url] -= 1
