"""The engine behind one or more SGLang servers, over HTTP.

Payload builders and answer parsers are plain functions: contract tests hold them against SGLang's
own request classes, because SGLang silently ignores a misspelt field.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
import tenacity

from peergrad.data import Rollout
from peergrad.rollout.engine import Sampling
from peergrad.rollout.errors import ServerError as ServerError
from peergrad.rollout.errors import ServerUnavailable, cannot_connect, quote, reason
from peergrad.rollout.versions import number

Json = dict[str, Any]
log = logging.getLogger(__name__)

GIVE_UP_SECONDS = 60.0  # of attempts to connect, whatever rollout.retries says


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


def parse_rollout(
    answer: Any, *, url: str = "the server", identity: str | None = None, newest: int | None = None
) -> Rollout:
    """One sample of a /generate answer of the server ``url``.

    Raises ServerError if it does not add up, or if it was drawn with other weights than those of
    the run ``identity``, at most version ``newest``.
    """
    with _form(url):
        meta = answer["meta_info"]
        scored = meta["output_token_logprobs"]  # [(logprob, token id, text or None)]
        tokens = np.array([token for _, token, _ in scored], np.int32)
        if tokens.tolist() != answer["output_ids"]:
            raise ServerError(
                f"{url}: returned {len(answer['output_ids'])} tokens but logprobs of {len(tokens)} "
                "or of others; every token needs the logprob that it was drawn with",
                url=url,
            )
        spans = [
            (number(span["version"], url, identity, newest), int(span["start"]), int(span["end"]))
            for span in meta["weight_versions"]
        ]
        return Rollout(
            tokens=tokens,
            logprobs=np.array([float(logprob) for logprob, _, _ in scored], np.float32),
            versions=_covering(spans, len(tokens), url),
            finish=meta["finish_reason"]["type"],
            text=answer.get("text") or "",
        )


def _covering(
    spans: list[tuple[int, int, int]], length: int, url: str
) -> tuple[tuple[int, int, int], ...]:
    """``spans`` (version, start, end), if they cover the answer's tokens one after the other."""
    if not length:
        return ()
    bounds = [0, *(end for _, _, end in spans)]
    if [start for _, start, _ in spans] != bounds[:-1] or bounds[-1] != length:
        raise ServerError(
            f"{url}: weight versions {spans} do not cover the answer's {length} tokens; use a "
            "released SGLang of 0.5.21 or later",
            url=url,
        )
    return tuple(spans)


def parse_scores(
    answer: Any,
    length: int,
    *,
    url: str = "the server",
    identity: str | None = None,
    newest: int | None = None,
) -> np.ndarray:
    """Logprobs of all input tokens but the first, [length - 1] float32; errors as for
    ``parse_rollout``."""
    with _form(url):
        meta = answer["meta_info"]
        scored = meta["input_token_logprobs"]
        if len(scored) != length:
            raise ServerError(
                f"{url}: asked to score {length} tokens, the server scored {len(scored)}", url=url
            )
        if identity is not None:
            number(meta["weight_version"], url, identity, newest)
        return np.array([float(logprob) for logprob, _, _ in scored[1:]], np.float32)


@contextmanager
def _form(url: str) -> Iterator[None]:
    """Turn what a malformed answer makes of its reader into one line."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ServerError(
            f"{url}: answered /generate in another form than SGLang's ({quote(repr(error))}); use "
            "SGLang 0.5.21 or later, and name the workers themselves, not a router",
            url=url,
        ) from error


def check(response: httpx.Response, url: str) -> httpx.Response:
    """Pass a 2xx answer on; raise with the server's own message otherwise."""
    if response.is_success:
        return response
    kind = ServerUnavailable if response.is_server_error else ServerError
    path = response.request.url.path
    raise kind(f"{url}: {path} answered {response.status_code}: {_message(response)}", url=url)


def decode(response: httpx.Response, url: str) -> Any:
    """The JSON of an answer."""
    try:
        return response.json()
    except ValueError as error:
        raise ServerError(
            f"{url}: answered {response.request.url.path} with no JSON but "
            f"{quote(response.text)!r}; is this an SGLang server?",
            url=url,
        ) from error


def _message(response: httpx.Response) -> str:
    """SGLang answers {"message"}, {"error"} or {"error": {"message"}}, else plain text."""
    try:
        body = response.json()
        body = body.get("error", body)
        return quote(str(body["message"] if isinstance(body, dict) else body))
    except (ValueError, KeyError, AttributeError):
        return quote(response.text) or response.reason_phrase


class SGLangEngine:
    """Spreads prompts over servers, each group whole, to the one with the fewest groups in flight.

    Connection errors, timeouts and 5xx answers are tried again with growing pauses, on another
    server if there is one; a 4xx answer is an error in the request and raises at once, and so does
    an answer with the weights of another run.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        max_concurrency: int = 256,
        request_timeout: float = 600.0,
        retries: int = 5,
        identity: str | None = None,
    ) -> None:
        """``identity``: the run whose weights all answers must be drawn with; None: anybody's."""
        self._in_flight = Counter({url.rstrip("/"): 0 for url in urls})
        self._slots = asyncio.Semaphore(max_concurrency)
        self._timeout = request_timeout
        self._attempts = retries + 1
        self._identity = identity
        self._newest: int | None = None
        self._client_id = uuid4().hex[:8]  # keeps request ids unique
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(request_timeout, connect=10.0, pool=None),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,  # a cluster's web proxy has no part in this
        )

    def set_version(self, version: int) -> None:
        """Answers may be drawn with weights up to ``version``; a later one is an error."""
        self._newest = version

    async def generate(
        self, prompt_tokens: Sequence[int] | np.ndarray, sampling: Sampling, *, request_id: str
    ) -> list[Rollout]:
        """See ``Engine``. Aborted answers are drawn again, at most ``retries`` times."""
        rollouts: list[Rollout] = []
        async with self._slots:
            for attempt in range(self._attempts):
                missing = Sampling(**{**vars(sampling), "n": sampling.n - len(rollouts)})
                rid = f"{self._client_id}/{request_id}/{attempt}"
                url, answer = await self._post_generate(
                    generate_payload(prompt_tokens, missing, rid)
                )
                drawn = self._parse(url, answer, missing.n)
                rollouts += [rollout for rollout in drawn if rollout.finish != "abort"]
                if len(rollouts) == sampling.n:
                    return rollouts
        raise ServerError(
            f"{url}: aborted prompt {request_id} {self._attempts} times; something else than this "
            "run aborts requests there: end it, or raise rollout.retries",
            url=url,
        )

    async def score(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        url, answer = await self._post_generate(score_payload(tokens))
        return parse_scores(
            answer, len(tokens), url=url, identity=self._identity, newest=self._newest
        )

    async def abort(self) -> None:
        for url in self.urls:
            check(await self._http.post(f"{url}/abort_request", json={"abort_all": True}), url)

    async def aclose(self) -> None:
        await self._http.aclose()

    @property
    def urls(self) -> list[str]:
        return list(self._in_flight)

    def _parse(self, url: str, answer: Any, n: int) -> list[Rollout]:
        samples = answer if isinstance(answer, list) else [answer]
        if len(samples) != n:
            raise ServerError(f"{url}: asked for {n} answers, it gave {len(samples)}", url=url)
        return [
            parse_rollout(sample, url=url, identity=self._identity, newest=self._newest)
            for sample in samples
        ]

    async def _post_generate(self, payload: Json) -> tuple[str, Any]:
        """The decoded answer of POST /generate and its server, the first that gives one."""
        tried: dict[str, None] = {}
        attempts = tenacity.AsyncRetrying(
            stop=self._stop,
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=20),
            retry=tenacity.retry_if_exception_type((httpx.RequestError, ServerUnavailable)),
            before_sleep=self._log_retry,
        )
        try:
            async for attempt in attempts:
                with attempt:
                    return await self._post_once(payload, tried)
        except tenacity.RetryError as error:
            raise self._gave_up(error.last_attempt, list(tried)) from error.last_attempt.exception()
        raise AssertionError("unreachable")

    async def _post_once(self, payload: Json, tried: dict[str, None]) -> tuple[str, Any]:
        # A dead server has nothing in flight: without ``tried`` it would win every retry.
        fresh = [url for url in self.urls if url not in tried] or self.urls
        url = min(fresh, key=self._in_flight.__getitem__)
        tried.pop(url, None)
        tried[url] = None  # the last one tried is the last in it
        self._in_flight[url] += 1
        try:
            response = await self._http.post(f"{url}/generate", json=payload)
            return url, decode(check(response, url), url)
        finally:
            self._in_flight[url] -= 1

    def _stop(self, state: tenacity.RetryCallState) -> bool:
        """After ``retries``; before that where more attempts would only hide what is wrong:
        a server that is gone for a minute has lost its weights, one that let a request time out
        twice hangs."""
        assert state.outcome is not None
        gone = cannot_connect(state.outcome.exception())
        limit = GIVE_UP_SECONDS if gone else 2 * self._timeout
        passed = state.seconds_since_start or 0.0
        return state.attempt_number >= self._attempts or passed >= limit

    def _log_retry(self, state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None and state.next_action is not None
        log.info(
            "retry %d of %d of a /generate request in %.1f s: %s",
            state.attempt_number,
            self._attempts - 1,
            state.next_action.sleep,
            _why(state.outcome.exception()),
        )

    def _gave_up(self, last: tenacity.Future, tried: list[str]) -> ServerError:
        url = tried[-1]
        others = f", nor from {', '.join(tried[:-1])}" if tried[1:] else ""
        times = f"{last.attempt_number} attempt{'s' * (last.attempt_number > 1)}"
        error = last.exception()
        if isinstance(error, httpx.TimeoutException) and not cannot_connect(error):
            remedy = f"raise rollout.request_timeout ({self._timeout:g} s) if it is only slow"
        else:
            remedy = "see whether that server still runs, and its log"
        return ServerError(
            f"{url}: no answer to /generate in {times}{others} ({_why(error)}); {remedy}", url=url
        )


def _why(error: BaseException | None) -> str:
    """A failed attempt's reason; that of a ServerError names its server already."""
    assert error is not None
    return quote(str(error)) if isinstance(error, ServerError) else reason(error)
