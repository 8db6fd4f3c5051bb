"""The quickstart's work, told to TRL: from peergrad's configuration to a measured run of TRL's."""

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import trl_environment
from machine import ROOT, load_average
from processes import run_watched
from step import Measured, measured

from peergrad.config import Config
from peergrad.prompts import Prompts, load_prompts, load_tokenizer
from peergrad.running.compose import compose_config


@dataclass(frozen=True)
class Way:
    """How TRL uses the cores.

    Example:
        ``Way.parse("trl-1thread")`` is ``Way("trl-1thread", threads=1, processes=1)``
    """

    name: str
    threads: int = 1  # of each process
    processes: int = 1

    @staticmethod
    def parse(name: str) -> "Way":
        found = re.fullmatch(r"trl-([1-9]\d*)(thread|process)(s|es)?", name)
        if found is None:
            raise ValueError(
                f"--theirs = {name!r}: is no way; write trl-2threads or trl-2processes"
            )
        return Way(name, **{{"thread": "threads", "process": "processes"}[found[2]]: int(found[1])})


@dataclass(frozen=True)
class Settings:
    """What a user of TRL may choose for speed.

    Example:
        ``Settings(env=Path("build/trl"), micro_batch=256, generation="dynamic")``
    """

    env: Path
    micro_batch: int  # answers that a process trains on at a time; all are generated at once
    generation: str  # dynamic or static: the cache of generate(); continuous: batching


@dataclass(frozen=True)
class Task:
    """What ``trl_grpo.py`` is told, all of it as peergrad's configuration has it."""

    model: str
    prompts: list[dict[str, Any]]  # text, answer and tokens, in the order of the steps
    steps: int
    answers: int  # per step
    group_size: int
    max_new_tokens: int
    temperature: float
    lr: float
    warmup_steps: int
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_grad: float
    kl: float
    clip: float
    seed: int


def make_task(overrides: Sequence[str], steps: int) -> Task:
    """Raises ValueError for an objective that TRL would have to be told of in other words."""
    config, _ = compose_config(["experiment=quickstart_cpu", *overrides])
    check_same(overrides, config)
    rollout, optim, algo = config.rollout, config.optim, config.algo
    return Task(
        model=str((ROOT / config.model.path).resolve()),
        prompts=list(
            islice(ordered_prompts(config), steps * rollout.batch_size // rollout.group_size)
        ),
        steps=steps,
        answers=rollout.batch_size,
        group_size=rollout.group_size,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        lr=optim.lr,
        warmup_steps=optim.warmup_steps,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        clip_grad=optim.clip_grad,
        kl=algo.kl.coef,
        clip=algo.surrogate.clip_low,
        seed=config.run.seed,
    )


def check_same(overrides: Sequence[str], config: Config) -> None:
    """What TRL is not told must be as the quickstart has it."""
    own = ("algo", "reward", "optim.schedule", "rollout.max_staleness", "model.dtype")
    for override in overrides:
        if override.lstrip("+~").startswith(own):
            raise ValueError(
                f"{override}: TRL is not told of it; leave it as the quickstart has it"
            )


def ordered_prompts(config: Config) -> Any:
    """Without end, as the collector asks for them."""
    data, seed = config.data, config.run.seed
    tokenizer = load_tokenizer(str(ROOT / config.model.path))
    records = load_prompts(data, data.source, split="train", tokenizer=tokenizer, seed=seed)
    for prompt in Prompts(records, shuffle=data.shuffle, seed=seed):
        yield {"text": prompt.text, "answer": prompt.answer, "tokens": prompt.tokens.tolist()}


def measure_trl(way: Way, task: Task, settings: Settings, warmup: int) -> Measured:
    """Run TRL in a temporary folder, which stays if the run fails."""
    root = Path(tempfile.mkdtemp(prefix="peergrad-trl-"))
    chosen = {"micro_batch": settings.micro_batch, "generation": settings.generation}
    told = {**asdict(task), **chosen, "threads": way.threads}
    (root / "task.json").write_text(json.dumps(told), encoding="utf-8")
    load = load_average()
    print(f"{way.name}: {task.steps} steps, load average before {load}", flush=True)
    command = trl_environment.command(
        settings.env, way.processes, root / "task.json", root / "out.json"
    )
    watched = run_watched(command, cwd=root, environment={"OMP_NUM_THREADS": str(way.threads)})
    if watched.status != 0:
        raise RuntimeError(f"{way.name}: the run ended with status {watched.status}; see {root}")
    rows, ends = read_rows(sorted(root.glob("out.json*")))
    shutil.rmtree(root)
    return measured(way.name, load, watched, rows, ends, warmup)


def read_rows(files: Sequence[Path]) -> tuple[list[dict[str, float]], list[float]]:
    """The steps' quantities, as ``step.quantities`` names them, and when they ended.

    Seconds are the first process's; tokens and rewards those of all, which have as many answers.
    """
    ranks = [json.loads(file.read_text()) for file in files]
    rows = []
    for step in zip(*ranks, strict=True):
        row = {key: step[0][key] for key in ("generate", "reference", "update", "step")}
        row["answer_tokens"] = sum(rank["answer_tokens"] for rank in step)
        row["reward"] = sum(rank["reward"] for rank in step) / len(step)
        row["cpu"] = sum(rank["cpu"] for rank in step)
        rows.append(row)
    return rows, [row["timestamp"] for row in ranks[0]]
