"""The parts of a run, put together: the only file that knows them all."""

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from peergrad.algo.grading import AlgoState
from peergrad.config import Config, require
from peergrad.inputs import collector_parts, routes_of
from peergrad.loop import train
from peergrad.observing.curve import CurveSink
from peergrad.observing.metrics import JsonLines, Metrics, Sink, TensorBoard, WandB
from peergrad.observing.screen import Screen
from peergrad.parallel.checkpoint import Checkpoints
from peergrad.parallel.job import Job
from peergrad.parallel.mesh import Mesh, close_mesh, init_mesh
from peergrad.parallel.policy import Policy, Scorer
from peergrad.rollout.collector import Collector
from peergrad.rollout.errors import Ended, ServerError, none_ended
from peergrad.rollout.rollouts import LiveRollouts, ReplayRollouts, Rollouts
from peergrad.rollout.servers import ManagedServers
from peergrad.rollout.sync import WeightSync
from peergrad.running.ending import Ending
from peergrad.running.logs import log_to
from peergrad.running.rundir import RunDir
from peergrad.stages import sync_weights

log = logging.getLogger(__name__)


class Build:
    """Builds every part, trains, exports; ``stack`` closes the parts in reverse order."""

    def __init__(
        self,
        config: Config,
        directory: RunDir,
        attempt: Path | None,
        servers: ManagedServers | None,
        screen: Screen,
        stack: ExitStack,
    ) -> None:
        """On rank 0 ``attempt`` is the log folder of this start, and ``servers`` are those of our
        own, if there are any, that have been started."""
        self.config, self.directory, self.attempt = config, directory, attempt
        self.servers = servers
        self.screen, self.stack = screen, stack
        self.times = {"start/libraries": _age()}

    def train(self, ending: Ending) -> None:
        """The whole run on this rank."""
        mesh = self.join(ending)
        # As rank 0 has it, which alone has read what run.epochs depends on.
        self.config = config = mesh.share(lambda: self.config)
        last = config.run.steps
        policy, checkpoints, start = self.load_policy(mesh)
        state = restore_state(config, checkpoints.algo_state(start))
        reference = self.load_reference(mesh, checkpoints, state, start)
        rollouts = self.start_rollouts(
            mesh, checkpoints.collector_state(start), policy, ending.stop.reason
        )
        metrics = self.start_metrics(mesh, start)
        with self.stage("sync", "the first weight sync"):
            sync_weights(config, rollouts, policy, version=start)
        metrics.write("start", start, self.start_row())
        gc.freeze()  # all of this stays: Megatron looks for garbage in every save
        job, stop = mesh.job, ending.stop
        stop.listen(job.ask_to_stop, job.asked_to_stop)
        train(
            config,
            start=start,
            state=state,
            rollouts=rollouts,
            policy=policy,
            reference=reference,
            checkpoints=checkpoints,
            metrics=metrics,
            stop=lambda: mesh.share(stop.between_steps),
        )
        with metrics.event("export", last):
            policy.export(self.directory.hf)

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        """A part of the start: said on the screen, its seconds kept as ``start/<name>``."""
        began = time.perf_counter()
        with self.screen.waiting(what, announce=True):
            yield
        self.times[f"start/{name}"] = time.perf_counter() - began

    def start_row(self) -> dict[str, float]:
        """Seconds from the start of this process, its imports included, and of the stages."""
        return {"time/start": _age(), **self.times}

    def join(self, ending: Ending) -> Mesh:
        """Find the other ranks, agree on the log folder, lay out the mesh."""
        parallel = self.config.parallel
        # Rank 0 comes once it has found the servers.
        minutes = parallel.timeout_minutes + self.config.rollout.servers.wait / 60
        with self.stage("join", "the other ranks"):
            job = ending.speaker = Job.connect(minutes=minutes)
            job.await_all(minutes=minutes, heard=self.screen.detail)
            self.stack.callback(close_mesh)
            mesh = init_mesh(parallel, seed=self.config.run.seed, job=job)
            self.attempt = mesh.share(lambda: self.attempt)
        attempt = self.attempt
        assert attempt is not None
        blind = [rank for rank, seen in enumerate(mesh.gather(attempt.is_dir())) if not seen]
        require(
            not blind,
            "run.root",
            self.config.run.root,
            f"is another folder on the machines of ranks {blind[:8]}",
            "put it on a disk that all machines share",
        )
        if mesh.rank > 0:
            ending.log = log_to(attempt, f"rank_{mesh.rank:05d}", screen=False)
        return mesh

    def load_policy(self, mesh: Mesh) -> tuple[Policy, Checkpoints, int]:
        """The model that learns, at the step that it goes on from."""
        config = self.config
        with self.stage("model", f"the model {config.model.path}"):
            policy = Policy(config, mesh)
        checkpoints = Checkpoints(self.directory.checkpoints, config.checkpoint, mesh)
        if not config.run.resume:
            return policy, checkpoints, 0
        with self.stage("resume", "the checkpoint to resume from"):
            start = checkpoints.restore(policy)
        if start:
            self.screen.say(f"resumed from step {start}")
        return policy, checkpoints, start

    def load_reference(
        self, mesh: Mesh, checkpoints: Checkpoints, state: AlgoState, start: int
    ) -> Scorer | None:
        """The frozen model of the KL term, if there is one."""
        model = self.config.model
        if self.config.algo.kl.coef == 0:
            return None
        with self.stage("reference", f"the reference model {model.reference or model.path}"):
            weights = None if model.reference else model.weights
            path = model.reference or model.path
            reference = Scorer(self.config, mesh, path=path, weights=weights)
            if state.reference_step:
                checkpoints.restore_reference(reference, start)
        return reference

    def start_rollouts(
        self,
        mesh: Mesh,
        state: bytes | None,
        policy: Policy,
        stop: Callable[[], str | None],
    ) -> Rollouts:
        """Recorded groups, or on rank 0 servers, collector and weight sync."""
        rollout = self.config.rollout
        if rollout.replay is not None:
            return ReplayRollouts(Path(rollout.replay))

        def start_engine() -> tuple[Collector, WeightSync]:
            managed = self.servers
            urls = managed.urls if managed else rollout.servers.urls
            identity = self.directory.identity()
            ended: Ended = managed.ended if managed else none_ended
            if managed:  # again: they end while this process still waits for nobody
                self.stack.callback(managed.stop)
            try:
                collector = self.start_collector(urls, state, identity, ended)
            except ServerError:
                if managed:
                    managed.ready()  # says better why one has ended
                raise
            if managed:
                with self.stage("servers", f"SGLang to start ({managed.log(0)})"):
                    managed.ready()
            sync = WeightSync(
                urls,
                vocab_size=policy.shape.vocab,
                bucket_mb=rollout.bucket_mb,
                proof=rollout.proof,
                identity=identity,
                takeover=rollout.servers.takeover,
                lost_after=rollout.servers.lost_after,
                ended=ended,
                routes=routes_of(self.config, policy.shape),
                serving=rollout.servers.fp8,
                scales=rollout.servers.fp8_scales,
            )
            self.stack.callback(sync.close)
            return collector, sync

        collector, sync = on_rank_zero(mesh, start_engine) or (None, None)
        rollouts = LiveRollouts(
            mesh.share,
            collector=collector,
            sync=sync,
            run_dir=self.directory.path,
            dump=rollout.dump,
            stop=stop,
        )
        self.stack.callback(rollouts.close)
        return rollouts

    def start_collector(
        self,
        urls: Sequence[str],
        state: bytes | None,
        identity: str,
        ended: Ended,
    ) -> Collector:
        """The process that gathers groups, with its prompts and rewards."""
        assert self.attempt is not None
        with self.stage("collector", "the prompts and the rewards"):
            collector = Collector(
                self.config,
                urls,
                collector_parts,
                state=state,
                identity=identity,
                ended=ended,
                # Its warnings reach the screen through this process.
                open_log=partial(log_to, self.attempt, "collector", screen=False),
            )
            self.stack.callback(collector.close)
            collector.heard = self.screen.detail
            collector.ready()
        return collector

    def start_metrics(self, mesh: Mesh, start: int) -> Metrics:
        """Where numbers go; nowhere on ranks other than 0."""
        sinks = on_rank_zero(mesh, lambda: self.sinks(start))
        folder = self.directory.path if mesh.rank == 0 else None
        metrics = Metrics(sinks or [], folder, waiting=self.screen.waiting)
        self.stack.callback(metrics.close)
        return metrics

    def sinks(self, start: int) -> list[Sink]:
        logger, directory = self.config.logger, self.directory
        sinks: list[Sink] = [JsonLines(directory.metrics, start), self.screen]
        if logger.tensorboard:
            sinks.append(TensorBoard(directory.tensorboard, start))
        if logger.wandb != "off":
            sinks.append(WandB(logger, directory.path, asdict(self.config)))
        return [*sinks, CurveSink(directory.path)]


def _age() -> float:
    """Seconds since this process began."""
    return time.time() - float(psutil.Process().create_time())


def restore_state(config: Config, saved: dict[str, object] | None) -> AlgoState:
    """What the objective remembers: of the checkpoint, or as configured. A KL coefficient that
    nothing adapts is the configuration's, also after a resume, and so is one that starts anew."""
    state = AlgoState(config.algo.kl.coef) if saved is None else AlgoState.from_json(saved)
    if config.algo.kl.coef == 0:
        return replace(state, kl_coef=0.0, reference_step=0)  # no reference is loaded or saved
    adapts = config.algo.kl.target is not None and state.kl_coef > 0
    return state if adapts else replace(state, kl_coef=config.algo.kl.coef)


def on_rank_zero(mesh: Mesh, function: Callable[[], Any]) -> Any:
    """``function()`` on rank 0, None elsewhere; every rank waits for it and fails if it does."""
    kept: list[Any] = []
    mesh.share(lambda: kept.append(function()))
    return kept[0] if kept else None
