"""peergrad and TRL's GRPOTrainer in turn, at equal work on the same machine.

    python benchmarks/against_trl.py --setup      # once: TRL's environment, the long answers' model
    python benchmarks/against_trl.py              # two rounds of both cases
    python benchmarks/against_trl.py --tiny       # two minutes: shows that the script works

Both train the same model on the same prompts in the same order, with the same reward, objective,
optimizer and float32. Their runs take turns, so that a slow hour of the machine meets both. The
case ``short`` is the quickstart (answers of about 3 tokens), ``long`` its task with answers of 64
to 256 tokens (``long_model.py``). A *way* is how a trainer uses the cores: a layout of ours
(``tp2``, ``dp2``), or TRL's threads or processes (``trl-2threads``, ``trl-1thread``,
``trl-2processes``). What follows the options are Hydra overrides, which hold for both.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import trl_environment
from machine import ROOT, describe, result_path, title
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from step import INTERRUPTED, Layout, Measured, check_model, check_sizes, measure, to_json
from summary import aligned, as_json, middle, summarise, write_result
from trl_task import Settings, Way, make_task, measure_trl

TINY_MODEL, LONG_MODEL = "models/tiny", "models/tiny-long"
LAST = 3  # steps whose mean reward is the pass rate reached: their prompts were never seen before
Run = tuple[str, int, Measured]  # case, round, what was measured


@dataclass(frozen=True)
class Case:
    """What both trainers do: the quickstart with ``overrides``.

    Example:
        ``Case("short", (), warmup=5, steps=20, micro_batch=1024)``
    """

    name: str
    overrides: tuple[str, ...]
    warmup: int
    steps: int
    micro_batch: int  # of TRL, the fastest found


CASES = {
    "short": Case("short", (), warmup=5, steps=20, micro_batch=1024),
    "long": Case(
        "long",
        (
            f"model.path={LONG_MODEL}",
            "rollout.batch_size=256",
            "rollout.max_new_tokens=256",
            "optim.warmup_steps=2",
            "rollout.servers.args={max-total-tokens: 73728}",  # room for all, as TRL has it
        ),
        warmup=2,
        steps=6,
        micro_batch=32,
    ),
}


def main() -> int:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.setup:
            set_up(options.env)
        else:
            compare(options)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--setup", action="store_true", help="make what the benchmark needs")
    parser.add_argument("--env", type=Path, default=ROOT / "build/trl", help="TRL's environment")
    parser.add_argument("--tiny", action="store_true", help="few answers, one run of either")
    parser.add_argument("--cases", default="short,long", help="which of them, comma-separated")
    parser.add_argument("--ours", default="tp2,dp2", help="layouts of peergrad")
    parser.add_argument("--theirs", default="trl-2threads,trl-1thread,trl-2processes")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each way in each case")
    parser.add_argument("--steps", type=int, help="measured steps of a run; default: the case's")
    parser.add_argument("--warmup", type=int, help="steps before them; default: the case's")
    parser.add_argument("--micro-batch", type=int, help="of TRL, in answers; default: the case's")
    parser.add_argument(
        "--generation", default="dynamic", choices=["dynamic", "static", "continuous"],
        help="of TRL: the kind of cache, or continuous batching",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of the quickstart")
    options = parser.parse_intermixed_args()
    suffix = "against-trl-tiny" if options.tiny else "against-trl"
    options.out = options.out or result_path(suffix=suffix)
    if options.tiny:
        options.cases, options.ours, options.theirs = "short", "dp2", "trl-2threads"
        options.rounds, options.steps, options.warmup = 1, 3, 1
        options.overrides = ["rollout.batch_size=64", "optim.warmup_steps=2", *options.overrides]
    return options


def set_up(env: Path) -> None:
    """TRL's environment, and the long answers' model if it is not there; minutes."""
    trl_environment.make_environment(env)
    print(f"{env}: {trl_environment.versions(env)}")
    check_model([])
    if not (ROOT / LONG_MODEL).exists():
        script = ROOT / "benchmarks" / "long_model.py"
        paths = [f"--tiny={ROOT / TINY_MODEL}", f"--out={ROOT / LONG_MODEL}"]
        trl_environment.run([sys.executable, str(script), *paths])


def compare(options: argparse.Namespace) -> None:
    """One run after another; the file is written after each, should a later one fail."""
    theirs = trl_environment.versions(options.env)
    cases = [chosen_case(name, options) for name in options.cases.split(",")]
    turns = in_turn(
        [Layout.parse(name) for name in options.ours.split(",") if name],
        [Way.parse(name) for name in options.theirs.split(",") if name],
    )
    described = describe()
    described["versions"] = {**described["versions"], **theirs}
    said = {"generation": options.generation, "cases": {case.name: vars(case) for case in cases}}
    runs: list[Run] = []
    for case in cases:
        for number in range(options.rounds):
            for way in turns:
                runs.append((case.name, number, measure_way(way, case, options)))
                found = {"runs": [run_json(run) for run in runs], "summary": summaries(runs)}
                write_result(
                    options.out, {"benchmark": "against_trl", **described, **said, **found}
                )
    print(f"\npeergrad and TRL {theirs['trl']} on {title(described)}")
    for case in cases:
        show(case, pooled(runs, case.name))


def chosen_case(name: str, options: argparse.Namespace) -> Case:
    """Raises ValueError for a case that is not there, and for one whose model is missing."""
    if name not in CASES:
        raise ValueError(f"--cases = {name!r}: is no case; choose of {', '.join(CASES)}")
    case = CASES[name]
    overrides = (*case.overrides, *options.overrides)
    if not (ROOT / LONG_MODEL).exists() and f"model.path={LONG_MODEL}" in overrides:
        remedy = "make it with `python benchmarks/against_trl.py --setup`"
        raise ValueError(f"model.path = {LONG_MODEL!r}: there is no model; {remedy}")
    steps = case.steps if options.steps is None else options.steps
    warmup = case.warmup if options.warmup is None else options.warmup
    check_sizes(steps, warmup)
    check_model(overrides)
    return Case(name, overrides, warmup, steps, options.micro_batch or case.micro_batch)


def in_turn(ours: Sequence[Layout], theirs: Sequence[Way]) -> list[Layout | Way]:
    """Ours, theirs, ours, theirs, then what is left of the longer list."""
    pairs = chain.from_iterable(zip_longest(ours, theirs))
    return [way for way in pairs if way is not None]


def measure_way(way: Layout | Way, case: Case, options: argparse.Namespace) -> Measured:
    print(f"\n{case.name}: ", end="")
    if isinstance(way, Layout):
        return measure(way, case.steps, case.warmup, case.overrides)
    task = make_task(case.overrides, case.warmup + case.steps)
    settings = Settings(options.env, case.micro_batch, options.generation)
    return measure_trl(way, task, settings, case.warmup)


def run_json(run: Run) -> dict[str, Any]:
    case, number, measured = run
    return {"case": case, "round": number, **to_json(measured), "pass_rate": pass_rate([measured])}


def summaries(runs: Sequence[Run]) -> dict[str, Any]:
    """By case and way: the steps of all rounds together."""
    return {
        case: {name: summary(found) for name, found in pooled(runs, case).items()}
        for case in dict.fromkeys(case for case, _, _ in runs)
    }


def pooled(runs: Sequence[Run], case: str) -> dict[str, list[Measured]]:
    """The runs of a case by way."""
    found: dict[str, list[Measured]] = {}
    for name, _, measured in runs:
        if name == case:
            found.setdefault(measured.name, []).append(measured)
    return found


def summary(runs: Sequence[Measured]) -> dict[str, Any]:
    """Of the runs of one way."""
    rows = aligned([with_rate(row) for run in runs for row in run.rows])
    return {
        "quantities": as_json(summarise(rows)),
        "middle": middle(rows),
        "pass_rate": pass_rate(runs),
        "memory_gib": max(run.memory_gib for run in runs),
    }


def with_rate(row: dict[str, float]) -> dict[str, float]:
    return {**row, "seconds_per_thousand": 1000 * row["step"] / row["answer_tokens"]}


def pass_rate(runs: Sequence[Measured]) -> float:
    """Mean reward of the last steps, over the runs."""
    rewards = [row["reward"] for run in runs for row in run.rows[-LAST:]]
    return sum(rewards) / len(rewards)


COLUMNS = ("rollout", "generate", "reference", "update", "sync")


def show(case: Case, ways: dict[str, list[Measured]]) -> None:
    """One line a way; ratios to TRL's fastest way."""
    found = {name: summary(runs) for name, runs in ways.items()}
    best = min(
        (f["quantities"]["step"]["median"] for name, f in found.items() if name.startswith("trl")),
        default=float("nan"),
    )
    print(
        f"{case.name}: {len(ways)} ways, {case.steps} steps a run after {case.warmup}; seconds are "
        "medians (p10-p90), of phases medians; ratio: TRL's fastest step to this one"
    )
    table = Table(box=SIMPLE)
    heads = ("way", "step", "ratio", "s/1,000 tokens", *COLUMNS, "tokens", "pass rate", "GiB")
    for head in heads:
        table.add_column(head, justify="left" if head in heads[:2] else "right", no_wrap=True)
    for name, of in found.items():
        quantities = of["quantities"]
        step, rate = quantities["step"], quantities["seconds_per_thousand"]["median"]
        phases = [
            f"{quantities[phase]['median']:.2f}" if phase in quantities else "" for phase in COLUMNS
        ]
        table.add_row(
            name,
            f"{step['median']:.2f} ({step['p10']:.2f}-{step['p90']:.2f})",
            f"{best / step['median']:.2f}",
            f"{rate:.3f}",
            *phases,
            f"{quantities['answer_tokens']['median']:.0f}",
            f"{of['pass_rate']:.3f}",
            f"{of['memory_gib']:.1f}",
        )
    Console(width=max(160, Console().width)).print(table)


if __name__ == "__main__":
    sys.exit(main())
