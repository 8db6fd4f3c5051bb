"""Ranges, messages and documentation of the configuration."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from peergrad import config
from peergrad.config import (
    AdvantageConfig,
    AlgoConfig,
    CheckpointConfig,
    Config,
    CorrectionConfig,
    CorrectionKind,
    CorrectionLevel,
    DataConfig,
    Denominator,
    EvaluationConfig,
    Fp8,
    Fp8Scales,
    Fp8Serving,
    KernelsConfig,
    KlConfig,
    KlEstimator,
    KlPlace,
    Level,
    LoggerConfig,
    OldPolicy,
    OnGap,
    OptimConfig,
    ParallelConfig,
    Proof,
    Recompute,
    RewardConfig,
    RewardKind,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    Schedule,
    ServerMode,
    ServersConfig,
    ShapingConfig,
    Spec,
    StateDtype,
    SurrogateConfig,
    SurrogateKind,
)
from peergrad.config.fp8 import Fp8Format

NAN, INF = float("nan"), float("inf")
FUNCTION = RewardKind.function
SELECTIVE = {"recompute": Recompute.selective}
GATHER = {"overlap_param_gather": True}
BLOCKWISE = {"fp8": Fp8.blockwise}
AWARE: dict[str, Any] = {"use_precision_aware_optimizer": True}
OFFLOAD: dict[str, Any] = {"optimizer_cpu_offload": True}
HALF: dict[str, Any] = {"exp_avg_dtype": StateDtype.bfloat16}

REFUSED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (RunConfig, {"steps": 0}, "run.steps"),
    (RunConfig, {"name": ""}, "run.name"),
    (RunConfig, {"name": ".."}, "run.name"),
    (RunConfig, {"name": "a/b"}, "run.name"),
    (RunConfig, {"name": "a\nb"}, "run.name"),
    (RunConfig, {"name": "a\x00"}, "run.name"),
    (RunConfig, {"name": "x" * 201}, "run.name"),
    (RunConfig, {"root": ""}, "run.root"),
    (RunConfig, {"root": "a\tb"}, "run.root"),
    (RunConfig, {"seed": -1}, "run.seed"),
    (RunConfig, {"seed": 2**31}, "run.seed"),
    (SurrogateConfig, {"dual_clip": INF}, "algo.surrogate.dual_clip"),
    (SurrogateConfig, {"log_ratio_low": -INF}, "algo.surrogate.log_ratio_low"),
    (SurrogateConfig, {"max_mean_ratio": INF}, "algo.surrogate.max_mean_ratio"),
    (KlConfig, {"coef": INF}, "algo.kl.coef"),
    (AlgoConfig, {"entropy_coef": INF}, "algo.entropy_coef"),
    (ShapingConfig, {"bias": NAN}, "algo.shaping.bias"),
    (ShapingConfig, {"scale": INF}, "algo.shaping.scale"),
    (ShapingConfig, {"discount": NAN}, "algo.shaping.discount"),
    (SamplingConfig, {"mean_low": NAN}, "algo.sampling.mean_low"),
    (SamplingConfig, {"mean_high": INF}, "algo.sampling.mean_high"),
    (ParallelConfig, {"timeout_minutes": NAN}, "parallel.timeout_minutes"),
    (ParallelConfig, {"timeout_minutes": 1e9}, "parallel.timeout_minutes"),
    (RolloutConfig, {"temperature": 1e-7}, "rollout.temperature"),
    (RolloutConfig, {"request_timeout": NAN}, "rollout.request_timeout"),
    (RolloutConfig, {"max_canary_gap": 1.0, "proof": Proof.off}, "rollout.max_canary_gap"),
    (DataConfig, {"answer_key": "prompt"}, "data.answer_key"),
    (RewardConfig, {"workers": 10**6}, "reward.workers"),
    (RewardConfig, {"timeout": 1e300}, "reward.timeout"),
    (RewardConfig, {"kind": FUNCTION, "function": "mine"}, "reward.function"),
    (RewardConfig, {"kind": FUNCTION, "function": "my/file:f"}, "reward.function"),
    (OptimConfig, {"lr": NAN}, "optim.lr"),
    (OptimConfig, {"beta1": NAN}, "optim.beta1"),
    (OptimConfig, {"eps": 0.0}, "optim.eps"),
    (OptimConfig, {"weight_decay": NAN}, "optim.weight_decay"),
    (OptimConfig, {"clip_grad": INF}, "optim.clip_grad"),
    (EvaluationConfig, {"temperature": NAN}, "evaluation.temperature"),
    (EvaluationConfig, {"temperature": INF}, "evaluation.temperature"),
    (EvaluationConfig, {"pass_reward": NAN}, "evaluation.pass_reward"),
    (LoggerConfig, {"wandb": "offline", "wandb_project": "a/b"}, "logger.wandb_project"),
    (LoggerConfig, {"wandb": "online", "wandb_project": ""}, "logger.wandb_project"),
    (SurrogateConfig, {"clip_low": 0.0}, "algo.surrogate.clip_low"),
    (SurrogateConfig, {"clip_low": NAN}, "algo.surrogate.clip_low"),
    (SurrogateConfig, {"clip_high": 0.0}, "algo.surrogate.clip_high"),
    (SurrogateConfig, {"clip_high": INF}, "algo.surrogate.clip_high"),
    (SurrogateConfig, {"dual_clip": 1.0}, "algo.surrogate.dual_clip"),
    (SurrogateConfig, {"kind": SurrogateKind.sapo, "dual_clip": 3.0}, "algo.surrogate.dual_clip"),
    (SurrogateConfig, {"unified_mask": True}, "algo.surrogate.unified_mask"),
    (SurrogateConfig, {"log_ratio_low": 0.0}, "algo.surrogate.log_ratio_low"),
    (SurrogateConfig, {"log_ratio_high": -1.0}, "algo.surrogate.log_ratio_high"),
    (SurrogateConfig, {"tau_positive": 0.0}, "algo.surrogate.tau_positive"),
    (SurrogateConfig, {"tau_negative": -1.0}, "algo.surrogate.tau_negative"),
    (SurrogateConfig, {"max_mean_ratio": 1.0}, "algo.surrogate.max_mean_ratio"),
    (
        SurrogateConfig,
        {"kind": SurrogateKind.reinforce, "max_mean_ratio": 5.0},
        "algo.surrogate.max_mean_ratio",
    ),
    (
        SurrogateConfig,
        {"kind": SurrogateKind.reinforce, "log_ratio_low": -20.0},
        "algo.surrogate.log_ratio_low",
    ),
    (
        SurrogateConfig,
        {"kind": SurrogateKind.reinforce, "log_ratio_high": 20.0},
        "algo.surrogate.log_ratio_high",
    ),
    (CorrectionConfig, {"low": 0.5}, "algo.correction.low"),
    (CorrectionConfig, {"kind": CorrectionKind.icepop, "low": 5.0}, "algo.correction.low"),
    (CorrectionConfig, {"kind": CorrectionKind.mis, "low": -0.1}, "algo.correction.low"),
    (CorrectionConfig, {"high": 3.0}, "algo.correction.high"),
    (CorrectionConfig, {"kind": CorrectionKind.tis, "low": 2.0}, "algo.correction.low"),
    (CorrectionConfig, {"kind": CorrectionKind.mis, "low": 1.1}, "algo.correction.low"),
    (CorrectionConfig, {"kind": CorrectionKind.icepop, "high": 0.9}, "algo.correction.high"),
    (CorrectionConfig, {"kind": CorrectionKind.tis, "high": 0.5}, "algo.correction.high"),
    (CorrectionConfig, {"kind": CorrectionKind.icepop, "high": 0.3}, "algo.correction.high"),
    (CorrectionConfig, {"dppo": 0.0}, "algo.correction.dppo"),
    (CorrectionConfig, {"opsm": -1.0}, "algo.correction.opsm"),
    (CorrectionConfig, {"m2po": NAN}, "algo.correction.m2po"),
    (KlConfig, {"coef": -0.1}, "algo.kl.coef"),
    (KlConfig, {"coef": NAN}, "algo.kl.coef"),
    (KlConfig, {"horizon": 0}, "algo.kl.horizon"),
    (KlConfig, {"clamp": 0.0}, "algo.kl.clamp"),
    (KlConfig, {"clamp_log_ratio": -1.0}, "algo.kl.clamp_log_ratio"),
    (KlConfig, {"reset_every": -1}, "algo.kl.reset_every"),
    (KlConfig, {"target": 0.1}, "algo.kl.target"),  # in the loss
    (KlConfig, {"place": KlPlace.reward, "target": 0.0}, "algo.kl.target"),
    (KlConfig, {"coef": 0.0, "clamp": 10.0}, "algo.kl.clamp"),
    (KlConfig, {"coef": 0.0, "clamp_log_ratio": 20.0}, "algo.kl.clamp_log_ratio"),
    (KlConfig, {"coef": 0.0, "place": KlPlace.reward, "target": 0.1}, "algo.kl.target"),
    (KlConfig, {"coef": 0.0, "reset_every": 400}, "algo.kl.reset_every"),
    (AdvantageConfig, {"eps": -1e-6}, "algo.advantage.eps"),
    (AdvantageConfig, {"token_eps": -1e-6}, "algo.advantage.token_eps"),
    (AdvantageConfig, {"clip": 0.0}, "algo.advantage.clip"),
    (
        AdvantageConfig,
        {"mean": Level.running, "leave_one_out": True},
        "algo.advantage.leave_one_out",
    ),
    (ShapingConfig, {"overlong_tokens": -1}, "algo.shaping.overlong_tokens"),
    (ShapingConfig, {"overlong_factor": 0.0}, "algo.shaping.overlong_factor"),
    (ShapingConfig, {"scale": 0.0}, "algo.shaping.scale"),
    (ShapingConfig, {"scale": -1.0}, "algo.shaping.scale"),
    (ShapingConfig, {"clip": -1.0}, "algo.shaping.clip"),
    (ShapingConfig, {"discount": 0.0}, "algo.shaping.discount"),
    (ShapingConfig, {"discount": 1.5}, "algo.shaping.discount"),
    (SamplingConfig, {"limit": 1}, "algo.sampling.limit"),
    (SamplingConfig, {"mean_low": 0.5, "mean_high": 0.5}, "algo.sampling.mean_low"),
    (AlgoConfig, {"entropy_coef": -0.1}, "algo.entropy_coef"),
    (AlgoConfig, {"epochs": 0}, "algo.epochs"),
    (AlgoConfig, {"minibatches": 0}, "algo.minibatches"),
    (AlgoConfig, {"shuffle": True}, "algo.shuffle"),
    (RolloutConfig, {"max_logprob_gap": 0.0}, "rollout.max_logprob_gap"),
    (ParallelConfig, {"tensor": 0}, "parallel.tensor"),
    (ParallelConfig, {"pipeline": 0}, "parallel.pipeline"),
    (ParallelConfig, {"data": 0}, "parallel.data"),
    (ParallelConfig, {"micro_batch_tokens": 0}, "parallel.micro_batch_tokens"),
    (KernelsConfig, {"chunk": 0}, "kernels.chunk"),
    (KernelsConfig, {"chunk_mb": 0}, "kernels.chunk_mb"),
    (KernelsConfig, {"chunk": 512, "chunk_mb": 64}, "kernels.chunk_mb"),
    (ParallelConfig, {"sequence": True}, "parallel.sequence"),
    (ParallelConfig, {"context": 0}, "parallel.context"),
    (ParallelConfig, {"virtual_pipeline": 2}, "parallel.virtual_pipeline"),
    (ParallelConfig, {"virtual_pipeline": 0}, "parallel.virtual_pipeline"),
    (ParallelConfig, {"first_stage_layers": 2}, "parallel.first_stage_layers"),
    (ParallelConfig, {"last_stage_layers": 0, "pipeline": 2}, "parallel.last_stage_layers"),
    (ParallelConfig, {"recompute_layers": 0}, "parallel.recompute_layers"),
    (ParallelConfig, {"recompute_layers": 2}, "parallel.recompute_layers"),
    (ParallelConfig, {"recompute_modules": ["mlp"]}, "parallel.recompute_modules"),
    (ParallelConfig, {**SELECTIVE, "recompute_modules": []}, "parallel.recompute_modules"),
    (ParallelConfig, {**SELECTIVE, "recompute_modules": ["experts"]}, "parallel.recompute_modules"),
    (ParallelConfig, GATHER, "parallel.overlap_param_gather"),
    (
        ParallelConfig,
        {**GATHER, "overlap_grad_reduce": True, "distributed_optimizer": False},
        "parallel.overlap_param_gather",
    ),
    (ParallelConfig, {"ddp_bucket_size": 10}, "parallel.ddp_bucket_size"),
    (ParallelConfig, {**BLOCKWISE, "spec": Spec.torch}, "parallel.fp8"),
    (ParallelConfig, {"fp8": Fp8.tensorwise}, "parallel.fp8"),
    (ParallelConfig, {"fp8_params": True}, "parallel.fp8_params"),
    (ParallelConfig, {"fp8_format": Fp8Format.hybrid}, "parallel.fp8_format"),
    (ParallelConfig, {"fp8_score": False}, "parallel.fp8_score"),
    (ParallelConfig, {"fp8_reference": False}, "parallel.fp8_reference"),
    (ParallelConfig, {"fp8_gap_every": 5}, "parallel.fp8_gap_every"),
    (ParallelConfig, {**BLOCKWISE, "fp8_gap_every": -1}, "parallel.fp8_gap_every"),
    (
        ParallelConfig,
        {**BLOCKWISE, "fp8_depends_on_packing": True},
        "parallel.fp8_depends_on_packing",
    ),
    (
        ParallelConfig,
        {**BLOCKWISE, "fp8_params": True, "distributed_optimizer": False},
        "parallel.fp8_params",
    ),
    (ParallelConfig, {"fp8": Fp8.delayed, "fp8_params": True}, "parallel.fp8_params"),
    (
        ParallelConfig,
        {"fp8": Fp8.delayed, "fp8_last_layers_bf16": 1},
        "parallel.fp8_last_layers_bf16",
    ),
    (ParallelConfig, {"timeout_minutes": 0.0}, "parallel.timeout_minutes"),
    (OptimConfig, OFFLOAD, "optim.optimizer_cpu_offload"),
    (OptimConfig, {"optimizer_offload_fraction": 0.5}, "optim.optimizer_offload_fraction"),
    (
        OptimConfig,
        {**AWARE, **OFFLOAD, "optimizer_offload_fraction": 0.0},
        "optim.optimizer_offload_fraction",
    ),
    (
        OptimConfig,
        {**AWARE, "overlap_cpu_optimizer_d2h_h2d": True},
        "optim.overlap_cpu_optimizer_d2h_h2d",
    ),
    (ServersConfig, {"count": 0}, "rollout.servers.count"),
    (ServersConfig, {"tensor": 0}, "rollout.servers.tensor"),
    (ServersConfig, {"fp8_scales": Fp8Scales.float32}, "rollout.servers.fp8_scales"),
    (ServersConfig, {"start_timeout": -1.0}, "rollout.servers.start_timeout"),
    (ServersConfig, {"mode": ServerMode.external}, "rollout.servers.urls"),
    (ServersConfig, {"urls": ["http://host:30000"]}, "rollout.servers.urls"),
    (RolloutConfig, {"group_size": 1}, "rollout.group_size"),
    (RolloutConfig, {"batch_size": 0}, "rollout.batch_size"),
    (RolloutConfig, {"batch_size": 12, "group_size": 8}, "rollout.batch_size"),
    (RolloutConfig, {"temperature": 0.0}, "rollout.temperature"),
    (RolloutConfig, {"temperature": INF}, "rollout.temperature"),
    (RolloutConfig, {"top_p": 0.95}, "rollout.top_p"),
    (RolloutConfig, {"top_k": 50}, "rollout.top_k"),
    (RolloutConfig, {"max_staleness": -1}, "rollout.max_staleness"),
    (RolloutConfig, {"max_new_tokens": 0}, "rollout.max_new_tokens"),
    (RolloutConfig, {"max_concurrency": 0}, "rollout.max_concurrency"),
    (RolloutConfig, {"bucket_mb": 0}, "rollout.bucket_mb"),
    (RolloutConfig, {"retries": -1}, "rollout.retries"),
    (RolloutConfig, {"request_timeout": 0.0}, "rollout.request_timeout"),
    (RolloutConfig, {"max_canary_gap": 0.0}, "rollout.max_canary_gap"),
    (DataConfig, {"max_prompt_tokens": 0}, "data.max_prompt_tokens"),
    (DataConfig, {"system": "Be brief."}, "data.system"),
    (RewardConfig, {"workers": 0}, "reward.workers"),
    (RewardConfig, {"timeout": 0.0}, "reward.timeout"),
    (RewardConfig, {"kind": FUNCTION}, "reward.function"),
    (RewardConfig, {"function": "my.module:f"}, "reward.function"),
    (OptimConfig, {"lr": 0.0}, "optim.lr"),
    (OptimConfig, {"lr": INF}, "optim.lr"),
    (OptimConfig, {"beta1": 1.0}, "optim.beta1"),
    (OptimConfig, {"beta2": -0.1}, "optim.beta2"),
    (OptimConfig, {"eps": -1.0}, "optim.eps"),
    (OptimConfig, {"weight_decay": -1.0}, "optim.weight_decay"),
    (OptimConfig, {"clip_grad": -1.0}, "optim.clip_grad"),
    (OptimConfig, {"warmup_steps": -1}, "optim.warmup_steps"),
    (OptimConfig, {"min_lr": -1.0}, "optim.min_lr"),
    (OptimConfig, {"lr": 1e-6, "min_lr": 1e-5}, "optim.min_lr"),
    (OptimConfig, {"lr": 1e-6, "min_lr": 1e-7}, "optim.min_lr"),  # no effect when constant
    (EvaluationConfig, {"every": -1}, "evaluation.every"),
    (EvaluationConfig, {"prompts": 0}, "evaluation.prompts"),
    (EvaluationConfig, {"temperature": -0.1}, "evaluation.temperature"),
    (EvaluationConfig, {"samples": 0}, "evaluation.samples"),
    (EvaluationConfig, {"samples": 4}, "evaluation.samples"),  # greedy
    (CheckpointConfig, {"every": -1}, "checkpoint.every"),
    (CheckpointConfig, {"keep": -1}, "checkpoint.keep"),
    (LoggerConfig, {"wandb": "on"}, "logger.wandb"),
]

ALLOWED: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (SurrogateConfig, {"clip_low": 10.0, "clip_high": 10.0, "dual_clip": 3.0}),
    (SurrogateConfig, {"kind": SurrogateKind.gspo, "dual_clip": 3.0, "log_ratio_low": -20.0}),
    (KlConfig, {"coef": 0.0, "estimator": KlEstimator.k1}),
    (KlConfig, {"place": KlPlace.reward, "estimator": KlEstimator.k1, "target": 0.1}),
    (CorrectionConfig, {"kind": CorrectionKind.mis, "low": 0.0, "high": 5.0, "m2po": 0.04}),
    (AdvantageConfig, {"eps": 0.0, "leave_one_out": True}),
    (AlgoConfig, {"minibatches": 2, "shuffle": True, "epochs": 2}),
    (ServersConfig, {"args": {"load-format": "dummy", "kv-cache-dtype": "fp8_e4m3"}}),
    (ServersConfig, {"fp8": Fp8Serving.block, "args": {"kv-cache-dtype": "auto"}}),
    # whole answers may be dropped where the ratio is theirs, single tokens where it is not
    (
        AlgoConfig,
        {
            "surrogate": SurrogateConfig(kind=SurrogateKind.gspo),
            "correction": CorrectionConfig(
                kind=CorrectionKind.mis, level=CorrectionLevel.sequence, opsm=1e-4
            ),
        },
    ),
    (AlgoConfig, {"correction": CorrectionConfig(kind=CorrectionKind.mis, dppo=0.2, m2po=0.04)}),
    (
        AlgoConfig,
        {
            "surrogate": SurrogateConfig(kind=SurrogateKind.gspo_token),
            "shaping": ShapingConfig(discount=0.9),
        },
    ),
    (ParallelConfig, {"tensor": 2, "sequence": True, "data": 1}),
    (ServersConfig, {"mode": ServerMode.external, "urls": ["http://host:30000"]}),
    (RolloutConfig, {"batch_size": 6, "group_size": 2, "retries": 0, "max_staleness": 1}),
    (DataConfig, {"chat": True, "system": "Be brief."}),
    (RewardConfig, {"kind": FUNCTION, "function": "my.module:f"}),
    (OptimConfig, {"lr": 1e-6, "min_lr": 1e-6, "schedule": Schedule.linear, "clip_grad": 0.0}),
    (EvaluationConfig, {"every": 0, "samples": 4, "temperature": 0.7}),
    (CheckpointConfig, {"every": 0, "keep": 0}),
    (LoggerConfig, {"wandb": "offline"}),
    (Config, {}),
]


@pytest.mark.parametrize(("section", "values", "key"), REFUSED)
def test_refused_with_key_value_rule_and_remedy(
    section: Callable[..., Any], values: dict[str, Any], key: str
) -> None:
    with pytest.raises(ValueError) as caught:
        section(**values)
    message = str(caught.value)
    name = key.rpartition(".")[2]
    value = values.get(name, getattr(section, name, None) if name != "urls" else [])
    said = value.name if isinstance(value, Enum) else value
    form = rf"{re.escape(key)} = {re.escape(repr(said))}: \S.*; \S.*"
    assert re.fullmatch(form, message), message  # "." matches no line break
    found: object = Config()
    for part in key.split("."):
        found = getattr(found, part)  # the key named is one that exists


@pytest.mark.parametrize(
    ("form", "option", "said"),
    [
        ("off", "quantization", "is peergrad's to set; set rollout.servers.fp8"),
        ("flash_rl", "load_format", "is peergrad's to set with rollout.servers.fp8=flash_rl"),
        ("block", "--load-f", "is peergrad's to set with rollout.servers.fp8=block"),
        ("block", "kv-cache-dtype", "needs scales of keys and values, which rollout.servers.fp8="),
    ],
)
def test_what_servers_hold_is_said_once(form: str, option: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        ServersConfig(fp8=Fp8Serving[form], args={option: "fp8"})
    assert str(caught.value).startswith(f"rollout.servers.args.{option} = 'fp8': {said}")


@pytest.mark.parametrize(("section", "values"), ALLOWED)
def test_values_at_the_edge_are_allowed(
    section: Callable[..., Any], values: dict[str, Any]
) -> None:
    section(**values)


TOKEN_DROP = CorrectionConfig(kind=CorrectionKind.icepop)
NONSENSE: list[tuple[Callable[[], object], str]] = [
    (lambda: KlConfig(estimator=KlEstimator.k1), "algo.kl.estimator = 'k1': has no expected grad"),
    (
        lambda: OptimConfig(**HALF),
        "optim.exp_avg_dtype = 'bfloat16': has no effect without optim.use_precision_aware_optim",
    ),
    (
        lambda: OptimConfig(**AWARE, **OFFLOAD, **HALF),
        "optim.exp_avg_dtype = 'bfloat16': has no effect with optim.optimizer_cpu_offload, which",
    ),
    (
        lambda: OptimConfig(**AWARE, main_params_dtype=StateDtype.fp8),
        "optim.main_params_dtype = 'fp8': must be float32 or float16; use float32",
    ),
    (
        lambda: KlConfig(place=KlPlace.reward, estimator=KlEstimator.k3_unbiased),
        "algo.kl.estimator = 'k3_unbiased': differs from k3 in its gradient alone",
    ),
    (
        lambda: AlgoConfig(
            surrogate=SurrogateConfig(kind=SurrogateKind.gspo), correction=TOKEN_DROP
        ),
        "algo.correction.kind = 'icepop': drops single tokens, but surrogate.kind=gspo has one",
    ),
    (
        lambda: AlgoConfig(
            surrogate=SurrogateConfig(kind=SurrogateKind.gspo_token),
            correction=CorrectionConfig(m2po=0.04),
        ),
        "algo.correction.m2po = 0.04: drops single tokens, but surrogate.kind=gspo_token has one",
    ),
    (
        lambda: AlgoConfig(correction=CorrectionConfig(opsm=1e-4, dppo=0.2)),
        "algo.correction.dppo = 0.2: drops single tokens, but algo.correction.opsm judges whole",
    ),
    (
        lambda: AlgoConfig(correction=CorrectionConfig(kind=CorrectionKind.seq_mask_tis, dppo=0.2)),
        "algo.correction.dppo = 0.2: drops single tokens, but algo.correction.kind judges whole",
    ),
    (
        lambda: AlgoConfig(
            correction=CorrectionConfig(
                kind=CorrectionKind.tis, level=CorrectionLevel.sequence, m2po=0.04
            )
        ),
        "algo.correction.m2po = 0.04: drops single tokens, but algo.correction.level judges whole",
    ),
    (
        lambda: AlgoConfig(correction=CorrectionConfig(kind=CorrectionKind.mis, opsm=1e-4)),
        "algo.correction.kind = 'mis': drops single tokens, but algo.correction.opsm judges whole",
    ),
    (
        lambda: AlgoConfig(
            surrogate=SurrogateConfig(kind=SurrogateKind.gspo), shaping=ShapingConfig(discount=0.9)
        ),
        "algo.shaping.discount = 0.9: gives the tokens of an answer different advantages",
    ),
    (
        lambda: AlgoConfig(
            surrogate=SurrogateConfig(kind=SurrogateKind.gspo),
            kl=KlConfig(place=KlPlace.reward),
        ),
        "algo.kl.place = 'reward': gives the tokens of an answer different advantages",
    ),
    (
        lambda: AlgoConfig(old_policy=OldPolicy.engine, correction=TOKEN_DROP),
        "algo.correction.kind = 'icepop': corrects the old policy towards the engine's, but",
    ),
    (
        lambda: AlgoConfig(
            surrogate=SurrogateConfig(kind=SurrogateKind.icepop),
            correction=CorrectionConfig(m2po=0.04),
        ),
        "algo.correction.m2po = 0.04: corrects the old policy towards the engine's, but",
    ),
    (
        lambda: AlgoConfig(
            surrogate=SurrogateConfig(kind=SurrogateKind.icepop), old_policy=OldPolicy.recompute
        ),
        "algo.old_policy = 'recompute': the ratio of surrogate.kind=icepop is to the engine",
    ),
    (
        lambda: AlgoConfig(
            old_policy=OldPolicy.loglinear, correction=TOKEN_DROP, denominator=Denominator.kept
        ),
        "algo.old_policy = 'loglinear': must be known before the update",
    ),
    (
        lambda: AlgoConfig(old_policy=OldPolicy.loglinear, correction=CorrectionConfig(m2po=0.04)),
        "algo.old_policy = 'loglinear': must be known before the update",
    ),
    (
        lambda: RolloutConfig(on_logprob_gap=OnGap.warn),
        "rollout.on_logprob_gap = 'warn': has no effect without rollout.max_logprob_gap",
    ),
]


@pytest.mark.parametrize(("build", "start"), NONSENSE)
def test_combinations_without_a_meaning(build: Callable[[], object], start: str) -> None:
    with pytest.raises(ValueError) as caught:
        build()
    assert str(caught.value).startswith(start)
    assert re.fullmatch(r".*; \S.*", str(caught.value))


@pytest.mark.parametrize(("size", "remedy"), [(12, 16), (11, 8), (3, 8), (0, 8), (-5, 8)])
def test_the_batch_size_proposed_is_the_nearest_that_works(size: int, remedy: int) -> None:
    with pytest.raises(ValueError, match=rf"\(8\); use {remedy}$"):
        RolloutConfig(batch_size=size, group_size=8)
    assert RolloutConfig(batch_size=remedy, group_size=8).prompts_per_step == remedy // 8


def sections() -> list[type]:
    return [c for c in vars(config).values() if isinstance(c, type) and is_dataclass(c)]


def test_every_field_is_documented() -> None:
    """By a string under it, unless its name says it all."""
    plain = {"beta1", "beta2", "eps", "weight_decay", "min_lr", "wandb_project", "servers"}
    plain |= {"sampling", "shaping", "advantage", "surrogate", "correction", "kl"}
    files = Path(config.__file__).parent.glob("*.py")
    nodes = [node for file in files for node in ast.parse(file.read_text()).body]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    for section in sections():
        if section is Config:
            continue
        bodies = [classes[kind.__name__].body for kind in section.__mro__[:-1]]
        documented = {
            field.target.id
            for field, text in (pair for body in bodies for pair in pairwise(body))
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        }
        assert {field.name for field in fields(section)} <= documented | plain, section


def test_every_field_is_used() -> None:
    """A knob that nothing reads is ignored in silence. top_p and top_k have one value only, and
    what allows another value is read where that is checked."""
    own = Path(config.__file__).parent
    others = [path for path in own.parent.rglob("*.py") if own not in path.parents]
    code = "\n".join(path.read_text() for path in others if path.name != "synonyms.py")  # names all
    names = {field.name for section in sections() for field in fields(section)}
    unused = {name for name in names if not re.search(rf"\.{name}\b", code)}
    assert unused == {"top_p", "top_k", "fp8_depends_on_packing"}


def loaded_by(statement: str) -> set[str]:
    """Top-level modules after ``statement`` in a fresh interpreter."""
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("config, peergrad.checks, peergrad.running.compose", {"torch"}),
        ("data, peergrad.observing.metrics, peergrad.observing.screen", {"torch"}),
        ("main", {"torch"}),
        ("parallel.hf.config, peergrad.parallel.hf.folder, peergrad.prompts", {"torch"}),
        (
            "algo, peergrad.algo.objective, peergrad.algo.report, peergrad.stages, peergrad.loop",
            set(),
        ),
    ],
)
def test_modules_are_as_light_as_they_say(modules: str, absent: set[str]) -> None:
    heavy = {"megatron", "sglang", "transformers", "transformer_engine"} | absent
    assert not loaded_by(f"import peergrad.{modules}") & heavy
