"""The process that gathers groups while the trainer trains.

It owns the prompt order, the HTTP client, the rewards and the staleness budget: decoding a million
tokens of JSON in the trainer's process would stall its kernel launches.
"""

import asyncio
import atexit
import logging
import multiprocessing
import os
import pickle
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from peergrad.algo.sampling import selects
from peergrad.config import Config, OnError
from peergrad.data import Prompt
from peergrad.rollout.engine import Routes, Sampling
from peergrad.rollout.errors import DEATH_SECONDS, Ended, ServerError, none_ended
from peergrad.rollout.evaluation import EvaluationResult, evaluate
from peergrad.rollout.outbox import Outbox, raise_here
from peergrad.rollout.scoring import Scorer, Scoring
from peergrad.rollout.sglang import SGLangEngine
from peergrad.rollout.stream import PromptSource, Stream, StreamState, Taken
from peergrad.rollout.text import Decode, Decoding
from peergrad.running.lifetime import deaf_to_interrupts, die_with_parent
from peergrad.running.stopping import SIGNALS as STOP_SIGNALS

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
PROGRESS_SECONDS = 1.0
GRACE_SECONDS = 10.0
GIVE_UP = "give up"  # in place of a verb: the one at work need not go on


@dataclass(frozen=True)
class Parts:
    """What the collector is given, built inside its process."""

    prompts: PromptSource
    held_out: Sequence[Prompt]  # for evaluation; may be empty
    scorer: Scorer
    stop_token_ids: tuple[int, ...]  # ids that end an answer: the tokenizer's
    decode: Decode  # what rewards read of an answer
    vocab_size: int | None = None  # of the model; None: token ids are not checked
    routes: Routes | None = None  # of a mixture of experts, if the trainer takes them again


Build = Callable[[Config, Callable[[str], None]], Parts]
"""Makes the parts; the second argument is to be told how far it is."""


def _never() -> bool:
    return False


class Collector:
    """The trainer's handle on the collector process; used by global rank 0 only.

    Every verb blocks. An error in the process is raised here: a ValueError if it was one, else a
    RuntimeError, with its message; its traceback goes to the log of both. ``heard`` is given each
    word on how far a verb is. Warnings of the process come here, so that one process alone writes
    to the screen. The process ends with this one, however this one ends. Start it from the main
    thread.
    """

    def __init__(
        self,
        config: Config,
        urls: Sequence[str],
        build: Build,
        *,
        state: bytes | None = None,
        identity: str | None = None,
        ended: Ended = none_ended,
        open_log: Callable[[], object] = int,
    ) -> None:
        """Returns at once. ``open_log`` and ``build`` run in the new process: top-level functions
        of modules that are quick to import. ``state``: what ``state()`` returned in an earlier
        run. ``identity``: the run whose weights every answer must be drawn with. ``ended``: what
        is known of servers that have ended, as ``ManagedServers.ended`` tells it; once none is left
        nothing waits for them.
        """
        self.heard: Callable[[str], None] = lambda text: None
        self._ended, self._servers = ended, len(urls)
        context = multiprocessing.get_context("spawn")  # fork would copy CUDA and its threads
        self._connection, theirs = context.Pipe()
        # Not a daemon: those may not have children, and rewards run in processes of their own.
        self._process = context.Process(
            target=_run,
            args=(theirs, os.getpid(), config, list(urls), build, state, identity, open_log),
            name="collector",
        )
        with deaf_to_interrupts():  # Ctrl-C is the trainer's to handle
            self._process.start()
        theirs.close()  # so that the end of the process shows as the end of the pipe
        atexit.register(self.close)  # before multiprocessing's own hook, which would wait for it

    def expect(self, version: int) -> None:
        """The servers are about to get weights ``version``: answers may be drawn with them."""
        self._call("expect", version)

    def set_version(self, version: int, urls: Sequence[str] | None = None) -> None:
        """The servers at ``urls``, None for all, hold weights ``version``: ask no others."""
        self._call("set_version", version, urls)

    def take(self, version: int, *, until: Callable[[], object] = _never) -> Taken | None:
        """The groups that step ``version`` trains on; waits for them, or ``until`` is true: then
        None, and they are still to be taken."""
        return cast(Taken | None, self._call("take", version, until=until))

    def evaluate(
        self,
        version: int,
        *,
        record: Path | None = None,
        until: Callable[[], object] = _never,
    ) -> EvaluationResult | None:
        """Answer the held-out prompts with the present weights; None if there are none, or if
        ``until`` became true before. ``record``: the file to put the answers into, which do not
        come with the result."""
        result = self._call("evaluate", version, record, until=until)
        return cast(EvaluationResult | None, result)

    def state(self) -> bytes:
        """Prompt position, groups waiting and prompts in flight, for a checkpoint."""
        return cast(bytes, self._call("state"))

    def close(self) -> None:
        """End the process; safe to call again."""
        atexit.unregister(self.close)
        self._connection.close()
        self._process.join(GRACE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def ready(self) -> None:
        """Wait until the parts are built. Raises what building them raised."""
        self._call("ready")

    def _call(self, verb: str, *arguments: Any, until: Callable[[], object] = _never) -> Any:
        """``verb``'s result; None if ``until`` became true before it was there."""
        self._send(verb, *arguments)
        while True:
            if until():
                until = _never
                self._send(GIVE_UP)
            if not self._anything():
                continue
            kind, content = self._receive()
            if kind == "result":
                return content
            if kind == "error":
                self._require_servers(wait=DEATH_SECONDS)
                raise_here(*content)
            elif kind == "progress":
                self.heard(content)
            else:
                log.warning(content)  # a message of its own, not one of many

    def _send(self, verb: str, *arguments: Any) -> None:
        with suppress(BrokenPipeError):  # ended already: its last words are still in the pipe
            self._connection.send((verb, arguments))

    def _anything(self) -> bool:
        """Whether there is something to receive, be it the end, after a moment at most."""
        if self._connection.poll(POLL_SECONDS):
            return True
        if not self._process.is_alive():
            return True
        self._require_servers()
        return False

    def _require_servers(self, wait: float = 0.0) -> None:
        """Raise ServerError if all have ended."""
        if len(ended := self._ended(wait)) == self._servers:
            raise ServerError(next(iter(ended.values())))

    def _receive(self) -> tuple[str, Any]:
        try:
            return cast(tuple[str, Any], self._connection.recv())
        except (EOFError, OSError) as end:
            self._process.join(GRACE_SECONDS)
            raise RuntimeError(
                f"the collector process ended with exit code {self._process.exitcode}; a negative "
                "one is a signal (-9: perhaps out of memory); see collector.log"
            ) from end


class _Worker:
    """The verbs, on the other side of the pipe."""

    def __init__(
        self,
        config: Config,
        urls: Sequence[str],
        parts: Parts,
        state: bytes | None,
        identity: str | None,
    ) -> None:
        rollout, choice = config.rollout, config.algo.sampling
        self._evaluation, self._reward = config.evaluation, config.reward
        self.progress: Callable[[], str] = str  # of the verb at work
        self._parts = parts
        self._engine = SGLangEngine(
            urls,
            max_concurrency=rollout.max_concurrency,
            request_timeout=rollout.request_timeout,
            retries=rollout.retries,
            lost_after=rollout.servers.lost_after,
            identity=identity,
            vocab_size=parts.vocab_size,
        )
        self._sampling = Sampling(
            n=rollout.group_size,
            temperature=rollout.temperature,
            max_new_tokens=rollout.max_new_tokens,
            stop_token_ids=(*parts.stop_token_ids, *rollout.stop_token_ids),
            routes=parts.routes,
        )
        self._answers = Decoding(self._engine, parts.decode, parts.stop_token_ids)
        self._scoring = Scoring(
            parts.scorer, config.reward, what="a step", answers=rollout.batch_size
        )
        restored = None if state is None else cast(StreamState, pickle.loads(state))
        self._stream = Stream(
            self._answers,
            parts.prompts,
            self._scoring,
            self._sampling,
            batch=rollout.prompts_per_step,
            max_staleness=rollout.max_staleness,
            last=config.run.steps,
            select=(lambda group: selects(group.rewards, choice)) if choice.dynamic else None,
            limit=choice.limit,
            state=restored,
            made_by=(config.reward.kind, config.reward.function, choice),
        )

    async def ready(self) -> None:
        """Answers once it can: see ``Collector.ready``."""

    async def expect(self, version: int) -> None:
        self._engine.expect(version)

    async def set_version(self, version: int, urls: Sequence[str] | None) -> None:
        self._engine.set_version(version, urls)
        log.info("the servers hold weights of version %d: %s", version, self._engine.urls)
        self._stream.set_version(version)

    async def take(self, version: int) -> Taken:
        self.progress = self._stream.progress
        began = time.monotonic()
        taken = await self._stream.take(version)
        taken = replace(taken, grading=self._scoring.numbers(f"step {version + 1}"))
        log.info(
            "step %d: %d groups after %.1f s (%d dropped)",
            version + 1, len(taken.groups), time.monotonic() - began, len(taken.dropped),
        )  # fmt: skip
        return taken

    async def evaluate(self, version: int, record: Path | None) -> EvaluationResult | None:
        prompts = self._parts.held_out[: self._evaluation.prompts]
        if not prompts:
            return None
        answered = Counter[str]()
        self.progress = lambda: f"{answered.total()} of {len(prompts)} prompts"
        sampling = Sampling(
            n=self._evaluation.samples,
            temperature=self._evaluation.temperature,
            max_new_tokens=self._sampling.max_new_tokens,
            stop_token_ids=self._sampling.stop_token_ids,
        )
        answers = len(prompts) * sampling.n
        scoring = Scoring(self._parts.scorer, self._reward, what="an evaluation", answers=answers)
        result = await evaluate(
            self._answers,
            prompts,
            scoring.graded,
            sampling,
            version=version,
            pass_reward=self._evaluation.pass_reward,
            answered=answered,
            count_failed=self._reward.on_error is OnError.zero,
        )
        log.info("evaluation after step %d: pass rate %.3f", version, result.pass_rate)
        if record is not None:
            from peergrad.recording import write_groups  # Arrow, which runs do not need here

            await asyncio.to_thread(write_groups, record, result.groups)
        name = "the evaluation" if record else f"evaluation after step {version}"
        return replace(result, grading=scoring.numbers(name), groups=())

    async def state(self) -> bytes:
        return pickle.dumps(self._stream.state())

    async def aclose(self) -> None:
        await self._stream.aclose()
        await self._engine.aclose()


def _run(
    connection: Connection,
    parent: int,
    config: Config,
    urls: Sequence[str],
    build: Build,
    state: bytes | None,
    identity: str | None,
    open_log: Callable[[], object],
) -> None:
    """The process: build the parts, answer until the pipe ends.

    An error while building is sent unasked, and so answers the first request.
    """
    die_with_parent(parent)
    for number in STOP_SIGNALS:  # sent to the whole process group: the trainer sees to them
        signal.signal(number, lambda *_: None)
    outbox = Outbox(connection)
    try:
        open_log()
        logging.getLogger().addHandler(outbox)
        parts = build(config, partial(outbox.put, "progress"))
        try:
            asyncio.run(_serve(connection, outbox, config, urls, parts, state, identity))
        finally:
            parts.scorer.close()
    except Exception as error:
        outbox.put_error(error)


async def _serve(
    connection: Connection,
    outbox: Outbox,
    config: Config,
    urls: Sequence[str],
    parts: Parts,
    state: bytes | None,
    identity: str | None,
) -> None:
    """Answer one request after the other. The trainer waits for each answer, so that what comes
    before it can only be the end of the pipe, of a trainer interrupted while it waited, or
    ``GIVE_UP``. That has no answer of its own: it may come when its request has just been answered.
    """
    worker = _Worker(config, urls, parts, state, identity)
    incoming = _next_request(connection)
    while request := await incoming:
        verb, arguments = request
        incoming = _next_request(connection)
        if verb == GIVE_UP:
            continue
        worker.progress = str
        call = asyncio.create_task(getattr(worker, verb)(*arguments))
        while not await _first(call, incoming):
            outbox.put("progress", worker.progress())
        if not call.done():
            call.cancel()
            await asyncio.wait([call])
            if incoming.result() is None:
                break
            incoming = _next_request(connection)
            outbox.put("result", None)
        elif error := call.exception():
            outbox.put_error(error)
        else:
            outbox.put("result", call.result())
    await worker.aclose()


async def _first(*tasks: asyncio.Task[Any]) -> set[asyncio.Task[Any]]:
    """Which of ``tasks`` are done, after one is or a moment has passed."""
    done, _ = await asyncio.wait(
        tasks, timeout=PROGRESS_SECONDS, return_when=asyncio.FIRST_COMPLETED
    )
    return done


def _next_request(connection: Connection) -> asyncio.Task[tuple[str, tuple[Any, ...]] | None]:
    """The next (verb, arguments), None at the end of the pipe."""

    def receive() -> tuple[str, tuple[Any, ...]] | None:
        try:
            return cast(tuple[str, tuple[Any, ...]], connection.recv())
        except (EOFError, OSError):
            return None

    return asyncio.create_task(asyncio.to_thread(receive))
