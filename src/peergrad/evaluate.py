"""The pass rate of a model on held-out prompts, without a training.

    python -m peergrad.evaluate experiment=quickstart_cpu model.path=runs/first/hf

Servers, prompts, reward and evaluation are those of a run with the same configuration. Status 0:
finished. 1: failed on the way. 2: the configuration is wrong. 75: ended by SIGTERM or SIGUSR1; run
it again. 130: interrupted.
"""

import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peergrad.checks.place import check_writable
from peergrad.config import Config, require
from peergrad.early import start_servers
from peergrad.observing.screen import Screen
from peergrad.running.commandline import read_valued
from peergrad.running.compose import compose_config
from peergrad.running.ending import FINISHED, Ending, refuse
from peergrad.running.logs import log_to
from peergrad.running.place import Place, find_place
from peergrad.storage import replace_text, writing

if TYPE_CHECKING:
    from peergrad.rollout.evaluation import EvaluationResult

log = logging.getLogger(__name__)

HELP = """\
usage: python -m peergrad.evaluate [--out FOLDER] [--check] [group=option ...] [key=value ...]

Answers the held-out prompts with the model in model.path, grades the answers, and says how many
pass: model.path, data.held_out, evaluation.{prompts,samples,temperature,pass_reward}, reward and
rollout.{max_new_tokens,stop_token_ids,servers} of a run's configuration. The overrides may be all
those of the run; data.source is not read.

options
  --out FOLDER      a new folder for evaluation.json, answers.parquet, config.yaml and the logs;
                    default: evaluations/<time>-<process> in the folder of run.root and run.name
  --check           say what would be done, or what is wrong, and stop
  -h, --help        print this and stop

Servers of another start (rollout=external) must hold the model in model.path and belong to no run.
"""


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Example:
        ``Options(out=Path("base"), overrides=("model.path=/models/qwen3-0.6b",))``
    """

    out: Path | None = None
    check: bool = False
    overrides: tuple[str, ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate as ``arguments`` (default: the command line) say; the exit status."""
    place = Place(0, 1)
    try:
        place = find_place()
        require(
            place.world == 1, "WORLD_SIZE", place.world, "an evaluation is one process", "unset it"
        )
        options = read(sys.argv[1:] if arguments is None else arguments)
        config, text = compose_config(options.overrides)
        folder = options.out or default_folder(config)
        key, rule = ("--out", str(folder)), "is there already"
        require(not os.path.lexists(folder), *key, rule, "name another folder")
        check_writable(*key, folder)
    except (ValueError, OSError) as error:
        return refuse(error, place)
    ending = Ending(place)
    ending.how_to_resume = lambda: "no answers are kept: run it again"
    with ending.signals():
        try:
            evaluate(config, text, folder, ending, check=options.check)
        except BaseException as error:
            return ending.end(error)
    return FINISHED


def read(arguments: Sequence[str]) -> Options:
    """The options and overrides. Raises ValueError with one line for anything else, and
    SystemExit(0) after ``--help``, which is printed."""
    values, parsed = read_valued(arguments, ["--out"], HELP)
    out = Path(values["--out"]) if "--out" in values else None
    return Options(out, parsed.check, parsed.overrides)


def default_folder(config: Config) -> Path:
    """Of this evaluation, in the run's."""
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    return Path(config.run.root, config.run.name, "evaluations", name)


def evaluate(config: Config, text: str, folder: Path, ending: Ending, *, check: bool) -> None:
    """Check, and unless that is all, answer, grade, and write what came of it to ``folder``."""
    from peergrad.checks.evaluating import check_evaluation
    from peergrad.checks.summary import evaluation_plan
    from peergrad.rollout.probe import probe
    from peergrad.rollout.servers import check_args

    began = time.monotonic()
    with Screen(0, shown=config.logger.console or check) as screen:
        with screen.waiting("the checks"):
            found = check_evaluation(config, screen.detail)
            probe(config, waiting=None if check else screen.waiting)
            if check:
                check_args(config.rollout.servers.args)
        screen.say(evaluation_plan(config, found.shape, found.held_out).rstrip())
        if check:
            return
        with writing("--out", folder):
            folder.mkdir(parents=True)
            (folder / "config.yaml").write_text(text)
            ending.log = log_to(folder, "evaluate", screen=True)
        with ExitStack() as stack, ending.noted():
            result = answer(config, folder, screen, stack)
    write(config, folder, result, seconds=time.monotonic() - began)
    print(report(result, folder), flush=True)


def answer(config: Config, folder: Path, screen: Screen, stack: ExitStack) -> "EvaluationResult":
    """Have servers answer and rewards grade; the answers are in ``folder``, the rest is told."""
    from peergrad.inputs import evaluation_parts
    from peergrad.rollout.collector import Collector
    from peergrad.rollout.errors import none_ended

    managed = start_servers(config, folder, stack, ranks=0, trains=False)
    urls = managed.urls if managed else config.rollout.servers.urls
    identity = None if managed else stack.enter_context(hold(config))
    collector = Collector(
        config,
        urls,
        evaluation_parts,
        identity=identity,
        ended=managed.ended if managed else none_ended,
        open_log=partial(log_to, folder, "collector", screen=False),
    )
    stack.callback(collector.close)
    collector.heard = screen.detail
    if managed:
        with screen.waiting(f"SGLang to start ({managed.log(0)})", announce=True):
            managed.ready()
    with screen.waiting("the prompts and the rewards"):
        collector.ready()
    with screen.waiting("the answers", announce=True):
        result = collector.evaluate(0, record=folder / "answers.parquet")
    assert result is not None, "there are held-out prompts, and nobody has given up"
    return result


@contextmanager
def hold(config: Config) -> Iterator[str]:
    """External servers are this evaluation's, and hold its model, as long as the body runs. What
    they are called by meanwhile. Raises ValueError if they are a run's, or hold another model."""
    from peergrad.checks.served import check_served
    from peergrad.rollout.claim import Claim
    from peergrad.rollout.control import Control

    servers, identity = config.rollout.servers, f"evaluation-{secrets.token_hex(4)}"
    control = Control(servers.urls)
    claim = Claim(control, identity, takeover=servers.takeover)
    try:
        claim.check(0)
        if not check_served(config, control):
            log.warning(
                "whether the servers hold the weights of model.path = %r cannot be told: see that "
                "they were started with it, and that no run has used them since",
                config.model.path,
            )
        yield identity
    finally:
        claim.release()
        control.close()


def numbers(result: "EvaluationResult") -> dict[str, float]:
    """What came of it, by name."""
    return {
        "pass@1": result.pass_rate,
        "pass@1_error": result.error,
        **{f"pass@{k}": rate for k, rate in result.pass_at.items()},
        "reward": result.mean_reward,
        "length": result.mean_length,
        "truncated": result.truncated,
        **result.grading,
    }


def write(config: Config, folder: Path, result: "EvaluationResult", *, seconds: float) -> None:
    """evaluation.json, last of all: an evaluation without one has not ended."""
    evaluation, found = config.evaluation, numbers(result)
    told: dict[str, Any] = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "model": config.model.path,
        "held_out": config.data.held_out,
        "prompts": result.prompts,
        "samples": evaluation.samples,
        "temperature": evaluation.temperature,
        "pass_reward": evaluation.pass_reward,
        **{name: value if math.isfinite(value) else None for name, value in found.items()},
    }
    file = folder / "evaluation.json"
    with writing("--out", file):
        replace_text(file, json.dumps(told, indent=2, allow_nan=False) + "\n")


def report(result: "EvaluationResult", folder: Path) -> str:
    """For a person."""
    lines = [f"pass@1         {result.pass_rate:.3f}, standard error {result.error:.3f}"]
    lines += [f"pass@{k:<10}{rate:.3f}" for k, rate in result.pass_at.items()]
    cut = f"{100 * result.truncated:.1f} % cut off"
    lines += [f"reward         {result.mean_reward:.3f}"]
    lines += [f"length         {result.mean_length:.1f} tokens, {cut}"]
    lines += [f"written to     {folder}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
