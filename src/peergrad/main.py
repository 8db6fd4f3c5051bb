"""The program: compose the configuration, build the parts, train, export.

    python -m peergrad.main experiment=quickstart_cpu optim.lr=5e-4
    torchrun --nproc-per-node 4 -m peergrad.main parallel.tensor=2 parallel.pipeline=2 ...

``--cfg`` prints the composed configuration and stops; ``--check`` only says what is wrong with it.
The only file that knows all parts.
"""

import argparse
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from threading import Event
from types import FrameType
from typing import TYPE_CHECKING, Any

from peergrad.algo.explain import explain
from peergrad.algo.knobs import refuse
from peergrad.checks import check, check_inputs, summary
from peergrad.config import Config, ServerMode
from peergrad.observing.console import ConsoleSink
from peergrad.observing.metrics import JsonLines, Metrics, Sink, TensorBoard, WandB, read_metrics
from peergrad.running.compose import chosen_keys, compose_config
from peergrad.running.lifetime import die_with_parent
from peergrad.running.rundir import RunDir, check_run_dir, log_to

if TYPE_CHECKING:
    from peergrad.algo.grading import AlgoState
    from peergrad.parallel.groups import Groups
    from peergrad.rollout.collector import Parts
    from peergrad.rollout.rollouts import Rollouts

log = logging.getLogger(__name__)

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as configured by ``arguments`` (default: the command line); the exit status."""
    parser = argparse.ArgumentParser(prog="peergrad", description=__doc__, add_help=True)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides: group=option or key=value")
    parser.add_argument("--cfg", action="store_true", help="print the configuration and stop")
    parser.add_argument("--check", action="store_true", help="check everything and stop")
    options = parser.parse_args(arguments)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        config, text = compose_config(options.overrides)
        if options.cfg:
            print(text, end="")
            return 0
        refuse(config, chosen_keys(options.overrides))
        check(config, world=world)
        directory = check_run_dir(config.run)
        if options.check and rank == 0:
            print(summary(config, world, check_inputs(config)), end="")
    except ValueError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    if options.check:
        return 0
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a killed torchrun would leave its ranks training
        die_with_parent(os.getppid())
    interrupted = interrupt_once()
    try:
        run(config, text, directory)
    except BaseException:
        if not interrupted.is_set():
            raise
        log.info("interrupted here", exc_info=True)  # or a rank that left first broke a collective
        if rank == 0:
            print("interrupted; run.resume=true continues from the newest checkpoint", flush=True)
        return INTERRUPTED
    return 0


def interrupt_once() -> Event:
    """Turn the first SIGINT or SIGTERM into KeyboardInterrupt and ignore the rest: torchrun repeats
    them, and one that arrived during the clean-up would leave servers behind. The event tells
    whether there was one."""
    interrupted = Event()

    def handler(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        raise KeyboardInterrupt

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, handler)
    return interrupted


def run(config: Config, text: str, directory: RunDir) -> None:
    """Build every part, train, export. Parts are closed in reverse order whatever happens."""
    # Their absence is no news: the log says which layer spec is used.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*not installed")
    # Imported here: a configuration error should not have to wait for Megatron.
    from peergrad.loop import train
    from peergrad.parallel.checkpoint import Checkpoints
    from peergrad.parallel.groups import close_groups, init_groups
    from peergrad.parallel.policy import Policy, Scorer

    start_time = time.monotonic()
    with ExitStack() as stack:
        stack.callback(close_groups)
        groups = init_groups(config.parallel, seed=config.run.seed)
        attempt = groups.share(directory.new_attempt)
        log_to(attempt, f"rank_{groups.rank:05d}", screen=groups.rank == 0)
        files = {directory.config: text, attempt / "config.yaml": text}
        files[attempt / "objective.txt"] = objective = explain(config)
        groups.share(lambda: [path.write_text(content) for path, content in files.items()])
        if groups.rank == 0:
            print(objective, flush=True)
        policy = Policy(config, groups)
        checkpoints = Checkpoints(directory.checkpoints, config.checkpoint, groups)
        start = checkpoints.restore(policy) if config.run.resume else 0
        state = restore_state(config, checkpoints.algo_state(start))
        reference = None
        if config.algo.kl.coef > 0:
            path = config.model.reference or config.model.path
            weights = None if config.model.reference else config.model.weights
            reference = Scorer(config, groups, path=path, weights=weights)
            if state.reference_step:
                checkpoints.restore_reference(reference, start)
        rollouts = build_rollouts(
            config,
            directory,
            attempt,
            groups,
            checkpoints.collector_state(start),
            stack,
            vocab=policy.shape.vocab,
        )
        sinks = on_rank_zero(groups, lambda: build_sinks(config, directory, start))
        metrics = Metrics(sinks or [], directory.path if groups.rank == 0 else None)
        stack.callback(metrics.close)
        train(
            config,
            start=start,
            state=state,
            rollouts=rollouts,
            policy=policy,
            reference=reference,
            checkpoints=checkpoints,
            metrics=metrics,
        )
        policy.export(directory.hf, companions=Path(config.model.path))
    if groups.rank == 0:
        finish(config, directory, time.monotonic() - start_time)


def restore_state(config: Config, saved: dict[str, object] | None) -> "AlgoState":
    """What the objective remembers: of the checkpoint, or as configured. A KL coefficient that
    nothing adapts is the configuration's, also after a resume, and so is one that starts anew."""
    from peergrad.algo.grading import AlgoState

    state = AlgoState(config.algo.kl.coef) if saved is None else AlgoState.from_json(saved)
    if config.algo.kl.coef == 0:
        return replace(state, kl_coef=0.0, reference_step=0)  # no reference is loaded or saved
    adapts = config.algo.kl.target is not None and state.kl_coef > 0
    return state if adapts else replace(state, kl_coef=config.algo.kl.coef)


def build_sinks(config: Config, directory: RunDir, start: int) -> list[Sink]:
    sinks: list[Sink] = [JsonLines(directory.metrics, start)]
    if config.logger.tensorboard:
        sinks.append(TensorBoard(directory.tensorboard, start))
    if config.logger.wandb != "off":
        sinks.append(WandB(config.logger, directory.path, asdict(config)))
    if config.logger.console:
        sinks.append(ConsoleSink(config.run.steps))
    return sinks


def build_rollouts(
    config: Config,
    directory: RunDir,
    attempt: Path,
    groups: "Groups",
    state: bytes | None,
    stack: ExitStack,
    *,
    vocab: int,
) -> "Rollouts":
    """Recorded groups, or on rank 0 servers, collector and weight sync, closed by ``stack``."""
    from peergrad.rollout.collector import Collector
    from peergrad.rollout.rollouts import LiveRollouts, ReplayRollouts
    from peergrad.rollout.servers import ManagedServers
    from peergrad.rollout.sync import WeightSync

    if config.rollout.replay is not None:
        return ReplayRollouts(Path(config.rollout.replay))

    def start_engine() -> tuple[Collector, WeightSync]:
        servers = config.rollout.servers
        urls = servers.urls
        if servers.mode is ServerMode.managed:
            managed = ManagedServers(
                servers,
                model_path=config.model.path,
                dtype=config.model.dtype,
                log_dir=attempt,
                seed=config.run.seed,
            )
            urls = stack.enter_context(managed).urls
        collector = Collector(config, urls, partial(collector_parts, attempt=attempt), state=state)
        stack.callback(collector.close)
        sync = WeightSync(
            urls,
            vocab_size=vocab,
            bucket_mb=config.rollout.bucket_mb,
            proof=config.rollout.proof,
        )
        stack.callback(sync.close)
        return collector, sync

    collector, sync = on_rank_zero(groups, start_engine) or (None, None)
    return LiveRollouts(
        groups.share,
        collector=collector,
        sync=sync,
        run_dir=directory.path,
        dump=config.rollout.dump,
    )


def on_rank_zero(groups: "Groups", function: Callable[[], Any]) -> Any:
    """``function()`` on rank 0, None elsewhere; every rank waits for it and fails if it does."""
    kept: list[Any] = []
    groups.share(lambda: kept.append(function()))
    return kept[0] if kept else None


def collector_parts(config: Config, *, attempt: Path) -> "Parts":
    """What the collector process works with; runs in that process."""
    from transformers import AutoTokenizer

    from peergrad.prompts import Prompts, load_prompts
    from peergrad.rewards import RewardPool
    from peergrad.rollout.collector import Parts

    log_to(attempt, "collector", screen=True)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    data, seed = config.data, config.run.seed
    records = load_prompts(data, data.source, split="train", tokenizer=tokenizer, seed=seed)
    held_out = []
    if data.held_out is not None:
        # A seed of its own kind: the held-out order must not change with run.seed.
        held_out = load_prompts(data, data.held_out, split="test", tokenizer=tokenizer, seed=0)
    return Parts(
        prompts=Prompts(records, shuffle=data.shuffle, seed=seed),
        held_out=held_out,
        scorer=RewardPool(config.reward),
        stop_token_ids=(tokenizer.eos_token_id,),
    )


def finish(config: Config, directory: RunDir, seconds: float) -> None:
    """Draw the curve, mark the run as done, say where everything is."""
    from peergrad.observing.curve import draw_curve

    draw_curve(directory.metrics, directory.curve)
    rows = read_metrics(directory.metrics)
    passes = [row["pass@1"] for row in rows if row["kind"] == "eval"]
    directory.done.write_text(f"{config.run.steps} steps\n")
    print(f"HF checkpoint  {directory.hf}")
    print(f"metrics        {directory.metrics}")
    print(f"curve          {directory.curve}")
    result = f"pass@1 {passes[0]:.3f} -> {passes[-1]:.3f}" if passes else "not evaluated"
    print(f"{result} in {config.run.steps} steps, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
