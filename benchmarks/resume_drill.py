"""Does a run that is killed again and again end as one that never was?

    python benchmarks/resume_drill.py                       # 20 kills: a quarter of an hour
    python benchmarks/resume_drill.py --kills 5 --seed 3 rollout.batch_size=64

A small run of the quickstart saves every step. SIGKILL ends one of its processes, or all that a
shell has started, in some phase of some step: which, where and when is drawn from the seed. What is
left must end by itself, the run is resumed, and so on. In the end

- it has trained on the groups of a run that was never killed: all prompts in their order, none
  twice, none lost;
- a replay of what it recorded, in one go, gives the same weights and the same numbers, bit for bit.

After every kill the newest checkpoint is whole and no process is left. What follows the options are
Hydra overrides.
"""

import argparse
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from machine import ROOT, describe, load_average, result_path
from marked import Marked
from processes import kind
from summary import write_result

from peergrad.config import Config
from peergrad.observing.metrics import read_metrics
from peergrad.recording import read_groups
from peergrad.running.compose import compose_config
from peergrad.running.rundir import RunDir

RANKS = 2
DRILL = (
    "experiment=quickstart_cpu",
    "reward=function",
    "reward.function=peergrad.rewards.arithmetic:reward",
    "reward.workers=1",
    "rollout.batch_size=128",
    "rollout.servers.count=1",
    "optim.warmup_steps=2",
    "evaluation.every=0",
    "checkpoint.every=1",
)
VICTIMS = ("rank 0", "another rank", "collector", "server", "reward worker", "everything")
PHASES = ("start", "rollout", "update", "sync", "save")
WAIT_SECONDS = 300.0  # for a phase to come
END_SECONDS = 240.0  # for what is left of a run to end
AFTER_SECONDS = 0.4  # a kill comes up to so much later than its phase begins
START_SECONDS = 25.0  # ... or than the start
TIMES = re.compile(r"time/|sync/|start/|rollout/|tokens/per_second|timestamp|version/|checkpoint/")


@dataclass(frozen=True)
class Kill:
    """What was killed when, and what came of it."""

    victim: str
    phase: str
    step: int  # at least so far the run was
    delay: float  # seconds since the phase had begun
    ended: float | None  # seconds until nothing was left; None: the run went on


class Drilled(RunDir):
    """A run, and the processes of its present start."""

    def __init__(self, root: Path, name: str, overrides: list[str]) -> None:
        super().__init__(root / name)
        self.overrides = [*DRILL, *overrides, f"run.root={root}", f"run.name={name}"]
        self.screen = root / f"{name}.log"
        self.marked = Marked()

    def start(self) -> None:
        self.began = time.time()
        resume = f"run.resume={str(self.started).lower()}"
        launch = [sys.executable, "-m", "peergrad.launch", "--nproc-per-node", str(RANKS)]
        with self.screen.open("a") as output:
            self.process = subprocess.Popen(
                [*launch, *self.overrides, resume],
                cwd=ROOT,
                env={**os.environ, **self.marked.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self) -> None:
        """Wait for the end of a start that nobody kills."""
        if (status := self.process.wait()) != 0:
            raise RuntimeError(f"{self.path.name} ended with status {status}; see {self.screen}")

    def rows(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in read_metrics(self.metrics) if row["kind"] == kind]

    def newest(self) -> int:
        """Step of the newest checkpoint; 0 if there is none."""
        latest = self.checkpoints / "latest"
        return int(latest.read_text().removeprefix("step_")) if latest.exists() else 0

    def reached(self, phase: str, step: int) -> bool:
        """Whether this start has come to ``phase`` of ``step``, as the folder tells it."""
        if phase == "rollout":
            fresh = (row for row in self.rows("start") + self.rows("train") if self._since(row))
            return any(row["step"] == step - 1 for row in fresh)
        if phase == "sync":  # the first one is that of the start
            log, at = self.path / "logs" / "latest" / "server_0.log", self.newest()
            text = log.read_text(errors="replace") if self._new(log) else ""
            return text.count("POST /pause_generation") > max(1, step - at)
        names = {
            "start": "config.yaml",
            "update": f"rollouts/step_{step:06d}.parquet",
            "save": f"checkpoints/.step_{step:06d}.partial*",
        }
        return any(self._new(path) for path in self.path.glob(names[phase]))

    def _since(self, row: dict[str, Any]) -> bool:
        return bool(row["timestamp"] > self.began)

    def _new(self, path: Path) -> bool:
        with suppress(FileNotFoundError):
            return path.stat().st_mtime > self.began
        return False

    def find(self, victim: str) -> list[psutil.Process]:
        """The processes that ``victim`` may mean; none yet while the run is starting."""
        alive = self.marked.alive()
        if victim == "everything":
            return alive
        if "rank" not in victim:  # a server's processes are of several kinds
            return [process for process in alive if _kind(process).startswith(victim)]
        found = [process for process in alive if _kind(process) == "ranks"]
        return [rank for rank in found if (_rank(rank) == "0") == (victim == "rank 0")]

    def gone(self, deadline: float) -> bool:
        """Whether nothing is left, at the latest at ``deadline``."""
        while self.marked.alive():
            self.process.poll()
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        self.process.wait()
        return True


def _kind(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return kind(process.cmdline())
    return "gone"


def _rank(process: psutil.Process) -> str | None:
    with suppress(psutil.Error):
        rank: str | None = process.environ().get("RANK")
        return rank
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="draws what is killed, and when")
    parser.add_argument("--folder", type=Path, help="where to run; default: a temporary folder")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options, overrides = parser.parse_known_args()
    described = {**describe(), "load_average_before": load_average()}
    with tempfile.TemporaryDirectory(prefix="peergrad-drill-") as temporary:
        root = options.folder or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        steps = f"run.steps={4 * options.kills + 2}"
        run = Drilled(root, "killed", [steps, *overrides])
        replay = Drilled(root, "replayed", [steps, *overrides, f"rollout.replay={run.path}"])
        try:
            kills = drill(run, options.kills, random.Random(options.seed))
            check_groups(run)
            replay.start()
            replay.finish()
            digest = check_replay(run, replay)
        except RuntimeError as error:
            print(f"error: {error}\n{_tail(run.screen)}", file=sys.stderr)
            return 1
        finally:
            run.marked.kill()
            replay.marked.kill()
    print(f"{len(kills)}/{options.kills} kills: as if there had been none; weights {digest}")
    found = {"seed": options.seed, "kills": [asdict(kill) for kill in kills], "weights": digest}
    write_result(
        options.out or result_path(suffix="resume-drill"),
        {"benchmark": "resume_drill", **described, **found},
    )
    return 0


def drill(run: Drilled, kills: int, draw: random.Random) -> list[Kill]:
    """Start ``run``, kill and resume it ``kills`` times, and let it finish. RuntimeError if it does
    not take that as it should."""
    done: list[Kill] = []
    run.start()
    starting = True
    while len(done) < kills:
        victim, phase = draw.choice(VICTIMS), draw.choice(PHASES if starting else PHASES[1:])
        step = run.newest() + draw.randint(1, 2)
        delay = draw.uniform(0, START_SECONDS if phase == "start" else AFTER_SECONDS)
        which = draw.random()  # of its processes
        _wait(run, lambda: run.reached(phase, step), f"{phase} of step {step}")  # noqa: B023
        time.sleep(delay)
        _wait(run, lambda: run.find(victim), victim)  # noqa: B023
        kill = Kill(victim, phase, step, delay, end(run, victim, which))
        done.append(kill)
        came = "the run went on" if kill.ended is None else f"all ended in {kill.ended:.1f} s"
        at = f"{delay:.1f} s into {phase} of step {step}"
        print(
            f"{len(done)}/{kills}  {victim}, {at}: {came}; step {run.newest()} is saved", flush=True
        )
        starting = kill.ended is not None
        if starting:
            check_checkpoints(run)
            run.start()
    run.finish()
    return done


def end(run: Drilled, victim: str, which: float) -> float | None:
    """Kill ``victim``, of its processes the one at ``which`` (0 to 1); seconds until nothing was
    left, None if the run can do without it."""
    start = time.monotonic()
    deadline = start + END_SECONDS
    if victim == "everything":  # that a shell has started: servers are in sessions of their own
        run.marked.alive()
        os.killpg(run.process.pid, signal.SIGKILL)
    else:
        processes = run.find(victim)
        processes[int(which * len(processes))].kill()
    if victim == "reward worker":  # a new one takes its place, and its answer counts as failed
        before = len(run.rows("train"))
        while run.process.poll() is None and time.monotonic() < deadline:
            if len(run.rows("train")) > before:
                return None
            time.sleep(0.1)
    if not run.gone(deadline):
        left = [" ".join(process.cmdline())[:80] for process in run.marked.alive()]
        raise RuntimeError(f"{END_SECONDS:g} s after the end of its {victim} there is still {left}")
    return time.monotonic() - start


def check_checkpoints(run: Drilled) -> None:
    """Whatever is visible is whole, and what ``latest`` names is visible."""
    from peergrad.parallel.damage import damage

    for path in run.checkpoints.glob("step_*"):
        if (problem := damage(path)) is not None:
            raise RuntimeError(f"{path} is visible, and not whole: {problem}")
    newest = run.checkpoints / f"step_{run.newest():06d}"
    if run.newest() and not newest.is_dir():
        raise RuntimeError(f"latest names {newest}, which is not there")


def check_groups(run: Drilled) -> None:
    """RuntimeError if a step was trained on other groups than in a run that was never killed."""
    config, _ = compose_config(run.overrides)
    for step, expected in enumerate(_groups(config), 1):
        found = [group.id for group in read_groups(run.path / f"rollouts/step_{step:06d}.parquet")]
        if found != expected:
            raise RuntimeError(f"step {step} trained on the groups {found}, and not on {expected}")


def check_replay(run: Drilled, replay: Drilled) -> str:
    """Hold ``run`` against a replay of it; the digest of its weights. RuntimeError where they
    differ."""
    ours, theirs = run.rows("train"), replay.rows("train")
    if [row["step"] for row in ours] != [row["step"] for row in theirs]:
        raise RuntimeError(f"metrics are of steps {[row['step'] for row in ours]}")
    for one, other in zip(ours, theirs, strict=True):
        keys = [key for key in one.keys() & other.keys() if not TIMES.match(key)]
        if differing := sorted(key for key in keys if one[key] != other[key]):
            raise RuntimeError(f"step {one['step']} has another {differing} than its replay")
    digest, replayed = (_digest(folder.hf / "model.safetensors") for folder in (run, replay))
    if digest != replayed:
        raise RuntimeError(f"the weights are {digest}, and those of the replay {replayed}")
    return digest


def _groups(config: Config) -> Iterator[list[str]]:
    """Ids of the groups of every step of a run that was never killed."""
    from peergrad.inputs import collector_parts

    parts = collector_parts(config)
    parts.scorer.close()
    size = config.rollout.prompts_per_step
    for step in range(config.run.steps):
        numbers = range(step * size, (step + 1) * size)
        yield [f"{number}/{next(parts.prompts).id}" for number in numbers]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _wait(run: Drilled, event: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not event():
        if run.process.poll() is not None:
            raise RuntimeError(f"the run ended by itself, before {what}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not come in {WAIT_SECONDS:g} s")
        time.sleep(0.02)


def _tail(file: Path) -> str:
    """The last that the run has printed."""
    return "\n".join(file.read_text(errors="replace").splitlines()[-20:]) if file.exists() else ""


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
