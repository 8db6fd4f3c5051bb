"""The engine behind one or more SGLang servers, over HTTP."""

import asyncio
import logging
import time
from asyncio import Future
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import aiohttp
import msgspec
import numpy as np
import tenacity

from peergrad.data import Rollout
from peergrad.rollout.answers import Answer, Asked, parse_rollout, parse_scores, read_answers
from peergrad.rollout.control import KEEP_SECONDS
from peergrad.rollout.engine import Sampling
from peergrad.rollout.errors import ServerError as ServerError
from peergrad.rollout.errors import ServerUnavailable, cannot_connect, quote, reason
from peergrad.rollout.presence import CONNECT_SECONDS, absent_since
from peergrad.rollout.reply import Reply
from peergrad.rollout.requests import Draw, Json, generate_payload, score_payload, together

Drawn = tuple[str, Sequence[Answer]]
"""A server and its samples."""
AS_JSON = {"Content-Type": "application/json"}
FLEETING = (aiohttp.ClientError, TimeoutError, ServerUnavailable)
"""What another attempt may mend."""
log = logging.getLogger(__name__)

WATCH_SECONDS = 10.0


class SGLangEngine:
    """Spreads prompts over servers, each group whole, to the one with the fewest groups in flight.

    Connection errors, timeouts and 5xx answers are tried again with growing pauses, on another
    server if there is one; a 4xx answer is an error in the request and raises at once, and so does
    an answer with the weights of another run. A server that cannot be reached is asked for nothing
    until it can; a machine that vanishes closes no connection, so what was asked of it is given up
    after ``lost_after`` seconds.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        max_concurrency: int = 256,
        request_timeout: float = 600.0,
        retries: int = 5,
        lost_after: float = 60.0,
        identity: str | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """To be called in the event loop that uses it. ``identity``: the run whose weights all
        answers must be drawn with; None: anybody's. ``vocab_size``: of the model, if token ids are
        to be checked."""
        self.urls = [url.rstrip("/") for url in urls]
        self._in_flight = Counter[str]()  # groups, by URL
        self._open: defaultdict[str, set[asyncio.Timeout]] = defaultdict(set)  # requests, by URL
        self._away: dict[str, float] = {}  # since when a server cannot be reached
        self._lost_after = lost_after
        self._watch = asyncio.create_task(self._look_for_servers())
        self._slots = asyncio.Semaphore(max_concurrency)
        self._timeout = request_timeout
        self._attempts = retries + 1
        self._identity = identity
        self._vocab_size = vocab_size
        self._oldest: int | None = None
        self._newest: int | None = None
        self._waiting: list[tuple[Draw, Future[Drawn]]] = []
        self._asking: set[asyncio.Task[None]] = set()
        self._client_id = uuid4().hex[:8]  # keeps request ids unique
        # No web proxy of a cluster has a part in this. Hundreds of requests are open at once, and
        # cost this client 0.3 ms of a core each; httpx takes 20.
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_SECONDS),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=CONNECT_SECONDS, sock_read=request_timeout
            ),
        )

    def expect(self, version: int) -> None:
        """The servers are about to get weights ``version``: a later one is an error."""
        self._newest = version

    def set_version(self, version: int, urls: Sequence[str] | None = None) -> None:
        """All servers hold weights ``version``: what is asked for from now on must be drawn with
        these or later ones, token by token. ``urls``: which servers that are, if not all."""
        self._oldest = self._newest = version
        if urls is not None:
            for url in set(self.urls) - set(urls):
                self._give_up(url)
            self.urls = list(urls)

    async def generate(
        self, prompt_tokens: Sequence[int] | np.ndarray, sampling: Sampling, *, request_id: str
    ) -> list[Rollout]:
        """See ``Engine``. Aborted answers are drawn again, at most ``retries`` times."""
        rollouts: list[Rollout] = []
        async with self._slots:
            for attempt in range(self._attempts):
                missing = Sampling(**{**vars(sampling), "n": sampling.n - len(rollouts)})
                rid = f"{self._client_id}/{request_id}/{attempt}"
                url, drawn = await self._draw(Draw(prompt_tokens, missing, rid))
                rollouts += drawn
                if len(rollouts) == sampling.n:
                    return rollouts
        raise ServerError(
            f"{url}: aborted prompt {request_id} {self._attempts} times; something else than this "
            "run aborts requests there: end it, or raise rollout.retries",
            url=url,
        )

    async def _draw(self, draw: Draw) -> tuple[str, list[Rollout]]:
        """The server, and those of its answers that were not aborted."""
        oldest = self._oldest
        url, samples = await self._answers(draw)
        asked = self._asked(
            oldest,
            prompt_tokens=len(draw.prompt),
            max_new_tokens=draw.sampling.max_new_tokens,
            vocab_size=self._vocab_size,
            routes=draw.sampling.routes,
        )
        parsed = [parse_rollout(sample, url=url, asked=asked) for sample in samples]
        return url, [rollout for rollout in parsed if rollout is not None]

    def _answers(self, draw: Draw) -> Future[Drawn]:
        """What a server answers to ``draw``, which goes out with all that is asked for until the
        event loop comes round."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._send)
        answers: Future[Drawn] = loop.create_future()
        self._waiting.append((draw, answers))
        return answers

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        rest = iter(waiting)
        for draws in together([draw for draw, _ in waiting], servers=len(self.urls)):
            self._start([next(rest) for _ in draws])

    def _start(self, asked: Sequence[tuple[Draw, Future[Drawn]]]) -> None:
        task = asyncio.create_task(self._ask(asked))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _ask(self, asked: Sequence[tuple[Draw, Future[Drawn]]]) -> None:
        """One request; its answers, or its error, to those who wait for them."""
        draws = [draw for draw, _ in asked]
        try:
            count = sum(draw.sampling.n for draw in draws)
            url, samples = await self._post_generate(generate_payload(draws), len(draws))
            rest = iter(_counted(samples, count, url))
            for draw, answers in asked:
                mine = [next(rest) for _ in range(draw.sampling.n)]
                if not answers.done():  # cancelled
                    answers.set_result((url, mine))
        except BaseException as error:
            for _, answers in asked:
                if not answers.done():
                    answers.set_exception(error)

    async def score(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        oldest = self._oldest
        url, answers = await self._post_generate(score_payload(tokens), 1)
        (answer,) = _counted(answers, 1, url)
        return parse_scores(answer, len(tokens), url=url, asked=self._asked(oldest))

    async def abort(self) -> None:
        for url in self.urls:
            (await self._post(url, "/abort_request", {"abort_all": True})).checked()

    async def aclose(self) -> None:
        tasks = [*self._asking, self._watch]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.close()

    def _asked(self, oldest: int | None, **more: Any) -> Asked:
        """``newest`` is of now: requests in flight go on with the weights of a sync."""
        return Asked(identity=self._identity, oldest=oldest, newest=self._newest, **more)

    async def _post_generate(self, payload: Json, groups: int) -> Drawn:
        """The server, the first that gives one, and its decoded answer to POST /generate."""
        tried: dict[str, None] = {}
        attempts = tenacity.AsyncRetrying(
            stop=self._stop,
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=20),
            retry=tenacity.retry_if_exception_type(FLEETING),
            before_sleep=self._log_retry,
        )
        try:
            async for attempt in attempts:
                with attempt:
                    return await self._post_once(payload, groups, tried)
        except tenacity.RetryError as error:
            raise self._gave_up(error.last_attempt, list(tried)) from error.last_attempt.exception()
        raise AssertionError("unreachable")

    async def _post_once(self, payload: Json, groups: int, tried: dict[str, None]) -> Drawn:
        # A broken server has nothing in flight: without ``tried`` it would win every retry.
        there = [url for url in self.urls if url not in self._away] or self.urls
        fresh = [url for url in there if url not in tried] or there
        url = min(fresh, key=self._in_flight.__getitem__)
        tried.pop(url, None)
        tried[url] = None  # the last one tried is the last in it
        self._in_flight[url] += groups
        try:
            reply = (await self._post(url, "/generate", payload)).checked()
        except (aiohttp.ClientError, TimeoutError) as error:
            if cannot_connect(error):
                self._away.setdefault(url, time.monotonic())
            raise
        finally:
            self._in_flight[url] -= groups
        try:
            return url, read_answers(reply.content, url)
        except msgspec.DecodeError as error:
            raise reply.no_json() from error

    async def _post(self, url: str, path: str, body: Json) -> Reply:
        content, limit = msgspec.json.encode(body), asyncio.timeout(None)
        self._open[url].add(limit)
        try:
            async with (
                limit,
                self._http.post(url + path, data=content, headers=AS_JSON) as response,
            ):
                return Reply(url, path, response.status, await response.read())
        finally:
            self._open[url].discard(limit)

    async def _look_for_servers(self) -> None:
        """Every moment, for as long as there is an engine."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            self._away = await absent_since(self.urls, self._away)
            for url, since in self._away.items():
                seconds = time.monotonic() - since
                if self._open[url] and seconds >= self._lost_after:
                    log.warning(
                        "%s: cannot be reached for %.0f s; its groups are asked for again",
                        *(url, seconds),
                    )
                    self._give_up(url)

    def _give_up(self, url: str) -> None:
        """Let every request to ``url`` time out."""
        for limit in self._open[url]:
            limit.reschedule(asyncio.get_running_loop().time())

    def _stop(self, state: tenacity.RetryCallState) -> bool:
        """After ``retries``; before that where more attempts would only hide what is wrong:
        servers that are all gone for ``lost_after`` have lost their weights, one that let a request
        time out twice hangs."""
        assert state.outcome is not None
        gone = cannot_connect(state.outcome.exception()) and self._away.keys() >= set(self.urls)
        limit = self._lost_after if gone else 2 * self._timeout
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
        if isinstance(error, TimeoutError) and not cannot_connect(error):
            remedy = f"raise rollout.request_timeout ({self._timeout:g} s) if it is only slow"
        else:
            remedy = "see whether that server still runs, and its log"
        return ServerError(
            f"{url}: no answer to /generate in {times}{others} ({_why(error)}); {remedy}", url=url
        )


def _counted(answers: Sequence[Answer], count: int, url: str) -> Sequence[Answer]:
    if len(answers) != count:
        raise ServerError(f"{url}: asked for {count} answers, it gave {len(answers)}", url=url)
    return answers


def _why(error: BaseException | None) -> str:
    """A failed attempt's reason; that of a ServerError names its server already."""
    assert error is not None
    return quote(str(error)) if isinstance(error, ServerError) else reason(error)
