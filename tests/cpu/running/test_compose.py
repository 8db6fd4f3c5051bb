"""From the command line to a Config: what is refused, and how it is said."""

import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import peergrad.running.compose as running_compose
import peergrad.running.keys as running_keys
from peergrad.config import Aggregation, Config, Dtype, RewardKind, ServerMode
from peergrad.running.compose import chosen_keys, compose_config
from peergrad.running.keys import config_dir

MODEL = "model.path=models/tiny"
EXPERIMENTS = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))


def refusal(*overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        compose_config(overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_and_overrides() -> None:
    config, _ = compose_config(
        [MODEL, "algo.surrogate.clip_high=0.28", "algo.aggregation=token_mean"]
    )
    assert isinstance(config, Config)
    assert config.model.path == "models/tiny"
    assert config.algo.surrogate.clip_high == 0.28
    assert config.algo.aggregation is Aggregation.token_mean
    assert config.algo.kl.coef == 0.04  # from conf/algo/deepseekmath.yaml
    assert config.data.source == config.data.held_out == "arithmetic"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(name: str) -> None:
    needed = ["data.source=train.jsonl"] if name.startswith("gsm8k") else []
    config, _ = compose_config([f"experiment={name}", MODEL, *needed])
    assert config.run.name != Config().run.name  # or its runs would collide with others


def groups_and_options() -> list[str]:
    folders = [path for path in config_dir().iterdir() if path.is_dir()]
    return sorted(f"{d.name}={f.stem}" for d in folders for f in d.glob("*.yaml"))


@pytest.mark.parametrize("option", groups_and_options())
def test_every_option_of_every_group_composes(option: str) -> None:
    """With what it leaves open filled in."""
    needed = {
        "rollout=external": ["rollout.servers.urls=[http://host:30000]"],
        "reward=function": ["reward.function=my.module:f"],
    }
    compose_config([option, MODEL, "data.source=train.jsonl", *needed.get(option, [])])


def test_the_command_line_wins_over_the_experiment() -> None:
    config, _ = compose_config(["experiment=quickstart_cpu", "parallel=single", "run.steps=3"])
    assert config.parallel.tensor == 1
    assert config.run.steps == 3
    assert config.model.dtype is Dtype.float32


@pytest.mark.parametrize("data", ["gsm8k", "jsonl"])
def test_data_files_must_be_named(data: str) -> None:
    """``source: ???`` of the group must not fall back to a default of the schema."""
    assert refusal(MODEL, f"data={data}").startswith("data.source = ???: is mandatory; set it")
    config, _ = compose_config([MODEL, f"data={data}", "data.source=train.jsonl"])
    assert config.data.source == "train.jsonl"
    assert config.data.held_out is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "algo.surrogate.clip_lo=0.1",
            "algo.surrogate.clip_lo: there is no such key in algo.surrogate; "
            "did you mean algo.surrogate.clip_low?",
        ),
        (
            "+algo.kl.coeff=0.1",
            "algo.kl.coeff: there is no such key in algo.kl; did you mean algo.kl.coef?",
        ),
        (
            "algo={kl: {cof: 0.1}}",
            "algo.kl.cof: there is no such key in algo.kl; did you mean algo.kl.coef?",
        ),
        ("clip_low=0.3", "clip_low: there is no such key; did you mean algo.surrogate.clip_low?"),
        ("a.b=3", "a.b: there is no such key; --cfg prints every key"),
        (
            "data=json",
            "data = 'json': must be one of arithmetic, gsm8k, jsonl; did you mean data=jsonl?",
        ),
        (
            "model.dtype=bf16",
            "model.dtype = 'bf16': must be one of float32, bfloat16; did you mean bfloat16?",
        ),
        (
            "run.name=${nope}",
            "run.name = ${nope}: refers to a key that does not exist; "
            r"""for the text itself write 'run.name="\${nope}"'""",
        ),
        (
            "run.name=${optim.rl}",
            "run.name = ${optim.rl}: refers to a key that does not exist; did you mean optim.lr? "
            r"""for the text itself write 'run.name="\${optim.rl}"'""",
        ),
        (
            "run.name=${oc.env:NO_SUCH}",
            "run.name = ${oc.env:NO_SUCH}: the environment variable NO_SUCH is not set; set it",
        ),
        (
            "run.name=${run}",
            "run.name = ${run}: cannot be resolved: Interpolation to parent node detected; "
            "refer to a key with a value of its own",
        ),
        (
            "optim.lr=${run.name}",
            "optim.lr = 'run': must be a number; write it as in optim.lr=1e-06",
        ),
    ],
)
def test_refusals(override: str, message: str) -> None:
    assert refusal(MODEL, override) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {stepz: 3}", "run.stepz: there is no such key in run; did you mean run.steps?"),
        (
            "run: {steps: x}",
            "run.steps = 'x': must be a whole number; write it as in run.steps=100",
        ),
        (
            "model: {dtype: fp32}",
            "model.dtype = 'fp32': must be one of float32, bfloat16; did you mean float32?",
        ),
        ("defaults: [override /algo: dappo]", "algo = 'dappo': must be one of areal, "),
        ("run: [steps", "conf/: a file in it is not YAML: while parsing a flow sequence in "),
        ("- 3", "conf/: "),
    ],
)
def test_mistakes_in_an_experiment(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the user's own; the line says which it is."""
    shutil.copytree(config_dir(), tmp_path / "conf")
    file = tmp_path / "conf/experiment/mine.yaml"
    file.write_text(f"# @package _global_\n{text}\n")
    for module in (running_compose, running_keys):
        monkeypatch.setattr(module, "config_dir", lambda: tmp_path / "conf")
    running_keys.groups.cache_clear()
    try:
        said = refusal(MODEL, "experiment=mine")
    finally:
        monkeypatch.undo()
        running_keys.groups.cache_clear()
    assert said.startswith(message)
    assert message.endswith(("of areal, ", "in ", "conf/: ")) or said == (
        f"{message} (in conf/experiment/mine.yaml)"
    )


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("run.name=007", "007"),
        ("run.name=1e3", "1e3"),
        ("run.name=true", "true"),
        ("run.name=2024-01-01", "2024-01-01"),
        ("run.name='null'", "null"),
        ("++run.name=3.0", "3.0"),
        ("run.name=s${run.steps}", "s100"),
        (r"run.name='\${x}'", "${x}"),
    ],
)
def test_texts_stay_what_was_typed(override: str, name: str) -> None:
    config, text = compose_config([MODEL, override])
    assert config.run.name == name
    assert OmegaConf.create(text).run.name == name


def test_a_plus_says_nothing_more() -> None:
    assert compose_config(["+experiment=quickstart_cpu"])[0].run.name == "quickstart_cpu"
    assert chosen_keys([MODEL, "++algo=dapo"]) == frozenset()


def test_missing_values_may_be_allowed() -> None:
    config, text = compose_config([], allow_missing=True)
    assert config.model.path == "unset"
    assert "path: ???\n" in text
    _, text = compose_config(["data=gsm8k"], allow_missing=True)
    assert text.count("???") == 2  # model.path and data.source
    assert compose_config([MODEL], allow_missing=True) == compose_config([MODEL])
    with pytest.raises(ValueError, match="must be at least 1; raise it"):
        compose_config(["run.steps=0"], allow_missing=True)


def test_an_unknown_experiment() -> None:
    message = refusal("experiment=nope")
    assert message.startswith("experiment = 'nope': must be one of ")
    assert all(name in message for name in EXPERIMENTS)


def test_a_missing_value() -> None:
    assert refusal() == "model.path = ???: is mandatory; set it, as in model.path=<value>"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["algo.surrogate.clip_low=-2"],
            "algo.surrogate.clip_low = -2.0: must be positive and finite; the usual value is 0.2",
        ),
        (["rollout.servers.count=0"], "rollout.servers.count = 0: must be at least 1; raise it"),
        (["reward=function"], "reward.function = None: is needed with reward.kind=function"),
        (["rollout=external"], "rollout.servers.urls = []: is needed with mode=external"),
    ],
)
def test_values_out_of_range_keep_their_own_message(overrides: list[str], message: str) -> None:
    """``__post_init__`` runs inside OmegaConf, which adds nothing to the line."""
    assert refusal(MODEL, *overrides).startswith(message)


def test_free_dicts_take_any_key_without_a_plus() -> None:
    config, _ = compose_config(
        [
            MODEL,
            "rollout.servers.args.mem-fraction-static=0.8",
            "+rollout.servers.args.log-level=info",
            "parallel.megatron={recompute_granularity: full}",
        ]
    )
    assert config.rollout.servers.args == {"mem-fraction-static": 0.8, "log-level": "info"}
    assert config.parallel.megatron == {"recompute_granularity": "full"}


def test_groups() -> None:
    config, _ = compose_config(
        [MODEL, "rollout=external", "rollout.servers.urls=[http://a:1]", "reward=gsm8k"]
    )
    assert config.rollout.servers.mode is ServerMode.external
    assert config.rollout.servers.urls == ["http://a:1"]
    assert config.reward.kind is RewardKind.gsm8k


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=quickstart_cpu"],
        [MODEL, "run.name='0123'", "data.chat=true", "data.system='off: \"a\"\n# ü ${run.seed}'"],
        [MODEL, "optim.lr=1e-6", "rollout.max_canary_gap=1e-4", "logger.wandb=off"],
    ],
)
def test_the_yaml_reads_back_as_the_same_config(overrides: list[str], tmp_path: Path) -> None:
    config, text = compose_config(overrides)
    path = tmp_path / "config.yaml"
    path.write_text(text)
    merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
    assert OmegaConf.to_object(merged) == config
    assert list(OmegaConf.create(text)) == [field.name for field in fields(Config)]


def test_composing_twice_in_a_process() -> None:
    assert compose_config([MODEL]) == compose_config([MODEL])


def test_experiments_leave_the_objective_to_its_preset() -> None:
    """Else ``experiment=x algo=gspo`` would be neither."""
    for path in (config_dir() / "experiment").glob("*.yaml"):
        assert "algo" not in OmegaConf.load(path)


@pytest.mark.parametrize(
    ("overrides", "chosen"),
    [
        ([], set()),
        (["algo=areal", "experiment=quickstart_cpu", "run.steps=3"], set()),
        (["algo.kl.coef=0.1", "rollout.group_size=4"], {"algo.kl.coef"}),
        (["algo.kl.coef=0.04"], {"algo.kl.coef"}),  # said, though the preset says the same
        (["algo=dapo", "algo.surrogate={clip_low: 0.1}"], {"algo.surrogate.clip_low"}),
    ],
)
def test_what_the_user_has_chosen(overrides: list[str], chosen: set[str]) -> None:
    assert chosen_keys([MODEL, *overrides]) == chosen


def test_one_source_or_several() -> None:
    several = "data.source=[a.jsonl,'b c.parquet']"
    config, text = compose_config([MODEL, several, "data.held_out=t.jsonl"])
    assert config.data.source == ["a.jsonl", "b c.parquet"]
    assert config.data.held_out == "t.jsonl"
    assert OmegaConf.create(text).data.source == config.data.source
    assert refusal(MODEL, "data.source=a.jsonl,b.jsonl") == (
        "data.source = a.jsonl,b.jsonl: is a list; write 'data.source=[a.jsonl,b.jsonl]'"
    )
    rule = "must be the path of a file, or a list of such; write it as in data.source=a.jsonl or "
    for value, shown in (("[5,a]", "[5,a]"), ("[]", "[]"), ("{a: 1}", "{a:1}"), ("null", "None")):
        found = refusal(MODEL, f"data.source={value}")
        assert found == f"data.source = {shown}: {rule}'data.source=[a.jsonl,b.jsonl]'"


def test_variables_of_the_chat_template() -> None:
    data = ["data=jsonl", "data.source=a.jsonl"]
    for form in ("data.template_args={enable_thinking: false}",
                 "data.template_args.enable_thinking=false"):  # fmt: skip
        config, _ = compose_config([MODEL, *data, form])
        assert config.data.template_args == {"enable_thinking": False}


def test_epochs_stand_in_place_of_steps() -> None:
    """An experiment's run.steps gives way; the user's own does not."""
    data = "data.source=arithmetic"
    quickstart = ["experiment=quickstart_cpu", "run.epochs=2"]
    assert compose_config(quickstart)[0].run.epochs == 2
    config, text = compose_config([*quickstart, "run.steps=7", "run.epochs=null"])
    assert (config.run.steps, config.run.epochs) == (7, None)
    assert OmegaConf.create(text).run.steps == 7
    assert refusal(MODEL, data, "run.steps=7", "run.epochs=2") == (
        "run.epochs = 2.0: stands in place of run.steps, which is given, too; leave one of the two "
        "out, or set run.epochs=null"
    )
    assert "run.epochs" in refusal(MODEL, data, "run.epochs=0")
