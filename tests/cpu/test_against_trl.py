"""What both trainers are told and how their runs are put side by side; TRL itself is not needed."""

import json
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import against_trl
import processes
import pytest
import trl_task
from step import Layout, Measured, measured, show_cpu, show_parts

from peergrad.inputs import collector_parts
from peergrad.running.compose import compose_config


def watched(**changes: object) -> processes.Watched:
    one = processes.Watched(0, 1.0, 2.0, [10.0, 11.0, 12.0], {"ranks": [0.0, 1.0, 3.0]})
    return replace(one, **changes)  # type: ignore[arg-type]


def test_cpu_seconds_between_two_looks_go_by_proportion() -> None:
    seen = watched(cpu={"ranks": [0.0, 1.0, 3.0], "collector": [5.0, 9.0, 9.0]})
    # From the middle of the first second: half of its 1, then 2; half of its 4, then none.
    assert seen.cpu_between(10.5, 12.0) == {"ranks": 2.5, "collector": 2.0}
    assert seen.cpu_between(11.0, 11.5) == {"ranks": 1.0, "collector": 0.0}


def test_warm_up_steps_count_neither_in_seconds_nor_in_cpu_time() -> None:
    rows = [{"step": 1.0, "reward": 0.0}, {"step": 1.0, "reward": 0.5}]
    run = measured("dp2", 0.1, watched(), rows, [11.0, 12.0], warmup=1)
    assert run.rows == rows[1:]
    assert run.cpu == {"ranks": 2.0}


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("python -m torch.distributed.run -m peergrad.main experiment=x", "launcher"),
        ("python -u -m peergrad.main experiment=x", "ranks"),
        ("python -c from multiprocessing.spawn import spawn_main; spawn_main()", "collector"),
        ("python -c from multiprocessing.resource_tracker import main", "other"),
        ("python -m sglang.launch_server --model x", "server: tokenizer manager"),
        ("python -m peergrad.rollout.cpu_server --port 1", "server: tokenizer manager"),
        ("sglang::scheduler", "server: scheduler"),
        ("sglang::detokenizer", "server: detokenizer"),
        ("python trl_grpo.py task.json out.json", "ranks"),
    ],
)
def test_kinds_of_processes(command: str, kind: str) -> None:
    assert processes.kind(command.split(" ")) == kind


def test_a_childs_work_and_memory_count_and_its_end_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parent that sleeps, and its child that computes half a second and holds 64 MiB. Neither
    ends before it has been looked at, the parent without its child."""
    wait = "import os, sys, time\nwhile not os.path.exists({!r}): time.sleep(0.02)\n"
    child = (
        "import time; held = bytearray(2**26); held[::4096] = bytes([1]) * 2**14\n"
        "while time.process_time() < 0.5: pass\n"
        f"{wait.format(f'{tmp_path}/worked')}{wait.format(f'{tmp_path}/held')}"
    )
    parent = (
        "import subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {child!r}, 'peergrad.main'])\n"
        f"{wait.format(f'{tmp_path}/missed')}"
    )
    look, memory = processes.Tree.look, processes.Tree.memory

    def look_at(tree: processes.Tree) -> dict[str, float]:
        alone = len(tree.processes()) == 1 and (tmp_path / "worked").exists()
        found = look(tree)
        if found.get("ranks", 0.0) >= 0.5:
            (tmp_path / "worked").touch()
        if alone:
            (tmp_path / "missed").touch()
        return found

    def measure(tree: processes.Tree) -> int:
        found = memory(tree)
        if found > 2**26:
            (tmp_path / "held").touch()
        return found

    monkeypatch.setattr(processes.Tree, "look", look_at)
    monkeypatch.setattr(processes.Tree, "memory", measure)
    monkeypatch.setattr(processes, "COST", 0.5)  # looks at memory often
    began = time.time()
    seen = processes.run_watched([sys.executable, "-c", parent], cwd=tmp_path)
    assert seen.status == 0
    assert seen.cpu_between(began, time.time())["ranks"] == pytest.approx(0.5, abs=0.3)
    assert seen.memory_gib > 64 / 1024
    failed = processes.run_watched([sys.executable, "-c", "exit(3)"], cwd=tmp_path)
    assert failed.status == 3


def test_ways_of_trl() -> None:
    assert trl_task.Way.parse("trl-1thread") == trl_task.Way("trl-1thread")
    assert trl_task.Way.parse("trl-2threads").threads == 2
    assert trl_task.Way.parse("trl-2processes").processes == 2
    with pytest.raises(ValueError, match=r"--theirs = 'dp2': is no way; write trl-2threads"):
        trl_task.Way.parse("dp2")


def test_runs_take_turns() -> None:
    ours, theirs = ["tp2", "dp2"], ["trl-2threads", "trl-1thread", "trl-2processes"]
    turns = against_trl.in_turn(
        [Layout.parse(name) for name in ours], [trl_task.Way.parse(name) for name in theirs]
    )
    names = [way.name for way in turns]
    assert names == ["tp2", "trl-2threads", "dp2", "trl-1thread", "trl-2processes"]


def test_trl_is_given_what_the_quickstart_does(model: Path) -> None:
    task = trl_task.make_task(
        [f"model.path={model}", "rollout.batch_size=64", "optim.lr=1e-4"], steps=3
    )
    assert (task.answers, task.group_size, task.max_new_tokens) == (64, 8, 5)
    assert (task.lr, task.warmup_steps, task.kl, task.clip, task.clip_grad) == (
        1e-4,
        10,
        0.04,
        0.2,
        1,
    )
    # The run's own collector asks for the same prompts in the same order: 3 steps of 8.
    config, _ = compose_config(["experiment=quickstart_cpu", f"model.path={model}"])
    own = list(islice(collector_parts(config).prompts, 24))
    assert [(p["text"], p["answer"]) for p in task.prompts] == [(p.text, p.answer) for p in own]
    assert [p["tokens"] for p in task.prompts] == [p.tokens.tolist() for p in own]


@pytest.mark.parametrize("override", ["algo=dapo", "+optim.schedule=cosine", "reward.kind=math"])
def test_what_trl_is_not_told_must_stay(override: str) -> None:
    with pytest.raises(ValueError, match="TRL is not told of it"):
        trl_task.make_task([override], steps=1)


def test_rows_of_several_processes_are_one(tmp_path: Path) -> None:
    row = {"generate": 1.0, "reference": 0.5, "update": 0.5, "step": 2.0, "cpu": 1.5}
    for name, reward, tokens, end in (("out.json", 0.5, 30, 7.0), ("out.json.1", 1.0, 20, 7.1)):
        rank = [{**row, "reward": reward, "answer_tokens": tokens, "timestamp": end}]
        (tmp_path / name).write_text(json.dumps(rank))
    rows, ends = trl_task.read_rows(sorted(tmp_path.glob("out.json*")))
    [found] = rows
    assert (found["reward"], found["answer_tokens"], found["step"]) == (0.75, 50, 2.0)
    assert found["cpu"] == 3.0  # of all processes together
    assert ends == [7.0]


def run_of(name: str, *rows: dict[str, float]) -> Measured:
    return measured(name, 0.0, watched(memory_gib=len(rows)), rows, [11.0, 12.0][: len(rows)], 0)


def test_rounds_are_pooled_and_parts_that_only_one_has_stay() -> None:
    one = {"rollout": 1.0, "step": 2.0, "answer_tokens": 1000.0, "reward": 0.5}
    two = {"rollout": 3.0, "sync": 1.0, "step": 4.0, "answer_tokens": 500.0, "reward": 1.0}
    runs = [("short", 0, run_of("dp2", one)), ("short", 1, run_of("dp2", two, two))]
    found = against_trl.summaries([*runs, ("long", 0, run_of("dp2", one))])
    assert list(found) == ["short", "long"]
    short = found["short"]["dp2"]
    assert short["quantities"]["step"] == {"median": 4.0, "p10": 2.4, "p90": 4.0, "count": 3}
    # 2 s per 1,000 tokens, and twice 4 s per 500.
    assert short["quantities"]["seconds_per_thousand"]["median"] == 8.0
    assert short["pass_rate"] == pytest.approx(2.5 / 3)
    assert short["memory_gib"] == 2


def test_missing_environment_says_how_to_make_it(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["against_trl.py", "--env=/nowhere/trl"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        assert against_trl.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --env = '/nowhere/trl': there is no environment; make it with")
    assert said.count("\n") == 1


def test_parts_stand_indented_below_their_phase(capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs, one of them without parts: what it lacks is left empty."""
    parts = {"sync": 1.0, "sync/pause": 0.25, "sync/other": 0.75, "step": 1.0, "reward": 0.5}
    runs = [run_of("tp2", {"sync": 2.0, "step": 2.0, "reward": 0.5}), run_of("dp2", parts)]
    show_parts(runs, warmup=5)
    show_cpu(runs)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["sync", "2.000", "2.000", "(2.000-2.000)", "1.000", "1.000", "(1.000-1.000)"] in lines
    assert ["pause", "0.250", "0.250", "(0.250-0.250)"] in lines
    # 2 s, from second 9 on: 1 of the look's; 1 s from second 10 to 11: 1, too.
    assert ["ranks", "1.00", "50%", "1.00", "100%"] in lines
