"""From the command line to a Config: what is refused, and how it is said."""

from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from peergrad.config import Aggregation, Config, Dtype, RewardKind, ServerMode
from peergrad.running.compose import chosen_keys, compose_config, config_dir

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
            "algo.surrogate.clip_lo: there is no such key in SurrogateConfig; "
            "did you mean algo.surrogate.clip_low?",
        ),
        (
            "rollout.servers.cout=3",
            "rollout.servers.cout: there is no such key in ServersConfig; "
            "did you mean rollout.servers.count?",
        ),
        (
            "clip_low=0.3",
            "clip_low: there is no such key in Config; did you mean algo.surrogate.clip_low?",
        ),
        ("alg=dapo", "alg: there is no such key in Config; did you mean algo?"),
        ("algo.foo=3", "algo.foo: there is no such key in AlgoConfig; did you mean algo."),
        ("a.b=3", "a: there is no such key in Config; see conf/ and src/peergrad/config/"),
        (
            "+algo.kl.coeff=0.1",  # Hydra's own check does not look at added keys
            "algo.kl.coeff: there is no such key in KlConfig; did you mean algo.kl.coef?",
        ),
        ("+a=3", "a: there is no such key in Config; see conf/ and src/peergrad/config/"),
        ("algo=dappo", "algo = 'dappo': there is no such option; use one of areal cispo dapo"),
        ("rollout=x", "rollout = 'x': there is no such option; use one of external managed"),
    ],
)
def test_unknown_keys_and_options(override: str, message: str) -> None:
    assert refusal(MODEL, override).startswith(message)


def test_an_unknown_experiment() -> None:
    message = refusal("experiment=nope")
    assert message.startswith("experiment = 'nope': there is no such option; use one of ")
    assert all(name in message for name in EXPERIMENTS)


@pytest.mark.parametrize(
    ("override", "start", "detail"),
    [
        ("algo.surrogate.clip_low=abc", "algo.surrogate.clip_low: ", "'abc'"),
        ("run.steps=1.5", "run.steps: ", "1.5"),
        ("run.steps=true", "run.steps: ", "Integer"),
        ("algo.kl.coef=null", "algo.kl.coef: ", "not Optional"),
        ("model.dtype=float16", "model.dtype: ", "[float32, bfloat16]"),
        ("rollout.stop_token_ids=[a]", "rollout.stop_token_ids: ", "'a'"),
        ("rollout.servers.urls=abc", "rollout.servers.urls: ", "list"),
        ("run=3", "run: ", "RunConfig"),
        ("run.name=${nope}", "run.name: ", "nope"),
    ],
)
def test_wrong_types_name_the_key(override: str, start: str, detail: str) -> None:
    message = refusal(MODEL, override)
    assert message.startswith(start) and detail in message and message.endswith("; correct it")


@pytest.mark.parametrize("override", ["run.=3", "algo.epochs", "--foo", "a b", "run.name=a=b"])
def test_what_is_no_override_is_quoted(override: str) -> None:
    assert refusal(MODEL, override) == (
        f"{override!r}: cannot be read as an override; write key=value or group=option"
    )


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
    found = chosen_keys([MODEL, *overrides])
    assert found >= chosen
    whole = any(override.startswith("algo.surrogate=") for override in overrides)
    assert whole or found == chosen  # a section that is named is chosen as a whole
