"""Checks that need more than one section of the configuration, before anything is started."""

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from peergrad.config import Config, Dtype, OldPolicy, require

NEEDED = (
    "num_attention_heads",
    "intermediate_size",
    "num_hidden_layers",
    "max_position_embeddings",
)
"""What the checks read of an HF config.json; a model without it is none of the supported kind."""


SHAPE = (*NEEDED[:3], "hidden_size", "num_key_value_heads", "head_dim", "tie_word_embeddings")


def check(config: Config, *, world: int) -> None:
    """Raise ValueError with one line if this run cannot work as configured on ``world``
    processes."""
    model = read_model_config(config.model.path, "model.path")
    _check_layout(config, model, world)
    if config.model.reference is not None:
        _check_reference(config, config.model.reference, model, world)
        _check_renewal(config, config.model.reference, model)
    _check_replay(config)
    _check_batch(config, world)
    _check_lengths(config, model)
    _check_objective(config)
    _check_kernels(config)
    _check_sources(config)


def read_model_config(path: str, key: str) -> dict[str, Any]:
    """config.json of an HF folder."""
    file = Path(path) / "config.json"
    require(
        file.is_file(),
        key,
        path,
        "must be a folder with an HF checkpoint (config.json is missing)",
        "correct the path, or make a tiny model with tools/make_tiny_model.py",
    )
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        rule = f"config.json is not JSON ({error})"
        raise ValueError(f"{key} = {path!r}: {rule}; download it again") from error
    for name in NEEDED:
        require(name in found, key, path, f"config.json has no {name}", "choose another model")
    return found


def _check_reference(config: Config, path: str, model: dict[str, Any], world: int) -> None:
    reference = read_model_config(path, "model.reference")
    _check_layout(config, reference, world)
    require(
        reference["vocab_size"] == model["vocab_size"],
        "model.reference",
        path,
        f"has a vocabulary of {reference['vocab_size']}, the policy one of {model['vocab_size']}",
        "use a reference with the same tokenizer",
    )
    require(
        config.algo.kl.coef > 0,
        "model.reference",
        path,
        "has no effect with algo.kl.coef = 0",
        "unset it, or set algo.kl.coef",
    )


def _check_renewal(config: Config, path: str, model: dict[str, Any]) -> None:
    """A reference that the policy is to replace has its shape."""
    reference = read_model_config(path, "model.reference")
    other = [name for name in SHAPE if reference.get(name) != model.get(name)]
    require(
        config.algo.kl.reset_every == 0 or not other,
        "algo.kl.reset_every",
        config.algo.kl.reset_every,
        f"the policy is to become the reference, but model.reference differs in {other[:1]}",
        "set it to 0, or use a reference of the policy's shape",
    )


def _check_replay(config: Config) -> None:
    """Recorded logprobs are those of the recorded temperature; groups come as they were
    recorded."""
    recorded = Path(config.rollout.replay or "") / "config.yaml"
    if config.rollout.replay is None or not recorded.is_file():
        return
    theirs = OmegaConf.load(recorded).rollout
    for key in ("temperature", "batch_size", "group_size"):
        require(
            getattr(config.rollout, key) == theirs[key],
            f"rollout.{key}",
            getattr(config.rollout, key),
            f"the run to replay was recorded with {theirs[key]}",
            f"set rollout.{key}={theirs[key]}",
        )


def _check_layout(config: Config, model: dict[str, Any], world: int) -> None:
    parallel = config.parallel
    tensor, pipeline = parallel.tensor, parallel.pipeline
    heads = model["num_attention_heads"]
    divided = {
        "attention heads": heads,
        "key-value heads": model.get("num_key_value_heads", heads),
        "MLP columns": model["intermediate_size"],
        "padded vocabulary rows": 16,
    }
    for what, number in divided.items():
        require(
            number % tensor == 0,
            "parallel.tensor",
            tensor,
            f"must divide the model's {number} {what}",
            f"use a divisor of {number}",
        )
    layers = model["num_hidden_layers"]
    require(
        layers % pipeline == 0,
        "parallel.pipeline",
        pipeline,
        f"must divide the model's {layers} layers",
        f"use a divisor of {layers}",
    )
    wanted = tensor * pipeline * (parallel.data or 1)
    ok = world == wanted if parallel.data else world % wanted == 0
    require(
        ok,
        "parallel",
        f"tensor {tensor} x pipeline {pipeline} x data {parallel.data or 'any'}",
        f"must fit the {world} processes of this job",
        f"start {wanted if parallel.data else f'a multiple of {wanted}'} processes "
        "(torchrun --nproc-per-node), or change the layout",
    )


def _check_batch(config: Config, world: int) -> None:
    rollout, parts = config.rollout, config.algo.minibatches
    ranks = world // (config.parallel.tensor * config.parallel.pipeline)
    require(
        rollout.prompts_per_step % parts == 0,
        "algo.minibatches",
        parts,
        f"must divide the {rollout.prompts_per_step} groups of a step "
        f"(rollout.batch_size {rollout.batch_size} / rollout.group_size {rollout.group_size})",
        "change one of the three",
    )
    require(
        rollout.batch_size // parts % ranks == 0,
        "rollout.batch_size",
        rollout.batch_size,
        f"each of the {parts} mini-batches must divide evenly over the {ranks} data-parallel ranks",
        f"use a multiple of {ranks * parts * rollout.group_size}",
    )


def _check_lengths(config: Config, model: dict[str, Any]) -> None:
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    limit = model["max_position_embeddings"]
    require(
        longest <= limit,
        "rollout.max_new_tokens",
        config.rollout.max_new_tokens,
        f"with data.max_prompt_tokens ({config.data.max_prompt_tokens}) exceeds the model's "
        f"context of {limit} tokens",
        "lower one of the two",
    )


def _check_kernels(config: Config) -> None:
    logits, weights = config.kernels.logits, config.model.dtype
    require(
        logits in (Dtype.float32, weights),
        "kernels.logits",
        logits.name,
        f"rounds what a model in {weights.name} (model.dtype) computes more exactly",
        "set kernels.logits=float32",
    )


def _check_objective(config: Config) -> None:
    longest, cache = config.rollout.max_new_tokens, config.algo.shaping.overlong_tokens
    require(
        cache <= longest,
        "algo.shaping.overlong_tokens",
        cache,
        f"must not exceed rollout.max_new_tokens ({longest})",
        f"use about {max(1, longest // 5)}",
    )
    require(
        config.algo.old_policy is not OldPolicy.loglinear or config.rollout.max_staleness > 0,
        "algo.old_policy",
        "loglinear",
        "lies between weight versions, but rollout.max_staleness = 0 allows only one",
        "set rollout.max_staleness, or algo.old_policy=auto",
    )


def _check_sources(config: Config) -> None:
    sources = {"data.source": config.data.source, "data.held_out": config.data.held_out}
    for key, source in sources.items():
        require(
            source in (None, "arithmetic") or _is_data_file(Path(source)),
            key,
            source,
            "must be 'arithmetic' or an existing .jsonl or .parquet file",
            "correct the path",
        )
    replay = config.rollout.replay
    require(
        replay is None or (Path(replay) / "rollouts").is_dir(),
        "rollout.replay",
        replay,
        "must be a run folder with recorded rollouts",
        "name a run that had rollout.dump=true",
    )
    weights = config.model.weights
    require(
        weights is None or (Path(weights) / "meta.json").is_file(),
        "model.weights",
        weights,
        "must be a checkpoint folder (meta.json is missing)",
        "name a step folder written by a run or by tools/hf_to_megatron.py",
    )


def _is_data_file(path: Path) -> bool:
    return path.suffix in (".jsonl", ".parquet") and path.is_file()
