"""The configuration against itself, the shape of the model and the number of processes."""

from pathlib import Path

from peergrad.algo.plan import Old, make_plan
from peergrad.checks.fp8 import check_serving_form
from peergrad.checks.layout import check_batch, check_layout
from peergrad.checks.recording import check_recording
from peergrad.config import WANDB_REFUSES, Config, Dtype, Fp8, OldPolicy, StateDtype, require
from peergrad.parallel import engine
from peergrad.parallel.hf.config import Shape, read_shape
from peergrad.parallel.hf.families import FAMILIES
from peergrad.parallel.hf.source import read_model_config
from peergrad.prompts import check_source


def check(config: Config, *, world: int) -> None:
    """Raise ValueError with one line if this run cannot work as configured on ``world``
    processes. Reads names, config.json and nothing else; imports nothing heavy."""
    shape = read_shape(config.model.path)
    reference = None
    if config.model.reference is not None:
        reference = read_shape(config.model.reference, "model.reference")
    _check_sources(config)
    check_engine(config, shape)
    check_layout(config, shape, world)
    if reference is not None:
        check_layout(config, reference, world, learns=False)
        _check_reference(config, reference, shape)
    check_recording(config)
    check_batch(config, world)
    check_lengths(config, shape)
    check_ids(config, shape)
    _check_epochs(config)
    if config.run.epochs is None:  # else once their number is known
        check_steps(config)
    _check_objective(config)
    _check_kernels(config)
    _check_states(config)
    _check_fp8(config)
    engine.require_attention(config.parallel.megatron.get("attention_backend", "auto"))
    _check_name(config)


def _check_sources(config: Config) -> None:
    check_source(config.data.source, "data.source")
    if config.data.held_out is not None:
        check_source(config.data.held_out, "data.held_out")
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


def check_engine(config: Config, shape: Shape) -> None:
    """SGLang chooses its implementation by a name that transformers can do without, and holds the
    weights as it is told to."""
    path, name = config.model.path, FAMILIES[shape.family].architecture
    named = read_model_config(path, "model.path").get("architectures")
    require(
        named is not None or config.rollout.replay is not None,
        "model.path",
        path,
        "config.json has no architectures, by which SGLang knows a model",
        f'add "architectures": ["{name}"] to it',
    )
    check_serving_form(config, shape)


def _check_reference(config: Config, reference: Shape, policy: Shape) -> None:
    """It speaks the policy's language; one that the policy is to replace has its shape."""
    path = config.model.reference
    require(
        config.algo.kl.coef > 0,
        "model.reference",
        path,
        "has no effect with algo.kl.coef = 0",
        "unset it, or set algo.kl.coef",
    )
    require(
        reference.vocab == policy.vocab,
        "model.reference",
        path,
        f"has a vocabulary of {reference.vocab}, the policy one of {policy.vocab}",
        "use a reference with the same tokenizer",
    )
    theirs, ours = vars(reference), vars(policy)
    other = [name for name in theirs if theirs[name] != ours[name]]
    require(
        config.algo.kl.reset_every == 0 or not other,
        "algo.kl.reset_every",
        config.algo.kl.reset_every,
        f"the policy is to become the reference, but model.reference differs in {other[:1]}",
        "set it to 0, or use a reference of the policy's shape",
    )


def check_lengths(config: Config, shape: Shape) -> None:
    """Prompt and answer fit into the model's context."""
    longest, limit = config.data.max_prompt_tokens + config.rollout.max_new_tokens, shape.max_length
    require(
        longest <= limit,
        "rollout.max_new_tokens",
        config.rollout.max_new_tokens,
        f"with data.max_prompt_tokens ({config.data.max_prompt_tokens}) exceeds the model's "
        f"context of {limit} tokens",
        "lower one of the two",
    )


def check_ids(config: Config, shape: Shape) -> None:
    """Stop tokens are tokens of the model."""
    ids, most = config.rollout.stop_token_ids, shape.vocab - 1
    require(
        all(0 <= token <= most for token in ids),
        "rollout.stop_token_ids",
        ids,
        f"must be ids of the model's vocabulary, 0 to {most}",
        "correct them",
    )


def _check_epochs(config: Config) -> None:
    replay = config.rollout.replay
    require(
        config.run.epochs is None or replay is None,
        "run.epochs",
        config.run.epochs,
        f"counts prompts, and a replay ({replay}) reads none",
        "set run.steps instead",
    )


def check_steps(config: Config) -> None:
    """Whatever is counted in steps fits into the run."""
    steps, algo = config.run.steps, config.algo
    key = "run.steps" if config.optim.decay_steps is None else "optim.decay_steps"
    total = min(steps, config.optim.decay_steps or steps) * algo.epochs * algo.minibatches
    require(
        config.optim.warmup_steps < total,
        "optim.warmup_steps",
        config.optim.warmup_steps,
        f"optim.lr would never be reached: {key} is {total} optimizer steps",
        f"lower it, or raise {key}",
    )
    require(
        config.rollout.max_staleness <= steps,
        "rollout.max_staleness",
        config.rollout.max_staleness,
        f"exceeds the {steps} steps of the run: all groups would be asked for at once",
        "lower it: 1 is one step off policy",
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


def _check_kernels(config: Config) -> None:
    logits, weights = config.kernels.logits, config.model.dtype
    require(
        logits in (Dtype.float32, weights),
        "kernels.logits",
        logits.name,
        f"rounds what a model in {weights.name} (model.dtype) computes more exactly",
        "set kernels.logits=float32",
    )


def _check_states(config: Config) -> None:
    """Megatron and Transformer Engine keep an optimizer's state otherwise under two conditions."""
    aware, key = config.optim.use_precision_aware_optimizer, "optim.use_precision_aware_optimizer"
    fit, remedy = config.parallel.distributed_optimizer or not aware, "set that, or unset this"
    require(fit, key, aware, "needs parallel.distributed_optimizer", remedy)
    fit = config.model.dtype is Dtype.bfloat16 or not aware
    rule = f"has no effect on weights in {config.model.dtype.name}, which are their own main copy"
    require(fit, key, aware, rule, "set model.dtype=bfloat16, or unset this")


def _check_fp8(config: Config) -> None:
    dtype, recipe = config.model.dtype, config.parallel.fp8
    fit = dtype is Dtype.bfloat16 or recipe is Fp8.off
    rule = f"is for a model in bfloat16, and model.dtype = {dtype.name}"
    require(fit, "parallel.fp8", recipe.name, rule, "set model.dtype=bfloat16, or fp8=off")
    kept = config.parallel.fp8_params
    for name, usual in (
        ("main_params_dtype", StateDtype.float32),
        ("optimizer_cpu_offload", False),
    ):
        value = getattr(config.optim, name)
        said = value.name if isinstance(value, StateDtype) else value
        rule = "Megatron has no main weights so of parameters that are kept in 8 bits"
        fit, remedy = value is usual or not kept, "unset it, or parallel.fp8_params"
        require(fit, f"optim.{name}", said, rule, remedy)
    plan = make_plan(config)
    fit = plan.reference or config.parallel.fp8_reference
    key, rule = "parallel.fp8_reference", "has no effect: there is no reference (algo.kl.coef = 0)"
    require(fit, key, False, rule, "unset it")
    fit = plan.old is Old.recompute or plan.score_each or config.parallel.fp8_score
    key, rule = "parallel.fp8_score", "has no effect: no pass takes logprobs of the old policy"
    require(fit, key, False, rule, "unset it, or set algo.old_policy=recompute")


def _check_name(config: Config) -> None:
    """W&B makes its identifiers of the run's name."""
    name = config.run.name
    require(
        config.logger.wandb == "off" or (len(name) <= 100 and not set(name) & set(WANDB_REFUSES)),
        "run.name",
        name,
        f"is no name for logger.wandb: at most 100 characters, none of {' '.join(WANDB_REFUSES)}",
        "choose another, or set logger.wandb=off",
    )
