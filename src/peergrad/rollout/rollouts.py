"""Where groups come from, as the training loop sees it on every rank."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor

from peergrad.data import Group
from peergrad.observing.parts import Parts
from peergrad.recording import read_groups
from peergrad.rollout.buckets import NamedTensors
from peergrad.rollout.collector import Collector
from peergrad.rollout.errors import LoadAgain
from peergrad.rollout.evaluation import EvaluationResult
from peergrad.rollout.proof import Proof
from peergrad.rollout.recorder import Recorder, missing
from peergrad.rollout.recorder import recorded as recorded
from peergrad.rollout.stream import Taken
from peergrad.rollout.sync import WeightSync

T = TypeVar("T")
LOADS = 5  # of one version, while servers come and go


class Share(Protocol):
    """Runs ``fn`` on rank 0 alone; every rank gets its result, or raises its error."""

    def __call__(self, function: Callable[[], T], /) -> T: ...


class Rollouts(Protocol):
    """Every method but ``close`` is collective: all ranks call it, in the same order.

    ``version`` is the number of training steps done; so is ``step``.
    """

    def load_weights(self, weights: Callable[[], NamedTensors], version: int) -> Proof | None:
        """Generate with the ``weights`` from now on; they are asked for again if a server is lost
        on the way."""
        ...

    def take(self, step: int) -> Taken | None:
        """The groups that the step after ``step`` steps trains on; None if the run is to stop while
        it waits for them: they are then part of ``state``."""
        ...

    def evaluate(self, version: int) -> EvaluationResult | None:
        """Answer the held-out prompts; None if there is no engine, nothing is held out, or the run
        is to stop."""
        ...

    def dump(self, groups: Sequence[Group], step: int) -> Path:
        """Record groups of the step after ``step`` steps; the file that they are in, on disk."""
        ...

    def state(self) -> bytes | None:
        """What a checkpoint must hold to go on with the same prompts; None if there is nothing.

        Returns when every step so far is recorded on the disk, so that a checkpoint never knows of
        a step whose recording was lost."""
        ...

    def close(self) -> None: ...


class LiveRollouts:
    """Groups from an engine. Global rank 0 has the collector and the weight sync, others None."""

    def __init__(
        self,
        share: Share,
        *,
        collector: Collector | None,
        sync: WeightSync | None,
        run_dir: Path,
        dump: bool,
        stop: Callable[[], object] = lambda: None,
    ) -> None:
        """``dump``: record every step's groups under ``run_dir``, beside the training. ``stop``:
        asked on rank 0 while it waits for groups or an evaluation, and true once they are not
        wanted."""
        self._share = share
        self._collector = collector
        self._sync = sync
        self._recorder = Recorder(run_dir)
        self._dump = dump
        self._stop = stop

    def load_weights(self, weights: Callable[[], NamedTensors], version: int) -> Proof | None:
        """See ``Rollouts``."""
        for _ in range(LOADS):
            result = self._load(iter(weights()), version)
            if not isinstance(result, LoadAgain):
                return result
            again = result
        raise again

    def _load(self, stream: Iterator[tuple[str, Tensor]], version: int) -> Proof | LoadAgain | None:
        """Each rank drains ``stream``, whose every item is a collective operation.

        So rank 0 goes on draining when a server fails, and only then raises, with all the others.
        """
        result: Proof | Exception | None = None
        if self._sync is not None:
            try:
                # Before: requests in flight may end before ``load`` does.
                self._on_rank_zero().expect(version)
                result = self._sync.load(stream, version)
            except Exception as error:
                result = error
        deque(stream, maxlen=0)

        def finish() -> Proof | LoadAgain | None:
            if isinstance(result, LoadAgain):
                return result
            if isinstance(result, Exception):
                raise result
            assert self._sync is not None
            self._on_rank_zero().set_version(version, self._sync.urls)
            return result

        return self._share(finish)

    def take(self, step: int) -> Taken | None:
        parts = Parts()

        def take() -> Taken | None:
            with parts.time("wait"):
                taken = self._on_rank_zero().take(step, until=self._stop)
            if taken is None:
                return None
            if self._dump:
                with parts.time("record"):
                    self._recorder.put(taken.groups, step)
            return replace(taken, grading={**taken.grading, **parts.row("rollout")})

        return self._share(take)

    def dump(self, groups: Sequence[Group], step: int) -> Path:
        def dump() -> Path:
            path = self._recorder.put(groups, step)
            self._recorder.wait()
            return path

        return self._share(dump)

    def evaluate(self, version: int) -> EvaluationResult | None:
        return self._share(lambda: self._on_rank_zero().evaluate(version, until=self._stop))

    def state(self) -> bytes | None:
        def state() -> bytes:
            self._recorder.wait()
            return self._on_rank_zero().state()

        return self._share(state)

    def close(self) -> None:
        self._recorder.close()
        if self._collector is not None:
            self._collector.close()
        if self._sync is not None:
            self._sync.close()

    def _on_rank_zero(self) -> Collector:
        assert self._collector is not None, "share must run this on the rank with the collector"
        return self._collector


class ReplayRollouts:
    """The recorded groups of an earlier run, without an engine; each rank reads them itself."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def load_weights(self, weights: Callable[[], NamedTensors], version: int) -> None:
        """Nobody would use them: nothing is gathered."""

    def take(self, step: int) -> Taken:
        """As recorded: what was dropped then is not known, and nothing is dropped now."""
        try:
            return Taken(read_groups(recorded(self._run_dir, step)))
        except FileNotFoundError as error:
            rule, remedy = missing(self._run_dir, step)
            raise ValueError(
                f"rollout.replay = {str(self._run_dir)!r}: {rule}; lower run.steps, or {remedy}"
            ) from error

    def evaluate(self, version: int) -> None:
        return None

    def dump(self, groups: Sequence[Group], step: int) -> Path:
        return recorded(self._run_dir, step)

    def state(self) -> None:
        return None

    def close(self) -> None:
        pass
