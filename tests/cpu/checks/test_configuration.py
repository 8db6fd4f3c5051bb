"""Checks across sections, against a model's shape and the number of processes."""

import json
import re
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from peergrad.checks import check
from peergrad.config import (
    Config,
    Dtype,
    Fp8,
    Fp8Serving,
    OldPolicy,
    Recompute,
    RecomputeMethod,
    Replay,
    Schedule,
)

SHAPE = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "head_dim": 16,
    "vocab_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "max_position_embeddings": 512,
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """64 rollouts in groups of 8 on a model of ``SHAPE``: fits one process."""
    model = write_model(tmp_path / "model")
    config = Config()
    config.model.path = str(model)
    config.data.source, config.data.max_prompt_tokens = "arithmetic", 112
    config.rollout.batch_size, config.rollout.max_new_tokens = 64, 400
    return config


def write_model(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SHAPE, **changes}))
    return folder


def refusal(config: Config, world: int = 1) -> str:
    with pytest.raises(ValueError) as caught:
        check(config, world=world)
    message = str(caught.value)
    assert re.fullmatch(r"[\w.]+ = .+: .+; .+", message), message  # one line
    return message


@pytest.mark.parametrize(
    ("tensor", "pipeline", "data", "world"),
    [(1, 1, None, 1), (1, 1, None, 8), (2, 1, None, 4), (4, 3, None, 12), (2, 2, 2, 8)],
)
def test_layouts_that_work(
    config: Config, tensor: int, pipeline: int, data: int | None, world: int
) -> None:
    config.parallel.tensor, config.parallel.pipeline = tensor, pipeline
    config.parallel.data = data
    check(config, world=world)


@pytest.mark.parametrize(
    ("tensor", "changes", "what"),
    [
        (3, {}, "8 attention heads"),
        (4, {"intermediate_size": 98}, "98 MLP columns"),
        (
            256,
            dict.fromkeys(("num_attention_heads", "num_key_value_heads", "intermediate_size"), 256),
            "128 padded vocabulary rows",
        ),
    ],
)
def test_the_tensor_size_divides_the_model(
    config: Config, tensor: int, changes: dict[str, int], what: str
) -> None:
    write_model(Path(config.model.path), **changes)
    config.parallel.tensor = tensor
    message = refusal(config, world=tensor)
    assert message.startswith(f"parallel.tensor = {tensor}: must divide the model's {what}; ")


def test_ranks_divide_the_key_value_heads_or_share_them(config: Config) -> None:
    config.parallel.tensor = 8  # two ranks to each of 4
    check(config, world=8)
    write_model(Path(config.model.path), num_attention_heads=12, num_key_value_heads=6)
    config.parallel.tensor = 4
    rule = "must divide the model's 6 key-value heads, or be a multiple of them; use a divisor of 6"
    assert refusal(config, world=4) == f"parallel.tensor = 4: {rule}"


def test_with_null_key_value_heads_all_heads_have_their_own(config: Config) -> None:
    write_model(Path(config.model.path), num_key_value_heads=None)
    config.parallel.tensor = 8
    check(config, world=8)


def test_the_pipeline_size_divides_the_layers(config: Config) -> None:
    config.parallel.pipeline = 4
    message = refusal(config, world=4)
    assert message.startswith("parallel.pipeline = 4: must divide the model's 6 layers; ")


FULL = {"recompute": Recompute.full}


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"pipeline": 3}, None),
        ({"pipeline": 3, "virtual_pipeline": 2}, None),
        (
            {"pipeline": 2, "virtual_pipeline": 2},
            "parallel.pipeline = 2: times parallel.virtual_pipeline = 2 must divide the model's 6 ",
        ),
        ({"pipeline": 2, "first_stage_layers": 2}, None),
        ({"pipeline": 2, "first_stage_layers": 2, "last_stage_layers": 4}, None),
        (
            {"pipeline": 2, "first_stage_layers": 2, "last_stage_layers": 3},
            "parallel.first_stage_layers = 2: leaves, with parallel.last_stage_layers = 3, 1 of 6 ",
        ),
        ({"pipeline": 4, "first_stage_layers": 1, "last_stage_layers": 1}, None),
        (
            {"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 4, "last_stage_layers": 2},
            "parallel.last_stage_layers = 2: is what parallel.first_stage_layers leaves; ",
        ),
        (
            {**FULL, "recompute_layers": 4},
            "parallel.recompute_layers = 4: must divide the 6 layers that lie one behind the o",
        ),
        ({**FULL, "recompute_layers": 3}, None),
        (
            {"pipeline": 2, **FULL, "recompute_layers": 2},
            "parallel.recompute_layers = 2: must divide the 3 layers that ",
        ),
        (
            {"pipeline": 2, "first_stage_layers": 4, "recompute_layers": 4, **FULL},
            "parallel.recompute_layers = 4: must divide the 2 layers that ",
        ),
        ({"pipeline": 2, "first_stage_layers": 4, "recompute_layers": 2, **FULL}, None),
        ({"recompute_layers": 4, "recompute_method": RecomputeMethod.block, **FULL}, None),
        (
            {"recompute_method": RecomputeMethod.block},
            "parallel.recompute_method = 'block': has no effect without parallel.recompute=full; ",
        ),
        (
            {"pipeline": 3, "last_stage_layers": 1},
            "parallel.last_stage_layers = 1: leaves 5 of 6 layers to the 2 other pipeline ranks, "
            "which must divide them; change one of them",
        ),
        (
            {"pipeline": 3, "last_stage_layers": 6},
            "parallel.last_stage_layers = 6: leaves 0 of 6 layers to the 2 other pipeline ranks",
        ),
        (
            {"pipeline": 3, "virtual_pipeline": 2, "last_stage_layers": 1},
            "parallel.last_stage_layers = 1: must be a multiple of parallel.virtual_pipeline = 2; ",
        ),
    ],
)
def test_stages_share_the_layers(config: Config, changes: dict[str, Any], rule: str | None) -> None:
    if rule is None:
        config.parallel = replace(config.parallel, **changes)
        check(config, world=config.parallel.pipeline)
        return
    with pytest.raises(ValueError) as caught:
        config.parallel = replace(config.parallel, **changes)
        check(config, world=config.parallel.pipeline)
    assert str(caught.value).startswith(rule)


MIXTURE = {
    **{"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]},
    **{"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
}
SELECTIVE = {"recompute": Recompute.selective}


@pytest.mark.parametrize(
    ("changes", "world", "rule"),
    [
        ({"expert": 2}, 4, None),
        ({"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 1}, 2, None),
        ({"tensor": 2, "sequence": True, "expert": 3}, 6, None),
        ({"context": 2, "expert": 2, "pipeline": 2}, 4, None),
        ({**SELECTIVE, "recompute_modules": ["moe", "core_attn"]}, 1, None),
        ({"expert": 4}, 4, "parallel.expert = 4: must divide the model's 6 experts; "),
        (
            {"tensor": 2, "expert": 2, "expert_tensor": 1},
            2,
            "parallel.sequence = False: must be true with experts: each tensor rank sends its own ",
        ),
        (
            {"expert": 2, "expert_tensor": 5},
            10,
            "parallel.expert_tensor = 5: must divide the 48 columns of an expert; use a divisor of",
        ),
        (
            {"tensor": 2, "sequence": True, "expert": 2, "pipeline": 2},
            4,
            "parallel.expert = 2: times parallel.expert_tensor = 2 must divide the 2 ranks of a st",
        ),
        (
            {**SELECTIVE, "recompute_modules": ["mlp"]},
            1,
            "parallel.recompute_modules = ['mlp']: has no effect in a mixture of experts, whose ",
        ),
    ],
)
def test_experts_are_divided(
    config: Config, changes: dict[str, Any], world: int, rule: str | None
) -> None:
    write_model(Path(config.model.path), **MIXTURE)
    config.rollout.batch_size = 48 * 8
    config.parallel = replace(config.parallel, **changes)
    if rule is None:
        return check(config, world=world)
    assert refusal(config, world=world).startswith(rule)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("parallel.expert", 2),
        ("parallel.expert_tensor", 2),
        ("moe.aux_loss_coef", 1.0),
        ("moe.z_loss_coef", 0.01),
        ("moe.replay", Replay.on),
        ("parallel.recompute_modules", ["moe"]),
    ],
)
def test_what_is_said_of_experts_needs_some(config: Config, key: str, value: Any) -> None:
    config.parallel = replace(config.parallel, **SELECTIVE)
    section, _, name = key.partition(".")
    setattr(getattr(config, section), name, value)
    said = value.name if isinstance(value, Replay) else value
    rule = f"{key} = {said!r}: model.path is no mixture of experts (qwen3); "
    assert refusal(config, world=2).startswith(rule)
    # It is said of the policy; a reference without experts may stand beside it.
    config.model.reference = str(write_model(Path(f"{config.model.path}_dense")))
    write_model(Path(config.model.path), **MIXTURE)
    check(config, world=2)


@pytest.mark.parametrize(
    ("data", "world", "remedy"),
    [
        (None, 6, "start a multiple of 4 processes"),
        (None, 2, "start a multiple of 4 processes"),
        (2, 4, "start 8 processes"),
        (2, 16, "start 8 processes"),
    ],
)
def test_the_layout_fits_the_processes(
    config: Config, data: int | None, world: int, remedy: str
) -> None:
    config.parallel.tensor = config.parallel.pipeline = 2
    config.parallel.data = data
    message = refusal(config, world)
    assert message.startswith("parallel = 'tensor 2 x pipeline 2 x data ")
    assert f"must fit the {world} processes of this job; {remedy} " in message


def test_minibatches_divide_the_groups(config: Config) -> None:
    config.algo.minibatches = 3
    message = refusal(config)
    assert message.startswith("algo.minibatches = 3: must divide the 8 groups of a step ")
    config.algo.minibatches = 8
    check(config, world=8)


def test_minibatches_divide_over_the_ranks(config: Config) -> None:
    config.algo.minibatches = 4  # of 16 rollouts, not for 3 ranks
    message = refusal(config, world=3)
    assert message.startswith("rollout.batch_size = 64: each of the 4 mini-batches must divide ")
    config.rollout.batch_size = int(message.rpartition(" ")[2])  # use a multiple of ...
    check(config, world=3)


def test_prompt_and_answer_fit_the_context(config: Config) -> None:
    config.rollout.max_new_tokens = 401  # with 112 of the prompt one more than 512
    message = refusal(config)
    assert message.startswith(
        "rollout.max_new_tokens = 401: with data.max_prompt_tokens (112) exceeds the model's "
        "context of 512 tokens; "
    )


def test_logits_are_not_coarser_than_the_model(config: Config) -> None:
    config.kernels.logits, config.model.dtype = Dtype.bfloat16, Dtype.float32
    assert refusal(config).startswith(
        "kernels.logits = 'bfloat16': rounds what a model in float32 (model.dtype) computes"
    )
    config.model.dtype = Dtype.bfloat16
    check(config, world=1)


def test_a_precise_optimizer_is_distributed_and_has_coarse_weights(config: Config) -> None:
    config.optim.use_precision_aware_optimizer = True
    config.model.dtype, config.parallel.distributed_optimizer = Dtype.float32, False
    key = "optim.use_precision_aware_optimizer = True: "
    assert refusal(config).startswith(f"{key}needs parallel.distributed_optimizer; ")
    config.parallel.distributed_optimizer = True
    assert refusal(config).startswith(f"{key}has no effect on weights in float32, ")
    config.model.dtype = Dtype.bfloat16
    check(config, world=1)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model.dtype": Dtype.float32}, "parallel.fp8 = 'blockwise': is for a model in bfloat16"),
        (
            {"parallel.tensor": 4, "parallel.sequence": True},
            "parallel.fp8 = 'blockwise': needs multiples of 128, and a tensor rank has a hidden "
            "size of 64, 64; use fewer tensor ranks, or fp8=off",
        ),
        (
            {"parallel.tensor": 4},
            "parallel.fp8 = 'blockwise': needs multiples of 16, and a tensor rank has columns of "
            "the MLP, 24; ",
        ),
        (
            {"parallel.fp8_params": True, "optim.optimizer_cpu_offload": True},
            "optim.optimizer_cpu_offload = True: Megatron has no main weights so of parameters",
        ),
        ({"parallel.fp8_first_layers_bf16": 7}, "parallel.fp8_first_layers_bf16 = 7: must be at "),
        (
            {"parallel.fp8_first_layers_bf16": 3, "parallel.fp8_last_layers_bf16": 3},
            "parallel.fp8_last_layers_bf16 = 3: leaves none of the 6 layers in 8 bits; ",
        ),
        (
            {"parallel.fp8_reference": False, "algo.kl.coef": 0.0},
            "parallel.fp8_reference = False: has no effect: there is no reference",
        ),
        (
            {"parallel.fp8_score": False},
            "parallel.fp8_score = False: has no effect: no pass takes logprobs of the old policy",
        ),
        ({"parallel.tensor": 2, "parallel.fp8_score": False, "algo.minibatches": 2}, None),
    ],
)
def test_products_in_8_bits_fit_the_model(
    config: Config, changes: dict[str, Any], line: str | None
) -> None:
    config.parallel.fp8 = Fp8.blockwise
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        setattr(attrgetter(section)(config), name, value)
    world = config.parallel.tensor
    if line is None:
        check(config, world=world)
    else:
        assert refusal(config, world).startswith(line)


@pytest.mark.parametrize(
    ("form", "changes", "line"),
    [
        (Fp8Serving.block, {}, None),
        (Fp8Serving.flash_rl, {}, None),
        (
            *(Fp8Serving.block, {"dtype": Dtype.float32}),
            "rollout.servers.fp8 = 'block': is for a model in bfloat16, and model.dtype = float32",
        ),
        (Fp8Serving.block, {"tensor": 4}, "rollout.servers.fp8 = 'block': needs multiples of 128"),
        (
            *(Fp8Serving.flash_rl, {"family": "llama"}),
            "rollout.servers.fp8 = 'flash_rl': SGLang knows qwen2 and qwen3 alone, and model.path "
            "is of llama; serve it in bfloat16",
        ),
        (Fp8Serving.block, {"family": "llama"}, "rollout.servers.fp8 = 'block': SGLang 0.5.23 "),
    ],
)
def test_models_fit_what_servers_hold(
    config: Config, tmp_path: Path, form: Fp8Serving, changes: dict[str, Any], line: str | None
) -> None:
    named = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
    family = changes.get("family", "qwen3")
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256}
    kind = {"model_type": family, "architectures": [named[family]]}
    config.model.path = str(write_model(tmp_path / "served", **sizes, **kind))
    config.model.dtype = changes.get("dtype", Dtype.bfloat16)
    config.rollout.servers.tensor = changes.get("tensor", 1)
    config.rollout.servers.fp8 = form
    if line is None:
        check(config, world=1)
    else:
        assert refusal(config).startswith(line)


@pytest.mark.parametrize("key", ["path", "reference"])
def test_model_folders_must_exist(config: Config, key: str, tmp_path: Path) -> None:
    setattr(config.model, key, str(tmp_path / "nowhere"))
    message = refusal(config)
    assert message.startswith(f"model.{key} = '{tmp_path}/nowhere': must be a folder with an HF ")


@pytest.mark.parametrize("key", ["path", "reference"])
def test_models_that_cannot_be_trained(config: Config, key: str, tmp_path: Path) -> None:
    """tests/cpu/parallel/test_hf_config.py has all of them."""
    folder = write_model(tmp_path / "other", rope_scaling={"type": "dynamic"})
    setattr(config.model, key, str(folder))
    assert refusal(config).startswith(f"model.{key} = {str(folder)!r}: rope_scaling = ")


def test_the_engine_must_know_the_model(config: Config, tmp_path: Path) -> None:
    write_model(Path(config.model.path), architectures=None)
    assert refusal(config) == (
        f"model.path = {config.model.path!r}: config.json has no architectures, by which SGLang "
        'knows a model; add "architectures": ["Qwen3ForCausalLM"] to it'
    )
    (tmp_path / "rollouts").mkdir()
    config.rollout.replay = str(tmp_path)  # without an engine
    check(config, world=1)


@pytest.mark.parametrize("key", ["source", "held_out"])
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("missing.jsonl", "there is no such file; correct the path"),
        ("prompts.csv", "must be arithmetic or a .jsonl or .parquet file; convert it"),
        ("folder.jsonl", "is a folder, not a file; "),
    ],
)
def test_data_files_must_exist(
    config: Config, tmp_path: Path, key: str, name: str, rule: str
) -> None:
    (tmp_path / "prompts.csv").touch()
    (tmp_path / "folder.jsonl").mkdir()
    config.rollout.max_new_tokens = 10**6  # does not matter before there are prompts
    setattr(config.data, key, str(tmp_path / name))
    assert refusal(config).startswith(f"data.{key} = '{tmp_path}/{name}': {rule}")


def test_data_files_that_exist(config: Config, tmp_path: Path) -> None:
    for key, name in (("source", "train.jsonl"), ("held_out", "test.parquet")):
        (tmp_path / name).touch()
        setattr(config.data, key, str(tmp_path / name))
    check(config, world=1)
    config.data.held_out = None
    check(config, world=1)


def test_replay_needs_recorded_rollouts(config: Config, tmp_path: Path) -> None:
    config.rollout.replay = str(tmp_path)
    assert refusal(config).startswith(f"rollout.replay = '{tmp_path}': must be a run folder ")
    (tmp_path / "rollouts").mkdir()
    check(config, world=1)


def test_weights_must_be_a_checkpoint(config: Config, tmp_path: Path) -> None:
    config.model.weights = str(tmp_path)
    assert refusal(config).startswith(f"model.weights = '{tmp_path}': must be a checkpoint folder ")
    (tmp_path / "meta.json").touch()
    check(config, world=1)


def test_a_replay_keeps_what_its_logprobs_were_drawn_with(config: Config, tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    recorded = "rollout: {temperature: 0.7, batch_size: 64, group_size: 8}"
    (tmp_path / "config.yaml").write_text(recorded)
    config.rollout.replay = str(tmp_path)
    assert refusal(config).startswith("rollout.temperature = 1.0: the run to replay was recorded")
    config.rollout.temperature = 0.7
    check(config, world=1)
    for text in ("", "rollout:", "rollout: {temperature: 0.7}", "a: [", "- 1", "\xff"):
        (tmp_path / "config.yaml").write_text(text, encoding="latin-1")
        assert refusal(config).startswith(
            f"rollout.replay = '{tmp_path}': its config.yaml cannot be read ("
        )


def test_a_reference_must_speak_the_policys_language(config: Config, tmp_path: Path) -> None:
    write_model(tmp_path / "model", vocab_size=144)
    config.model.reference = str(write_model(tmp_path / "reference", vocab_size=112))
    assert "a vocabulary of 112" in refusal(config)
    config.model.reference = config.model.path
    check(config, world=1)
    config.algo.kl.coef = 0.0
    assert refusal(config).startswith("model.reference = ") and "no effect" in refusal(config)


def test_an_overlong_penalty_fits_the_answers(config: Config) -> None:
    config.algo.shaping.overlong_tokens = config.rollout.max_new_tokens + 1
    assert refusal(config).startswith("algo.shaping.overlong_tokens = ")
    config.algo.shaping.overlong_tokens -= 1
    check(config, world=1)


def test_loglinear_needs_versions_to_lie_between(config: Config) -> None:
    config.algo.old_policy = OldPolicy.loglinear
    assert refusal(config).startswith("algo.old_policy = 'loglinear': lies between weight versions")
    config.rollout.max_staleness = 1
    check(config, world=1)


def test_a_reference_to_be_replaced_has_the_policys_shape(config: Config, tmp_path: Path) -> None:
    config.model.reference = str(write_model(tmp_path / "reference", num_hidden_layers=12))
    check(config, world=1)
    config.algo.kl.reset_every = 5
    assert refusal(config).startswith(
        "algo.kl.reset_every = 5: the policy is to become the reference, but model.reference "
        "differs in ['layers']; "
    )


@pytest.mark.parametrize("ids", [[-1], [3, 128], [10**9]])
def test_stop_tokens_are_ids_of_the_model(config: Config, ids: list[int]) -> None:
    config.rollout.stop_token_ids = ids
    assert refusal(config) == (
        f"rollout.stop_token_ids = {ids}: must be ids of the model's vocabulary, 0 to 127; "
        "correct them"
    )
    config.rollout.stop_token_ids = [0, 127]
    check(config, world=1)


def test_the_warm_up_ends_before_the_run(config: Config) -> None:
    config.run.steps, config.algo.epochs, config.algo.minibatches = 3, 2, 2
    config.optim.warmup_steps = 12
    assert refusal(config).startswith(
        "optim.warmup_steps = 12: optim.lr would never be reached: run.steps is 12 optimizer steps"
    )
    config.optim.warmup_steps = 11
    check(config, world=1)
    config.optim.schedule, config.optim.decay_steps = Schedule.cosine, 2
    assert refusal(config).endswith(
        "optim.decay_steps is 8 optimizer steps; lower it, or raise optim.decay_steps"
    )


def test_epochs_are_not_counted_in_steps(config: Config, tmp_path: Path) -> None:
    """What depends on their number is checked once the prompts are read; a replay reads none."""
    config.run.epochs, config.run.steps, config.optim.warmup_steps = 2, 1, 50
    check(config, world=1)
    (tmp_path / "rollouts").mkdir()
    config.rollout.replay = str(tmp_path)
    assert refusal(config) == (
        f"run.epochs = 2: counts prompts, and a replay ({tmp_path}) reads none; set run.steps "
        "instead"
    )


def test_staleness_ends_with_the_run(config: Config) -> None:
    config.run.steps, config.rollout.max_staleness = 3, 4
    assert refusal(config).startswith("rollout.max_staleness = 4: exceeds the 3 steps of the run")
    config.rollout.max_staleness = 3
    check(config, world=1)


def test_a_punished_length_is_one_that_can_be_reached(config: Config) -> None:
    config.algo.shaping.overlong_tokens = 401
    message = refusal(config)
    assert message == (
        "algo.shaping.overlong_tokens = 401: must not exceed rollout.max_new_tokens (400); "
        "use about 80"
    )
    config.algo.shaping.overlong_tokens = 400
    check(config, world=1)


def test_loglinear_lies_between_versions(config: Config) -> None:
    config.algo.old_policy = OldPolicy.loglinear
    assert refusal(config) == (
        "algo.old_policy = 'loglinear': lies between weight versions, but rollout.max_staleness "
        "= 0 allows only one; set rollout.max_staleness, or algo.old_policy=auto"
    )
    config.rollout.max_staleness = 1
    check(config, world=1)


@pytest.mark.parametrize("name", ["a:b", "50%", "x" * 101])
def test_wandb_can_name_the_run(config: Config, name: str) -> None:
    config.run.name = name
    check(config, world=1)
    config.logger.wandb = "offline"
    assert refusal(config).startswith(f"run.name = {name!r}: is no name for logger.wandb: at ")
