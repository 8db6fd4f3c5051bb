"""``RewardPool``: rewards for many rollouts at a time, and what happens when one fails."""

import asyncio
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from peergrad.config import OnError, RewardConfig, RewardKind
from peergrad.data import Prompt, Rollout
from peergrad.rewards import arithmetic, gsm8k
from peergrad.rewards.function import Failure, RewardFunction, evaluate
from peergrad.rewards.process import RewardProcess

logger = logging.getLogger(__name__)

_BUILT_IN: dict[RewardKind, RewardFunction] = {
    RewardKind.arithmetic: arithmetic.reward,
    RewardKind.gsm8k: gsm8k.reward,
}


class RewardError(RuntimeError):
    """A reward failed and reward.on_error is stop."""


class RewardPool:
    """Scores rollouts by ``config``; create it before anything that costs time to start.

    The built-in rewards are string comparisons of microseconds, linear in the text: they run where
    they are called, because sending a rollout to a process would cost more. A user's function runs
    in ``config.workers`` processes, each reward within ``config.timeout`` seconds of its start
    there; a process that takes longer is killed and replaced.

    ``failures`` counts by kind: ``error`` (it raised), ``value`` (no finite number), ``timeout``,
    ``crash`` (its process ended).

    Example:
        >>> with RewardPool(RewardConfig(kind=RewardKind.gsm8k)) as pool:
        ...     reward = await pool.score(prompt, rollout)
    """

    def __init__(self, config: RewardConfig) -> None:
        self.failures: Counter[str] = Counter()
        self._config = config
        self._closed = False
        self._built_in = _BUILT_IN.get(config.kind)
        self._idle: SimpleQueue[RewardProcess] = SimpleQueue()
        self._processes: list[RewardProcess] = []
        if self._built_in is None:
            self._start_processes()

    def _start_processes(self) -> None:
        """All at once, and from the pool's own threads: a process ends with its starting thread."""
        count, function = self._config.workers, str(self._config.function)
        self._processes = [RewardProcess(function) for _ in range(count)]
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="reward")
        try:
            list(self._threads.map(RewardProcess.start, self._processes))
        except BaseException:
            self.close()
            raise
        for process in self._processes:
            self._idle.put(process)

    async def score(self, prompt: Prompt, rollout: Rollout) -> float:
        """The rollout's reward. A failed one is 0 and a warning, or raises RewardError."""
        if self._built_in is not None:
            result = evaluate(self._built_in, prompt, rollout)
        else:
            loop = asyncio.get_running_loop()
            result = await loop.run_in_executor(self._threads, self._in_process, prompt, rollout)
        return self._failed(result, prompt, rollout) if isinstance(result, Failure) else result

    def _in_process(self, prompt: Prompt, rollout: Rollout) -> float | Failure:
        process = self._idle.get()  # never waits: there are as many processes as threads
        try:
            result = process.score(prompt, rollout, self._config.timeout)
        finally:
            self._idle.put(process)
        if self._closed:
            raise RuntimeError("the reward pool was closed while a reward was running")
        return result

    def _failed(self, failure: Failure, prompt: Prompt, rollout: Rollout) -> float:
        self.failures[failure.kind] += 1
        message = (
            f"the reward of a rollout of {prompt.id} {failure.reason}; "
            f"the text ends {rollout.text[-80:]!r}"
        )
        if self._config.on_error is OnError.stop:
            raise RewardError(f"{message}; reward.on_error=zero would count it as 0 and go on")
        logger.warning("%s; counted as 0", message)
        return 0.0

    def close(self) -> None:
        """End the processes, even in the middle of a reward. Closing twice is fine."""
        if self._closed or not self._processes:
            return
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
        self._threads.shutdown()
        for process in self._processes:
            process.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
