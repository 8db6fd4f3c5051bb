"""The program: read the command line, check, run.

    python -m peergrad.main experiment=quickstart_cpu optim.lr=5e-4
    python -m peergrad.launch --nproc-per-node 4 parallel.tensor=2 parallel.pipeline=2 ...

``--cfg`` prints the composed configuration and stops, ``--objective`` the objective; ``--check``
checks all that needs no start, and says what would run, or with ``--cfg`` the configuration.
"""

import gc
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peergrad.algo.explain import explain
from peergrad.algo.knobs import refuse as refuse_knobs
from peergrad.checks import Inputs, check, check_inputs, plan, settled, summary, warnings_of
from peergrad.checks.place import check_folder, resumed_step
from peergrad.config import Config
from peergrad.early import start_servers
from peergrad.observing.curve import draw_curve
from peergrad.observing.metrics import read_metrics
from peergrad.observing.screen import Screen
from peergrad.running.commandline import parse
from peergrad.running.compose import chosen_keys, compose_config
from peergrad.running.ending import FINISHED, Ending, refuse
from peergrad.running.environment import prepare
from peergrad.running.lifetime import die_with_parent
from peergrad.running.lock import FolderLock
from peergrad.running.logs import log_to
from peergrad.running.place import Place, find_place, require_launcher
from peergrad.running.rundir import RunDir, check_run_dir
from peergrad.running.stopping import stop_before
from peergrad.storage import writing

if TYPE_CHECKING:
    from peergrad.rollout.servers import ManagedServers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """What the user has chosen: the configuration, its YAML, and what both are composed of."""

    config: Config
    text: str
    overrides: Sequence[str]

    def in_steps(self, steps: int | None) -> "Chosen":
        """The same run with ``steps``, if there are any, in place of run.epochs."""
        if steps is None:
            return self
        overrides = [*self.overrides, f"run.steps={steps}", "run.epochs=null"]
        return Chosen(*compose_config(overrides), overrides)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as configured by ``arguments`` (default: the command line); the exit status."""
    place = Place(0, 1)
    try:
        place = find_place()
        options = parse(sys.argv[1:] if arguments is None else arguments)
        only_shown = (options.cfg or options.objective) and not options.check
        config, text = compose_config(options.overrides, allow_missing=only_shown)
        if only_shown:
            print(text if options.cfg else explain(config), end="")
            return FINISHED
        refuse_knobs(config, chosen_keys(options.overrides))
        check(config, world=place.world)
        chosen = Chosen(settled(config), text, options.overrides)
        if place.rank == 0:
            check_folder(config)
        directory = check_run_dir(config.run)
        stop = stop_before(config.run.until, config.checkpoint.before)
        if not options.check:
            require_launcher(place)
    except (ValueError, OSError) as error:
        return refuse(error, place)
    ending = Ending(place)
    ending.stop = stop
    if not options.check:
        ending.how_to_resume = directory.how_to_resume
    with ending.signals():
        try:
            if not options.check:
                run(chosen, directory, place, ending)
            elif place.rank == 0:
                found = check_all(chosen, directory, place)
                print(text if options.cfg else found, end="")
        except BaseException as error:
            return ending.end(error)
    return FINISHED


def check_all(chosen: Chosen, directory: RunDir, place: Place) -> str:
    """What will run, in some lines. Raises ValueError for what is wrong with it."""
    from peergrad.rollout.servers import check_args

    config = chosen.config
    # Beside each other: the one waits for a process of its own.
    with (
        Screen(config.run.steps) as screen,
        screen.waiting("the checks"),
        ThreadPoolExecutor(1) as beside,
    ):
        arguments = beside.submit(check_args, config.rollout.servers.args)
        inputs = read_inputs(config, directory, screen, wait=False)
        arguments.result()
    return summary(chosen.in_steps(inputs.steps).config, place.world, inputs)


def read_inputs(config: Config, directory: RunDir, screen: Screen, *, wait: bool) -> Inputs:
    """What the run reads and whom it asks, read and asked once; ``wait``: for servers that are not
    there yet. ValueError for what is wrong."""
    from peergrad.rollout.probe import probe

    inputs = check_inputs(config, heard=screen.detail)
    probe(config, directory.known_identity, waiting=screen.waiting if wait else None)
    return inputs


def run(chosen: Chosen, directory: RunDir, place: Place, ending: Ending) -> None:
    """The run, from its folder to its last line."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a killed torchrun would leave its ranks training
        die_with_parent(os.getppid())
    prepare(chosen.config)
    # Their absence is no news: the log says which layer spec is used.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*not installed")
    began, config = time.monotonic(), chosen.config
    with ExitStack() as outer:
        shown = place.rank == 0 and config.logger.console
        screen = outer.enter_context(Screen(config.run.steps, shown=shown))
        with ExitStack() as stack, ending.noted():
            attempt = servers = None
            if place.rank == 0:
                config, attempt = open_folder(chosen, directory, place, ending, screen, outer)
                servers = start_servers(config, attempt, stack)
            train(config, directory, attempt, servers, ending, screen, stack)
        screen.stop()
        if place.rank == 0:
            finish(config, directory, time.monotonic() - began)


def open_folder(
    chosen: Chosen,
    directory: RunDir,
    place: Place,
    ending: Ending,
    screen: Screen,
    stack: ExitStack,
) -> tuple[Config, Path]:
    """Hold the run's folder from here on, open the log of this attempt, read what the run reads and
    say what will run; the configuration with all that this tells, and the folder of the log."""
    config = chosen.config
    what = f"run.name = {config.run.name!r}"
    with screen.waiting("the run's folder"), writing("run folder", directory.path):
        stack.enter_context(FolderLock(directory.lock, what, heard=screen.detail))
        check_run_dir(config.run)  # again: another start may have come and gone in between
        attempt = directory.new_attempt()
        ending.log = log_to(attempt, "rank_00000", screen=True)
    screen.say(f"run            {directory.path}")
    screen.say(f"log            {attempt}")
    with screen.waiting("what the run reads to be checked", announce=True):
        inputs = read_inputs(config, directory, screen, wait=True)
    chosen = chosen.in_steps(inputs.steps)
    config = chosen.config
    screen.steps = config.run.steps
    for line in plan(config, place.world, inputs).splitlines():
        screen.say(line)
    for warning in warnings_of(config, inputs):
        log.warning("%s", warning)
    with writing("run folder", directory.path):
        if (resumed_step(config) or 0) < config.run.steps:
            directory.done.unlink(missing_ok=True)  # of a shorter run that goes on
        for path in (directory.config, attempt / "config.yaml"):
            path.write_text(chosen.text)
        (attempt / "objective.txt").write_text(explain(config))
    return config, attempt


def train(
    config: Config,
    directory: RunDir,
    attempt: Path | None,
    servers: "ManagedServers | None",
    ending: Ending,
    screen: Screen,
    stack: ExitStack,
) -> None:
    """Load the libraries, build the parts, train."""
    with screen.waiting("PyTorch, Megatron and SGLang to load", announce=True):
        gc.disable()  # what is imported stays: looking through it for garbage takes a second
        # Imported here: an error of the configuration should not have to wait for Megatron.
        from peergrad.parallel.device import without_compiler, without_wandb

        with without_compiler(), without_wandb():
            from peergrad.build import Build
        gc.enable()
    Build(config, directory, attempt, servers, screen, stack).train(ending)


def finish(config: Config, directory: RunDir, seconds: float) -> None:
    """Mark the run as done, draw the curve, say where everything is."""
    with writing("run folder", directory.path):
        directory.done.write_text(f"{config.run.steps} steps\n")
    rows = read_metrics(directory.metrics)
    found = (row.get("pass@1") for row in rows if row["kind"] == "eval")
    passes = [rate for rate in found if isinstance(rate, float)]
    try:
        draw_curve(directory.metrics, directory.curve)
    except Exception as error:  # a picture is not worth a finished run
        log.warning("%s was not drawn (%s: %s)", directory.curve, type(error).__name__, error)
    print(f"HF checkpoint  {directory.hf}")
    print(f"metrics        {directory.metrics}")
    print(f"curve          {directory.curve}")
    result = f"pass@1 {passes[0]:.3f} -> {passes[-1]:.3f}" if passes else "not evaluated"
    print(f"{result} in {config.run.steps} steps, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
