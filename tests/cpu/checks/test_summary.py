"""What a check that passes says."""

from dataclasses import replace
from pathlib import Path

import pytest

from peergrad.checks import Inputs, Source, summary, warnings_of
from peergrad.checks.place import checkpoint_bytes, disk_warning, gigabytes, resumed_step
from peergrad.config import (
    AlgoConfig,
    Config,
    Dtype,
    Fp8,
    Fp8Serving,
    RewardKind,
    ServerMode,
    SurrogateKind,
)
from peergrad.parallel.hf.config import Shape
from peergrad.parallel.hf.rope import Rope
from peergrad.parallel.hf.tensors import parameters
from peergrad.prompts import TokenizerFacts

SHAPE = Shape(
    family="qwen3",
    layers=28,
    hidden=1024,
    heads=16,
    kv_heads=8,
    head_dim=128,
    ffn=3072,
    vocab=151936,
    max_length=40960,
    norm_eps=1e-6,
    rope=Rope(1e6),
    qk_norm=True,
    tied=True,
)
TRAIN = Source("gsm8k/train.jsonl", prompts=7461, left_out=12, typical=84, longest=231)
HELD_OUT = Source("gsm8k/test.jsonl", prompts=1319, left_out=0, typical=80, longest=200)
TOKENIZER = TokenizerFacts(size=151669, end=151645, chat=True)
FOUND = Inputs(SHAPE, TOKENIZER, TRAIN, HELD_OUT)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    config = Config(algo=AlgoConfig(source="GRPO, arXiv:2402.03300 (there: G 64)", epochs=2))
    config.model.path = "models/qwen3-0.6b"
    config.parallel.tensor = 2
    config.data.source, config.data.held_out = TRAIN.name, HELD_OUT.name
    config.reward.kind = RewardKind.gsm8k
    config.optim.warmup_steps = 10
    config.checkpoint.every, config.checkpoint.keep = 50, 2
    return config


def test_all_of_it(config: Config) -> None:
    assert summary(config, 4, FOUND).splitlines() == [
        "model          models/qwen3-0.6b: qwen3, 28 layers of 1024, 596M parameters",
        "layout         4 processes: TP 2 x PP 1 x DP 2, PyTorch layers in bfloat16",
        "objective      GRPO, arXiv:2402.03300; KL 0.04",
        "step           64 prompts x 8 answers, 2 updates, at most 643k tokens",
        "steps          100 (0.86 epochs), lr 1e-06 constant, 10 updates of warm-up",
        "prompts        gsm8k/train.jsonl: 7461, median 84 tokens, longest 231, 12 left",
        "               out",
        "reward         gsm8k: 1 if the final number is right, else 0",
        "servers        1, started and stopped by the run",
        "evaluation     every 10 steps: 256 of 1319 in gsm8k/test.jsonl, greedy",
        "checkpoints    every 50 steps, the newest 2 kept, about 8.34 GB each",
        "run folder     runs/run (new)",
    ]


def test_every_kind_of_parallelism(config: Config) -> None:
    config.parallel.pipeline = config.parallel.virtual_pipeline = config.parallel.context = 2
    line = summary(config, 16, FOUND).splitlines()[1]
    assert line.startswith(
        "layout         16 processes: TP 2 x PP 2 (2 pieces each) x CP 2 x DP 2, PyTorch"
    )


def test_servers_in_fp8(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whether the trainer, in FP8 too, multiplies with the same weights."""
    servers = config.rollout.servers
    servers.fp8 = Fp8Serving.flash_rl
    assert "stopped by the run, in FP8 (flash_rl)\n" in summary(config, 2, FOUND)
    servers.fp8 = Fp8Serving.block
    text = " ".join(summary(config, 2, FOUND).split())
    assert "in FP8 (block, scales power_of_two) evaluation" in text
    config.parallel.fp8 = Fp8.blockwise
    same = "FP8 weights those that servers multiply with are {} evaluation"
    text = " ".join(summary(config, 2, FOUND).split())
    assert same.format("the trainer's, bit for bit") in text
    config.parallel.fp8_first_layers_bf16 = 1
    text = " ".join(summary(config, 2, FOUND).split())
    assert same.format("not the trainer's: the trainer has 1 layers in bfloat16") in text
    monkeypatch.setenv("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")
    text = " ".join(summary(config, 2, FOUND).split())
    assert "not the trainer's: scales of the trainer are float32, of the engine power_" in text


def test_another_run(config: Config, tmp_path: Path) -> None:
    config.reward.kind, config.reward.function = RewardKind.function, "mine:score"
    config.reward.workers = 4
    config.rollout.servers.mode = ServerMode.external
    config.rollout.servers.urls = [f"http://node{i}:30000" for i in range(5)]
    config.rollout.max_staleness = 1
    config.evaluation.every = config.checkpoint.every = 0
    config.run.resume = True
    (tmp_path / "runs/run/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/run/checkpoints/latest").write_text("step_000040")
    lines = summary(config, 4, FOUND).splitlines()
    assert "reward         mine:score in 4 processes" in lines
    text = " ".join(" ".join(lines).split())
    assert (
        "servers http://node0:30000 http://node1:30000 and 3 more; answers up to 1 version" in text
    )
    assert "evaluation     none (evaluation.every=0)" in lines
    assert "checkpoints    at the end, about 8.34 GB each" in lines
    assert "run folder     runs/run (resumed after step 40)" in lines


def test_a_replay(config: Config) -> None:
    config.rollout.replay = "runs/first"
    lines = summary(config, 4, Inputs(SHAPE, None, None, None)).splitlines()
    assert "rollouts       recorded ones of runs/first; no engine, no evaluation" in lines
    assert not [line for line in lines if line.startswith(("prompts", "servers"))]
    assert any(line.startswith("warning") and "has no config.yaml" in line for line in lines)
    inputs = Inputs(SHAPE, None, None, None)
    assert "decides what ratios are taken to" in list(warnings_of(config, inputs))[-1]
    config.algo.surrogate.kind = SurrogateKind.reinforce  # takes none
    assert "reinforce has no ratio that corrects it" in list(warnings_of(config, inputs))[-1]


def test_long_names_never_make_it_wide(config: Config) -> None:
    config.model.path = config.run.root = "/a/very/long/path" * 20
    config.algo.source = "word " * 30
    long = Source("/another" * 30 + ".jsonl", 10**7, 10**6, 10**5, 10**6)
    lines = summary(config, 10**5, Inputs(SHAPE, TOKENIZER, long, long)).splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) <= 20


WARNINGS = {
    "held_out": "evaluation.every=10 has no effect without data.held_out",
    "few": "a step takes 64 prompts, data.source has 9: some come twice",
    "same": "data.held_out is the file that is trained on",
    "resume": "run.resume=true, but there is no checkpoint: the run starts from the beginning",
}


def test_a_finished_run(config: Config, tmp_path: Path) -> None:
    config.run.resume = True
    (tmp_path / "runs/run/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/run/checkpoints/latest").write_text("step_000100")
    text = " ".join(summary(config, 4, FOUND).split())
    assert "warning the newest checkpoint is of step 100: nothing is left of run.steps" in text
    config.run.steps = 101
    assert "warning" not in summary(config, 4, FOUND)


@pytest.mark.parametrize("what", WARNINGS)
def test_warnings(config: Config, what: str) -> None:
    train, held_out = TRAIN, HELD_OUT
    if what == "held_out":
        config.data.held_out = None
    if what == "few":
        train = Source("few.jsonl", 9, 0, 3, 3)
    if what == "same":
        held_out, config.data.held_out = train, config.data.source
    config.run.resume = what == "resume"
    found = None if what == "held_out" else held_out
    text = " ".join(summary(config, 4, Inputs(SHAPE, TOKENIZER, train, found)).split())
    assert WARNINGS[what] in text
    assert text.count("warning") == 1


def test_a_checkpoint_takes_what_was_measured() -> None:
    """Bytes a parameter of the model folder, less its fixed part of about 100 kB: 16 in float32
    with the distributed optimizer, 12 without, 14 in bfloat16 either way."""
    config, count = Config(), parameters(SHAPE)  # its vocabulary needs no padding
    for dtype, sharded, size in (
        (Dtype.float32, True, 16),
        (Dtype.float32, False, 12),
        (Dtype.bfloat16, True, 14),
        (Dtype.bfloat16, False, 14),
    ):
        config.model.dtype, config.parallel.distributed_optimizer = dtype, sharded
        assert checkpoint_bytes(config, SHAPE) == size * count


def test_the_disk(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the steps 1 to 101 the 50th, the 100th and the last are kept, two at a time and a third
    while it is written; then comes the model in bfloat16."""
    config.run.steps = 101
    needed = (3 * 14 + 2) * parameters(SHAPE)

    def usage(path: Path) -> object:
        return type("Usage", (), {"free": free})

    monkeypatch.setattr("shutil.disk_usage", usage)
    free = needed
    assert disk_warning(config, SHAPE) is None
    free = needed - 1
    config.run.steps = 100  # no third one
    assert disk_warning(config, SHAPE) is None
    config.run.steps = 400
    assert str(disk_warning(config, SHAPE)).endswith(f"about {gigabytes(needed)}")


def test_sizes_for_people() -> None:
    sizes = [(999, "999 B"), (9_720_000, "9.72 MB"), (8.34e9, "8.34 GB"), (2.5e12, "2.5 TB")]
    for size, text in sizes:
        assert gigabytes(size) == text


def test_where_a_run_goes_on(config: Config, tmp_path: Path) -> None:
    config.run.resume = True
    assert resumed_step(config) is None
    (tmp_path / "runs/run/checkpoints").mkdir(parents=True)
    pointer = tmp_path / "runs/run/checkpoints/latest"
    for text, step in (("step_000012\n", 12), ("", None), ("other", None)):
        pointer.write_text(text)
        assert resumed_step(config) == step


def test_what_is_perhaps_not_meant_by_the_prompts(config: Config) -> None:
    train = replace(TRAIN, repeated=12, contradicting=3, notes=("9 of 9 begin twice",))
    held_out = replace(HELD_OUT, repeated=1)
    inputs = Inputs(SHAPE, TOKENIZER, train, held_out, shared=37)
    assert list(warnings_of(config, inputs)) == [
        "9 of 9 begin twice",
        "data.source: 12 of 7461 prompts repeat the tokens of an earlier one, 3 with another "
        "answer",
        "data.held_out: 1 of 1319 prompts repeat the tokens of an earlier one",
        "data.held_out: 37 of 1319 prompts are trained on, too: its pass@1 will be too high",
    ]
    for source in ("arithmetic", TRAIN.name):  # held out is a file
        config.data.source = source
        assert (
            "data.held_out: 37 of 1319 prompts are trained on"
            in list(warnings_of(config, inputs))[-1]
        )
    config.data.source = config.data.held_out = "arithmetic"
    assert list(warnings_of(config, Inputs(SHAPE, TOKENIZER, TRAIN, HELD_OUT))) == []
    config.data.source, config.data.held_out = [TRAIN.name, HELD_OUT.name], HELD_OUT.name
    last = list(warnings_of(config, inputs))[-1]
    assert last == "data.held_out has a file that is trained on: its pass@1 will say nothing"


def test_options_of_servers_that_others_start(config: Config) -> None:
    servers = config.rollout.servers
    servers.count, servers.args = 4, {"mem-fraction-static": 0.8}
    inputs = Inputs(SHAPE, TOKENIZER, TRAIN, HELD_OUT)
    assert list(warnings_of(config, inputs)) == []
    servers.mode, servers.urls = ServerMode.external, ["http://a:1"]
    rule = "has no effect with mode=external: nothing is started"
    assert list(warnings_of(config, inputs)) == [
        f"rollout.servers.{key} {rule}" for key in ("count", "args")
    ]
    servers.wait = 600.0  # for those that peergrad.serve starts with the same overrides
    assert list(warnings_of(config, inputs)) == []
