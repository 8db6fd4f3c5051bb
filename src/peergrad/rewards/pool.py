"""``RewardPool``: rewards for many rollouts at a time."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from peergrad.config import RewardConfig, RewardKind
from peergrad.data import Prompt, Rollout
from peergrad.grades import Failure, Grade
from peergrad.rewards import arithmetic, gsm8k
from peergrad.rewards.function import RewardFunction, evaluate
from peergrad.rewards.process import RewardProcess

_BUILT_IN: dict[RewardKind, RewardFunction] = {
    RewardKind.arithmetic: arithmetic.reward,
    RewardKind.gsm8k: gsm8k.reward,
}
MATHEMATICS = "peergrad.rewards.mathematics:reward"
"""In processes, as a user's function: simplifying what a model writes may take for ever."""


class RewardPool:
    """Scores rollouts by ``config``; create it before anything that costs time to start.

    ``arithmetic`` and ``gsm8k`` are string comparisons of microseconds, linear in the text: they
    run where they are called, because sending a rollout to a process would cost more. All others
    run in ``config.workers`` processes, each reward within ``config.timeout`` seconds of its start
    there (the first of a process may take a minute); a process that takes longer is killed and
    replaced.

    Example:
        >>> with RewardPool(RewardConfig(kind=RewardKind.gsm8k)) as pool:
        ...     grade = await pool.score(prompt, rollout)
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._closed = False
        self._built_in = _BUILT_IN.get(config.kind)
        self._idle: SimpleQueue[RewardProcess] = SimpleQueue()
        self._processes: list[RewardProcess] = []
        if self._built_in is None:
            self._start_processes()

    def _start_processes(self) -> None:
        """All at once, and from the pool's own threads: a process ends with its starting thread."""
        count, function = self._config.workers, self._config.function or MATHEMATICS
        self._processes = [RewardProcess(function) for _ in range(count)]
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="reward")
        try:
            list(self._threads.map(RewardProcess.start, self._processes))
        except BaseException:
            self.close()
            raise
        for process in self._processes:
            self._idle.put(process)

    async def score(self, prompt: Prompt, rollout: Rollout) -> Grade | Failure:
        """The rollout's grade, or why it has none."""
        if self._built_in is not None:
            return evaluate(self._built_in, prompt, rollout)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._in_process, prompt, rollout)

    def _in_process(self, prompt: Prompt, rollout: Rollout) -> Grade | Failure:
        process = self._idle.get()  # never waits: there are as many processes as threads
        try:
            result = process.score(prompt, rollout, self._config.timeout)
        finally:
            self._idle.put(process)
        if self._closed:
            raise RuntimeError("the reward pool was closed while a reward was running")
        return result

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
