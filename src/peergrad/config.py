"""Every knob of a run: nested dataclasses, each field with its default, its meaning and its check.

Hydra composes the YAML files of ``conf/`` against these classes, so an unknown key or a wrong type
is refused; ``__post_init__`` refuses values out of range. Past ``OmegaConf.to_object`` there are
only these dataclasses. Checks that need more than one section, the model's shape or the number of
processes are in ``peergrad.checks``. This module imports nothing heavy.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


def require(ok: bool, key: str, value: object, rule: str, remedy: str) -> None:
    """Raise the project's one form of configuration error unless ``ok``."""
    if not ok:
        raise ValueError(f"{key} = {value!r}: {rule}; {remedy}")


def _at_least(key: str, value: float, least: float, remedy: str = "raise it") -> None:
    require(value >= least, key, value, f"must be at least {least}", remedy)


def _positive(key: str, value: float, remedy: str) -> None:
    require(0 < value < float("inf"), key, value, "must be positive and finite", remedy)


def _open_unit(key: str, value: float) -> None:
    require(0 < value < 1, key, value, "must lie in (0, 1)", "the usual value is 0.2")


# Member names are what the YAML files and the command line say.
Dtype = Enum("Dtype", ["float32", "bfloat16"])
Spec = Enum("Spec", ["auto", "te", "torch"])
Aggregation = Enum(
    "Aggregation",
    ["seq_mean_token_mean", "token_mean", "seq_mean_token_sum", "token_sum_const"],
)
ServerMode = Enum("ServerMode", ["managed", "external"])
Proof = Enum("Proof", ["auto", "canary", "off"])
RewardKind = Enum("RewardKind", ["arithmetic", "gsm8k", "function"])
OnError = Enum("OnError", ["zero", "stop"])
OnNonfinite = Enum("OnNonfinite", ["skip", "stop"])
Schedule = Enum("Schedule", ["constant", "linear", "cosine"])


@dataclass(kw_only=True)
class RunConfig:
    name: str = "run"
    """Folder of this run under ``root``."""
    root: str = "runs"
    """Folder that holds all runs."""
    seed: int = 0
    """Seeds prompt order and every generator of the trainer."""
    steps: int = 100
    """Optimizer-side length of the run: rollout batches trained on, counted from the start."""
    resume: bool = False
    """Continue from the newest complete checkpoint of ``root/name``. Without it a run folder that
    already holds a run is refused."""

    def __post_init__(self) -> None:
        _at_least("run.steps", self.steps, 1)
        require(
            bool(self.name) and "/" not in self.name and self.name not in (".", ".."),
            "run.name",
            self.name,
            "must be a plain folder name",
            "put the path into run.root",
        )


@dataclass(kw_only=True)
class ModelConfig:
    path: str = "???"
    """Folder of the HF checkpoint: config.json, tokenizer and safetensors. Mandatory."""
    weights: str | None = None
    """A Megatron checkpoint (tools/hf_to_megatron.py) to take the weights from instead."""
    reference: str | None = None
    """HF checkpoint of the reference model; default: ``path``. Loaded only if algo.kl_coef > 0."""
    dtype: Dtype = Dtype.bfloat16
    """Precision of parameters and layers; logprobs, losses and main gradients are always
    float32."""


@dataclass(kw_only=True)
class AlgoConfig:
    scale_by_std: bool = True
    """Divide the centred reward by the group's standard deviation (n - 1)."""
    std_eps: float = 1e-6
    """Added to the standard deviation; groups of equal rewards get exactly 0 whatever it is."""
    clip_low: float = 0.2
    """Lower clip: the ratio is held above ``1 - clip_low``."""
    clip_high: float = 0.2
    """Upper clip: the ratio is held below ``1 + clip_high``."""
    kl_coef: float = 0.04
    """Weight of the k3 estimate of KL(policy || reference) in the loss; 0 loads no reference."""
    aggregation: Aggregation = Aggregation.seq_mean_token_mean
    """How per-token losses become one scalar; denominators are global over ranks and
    micro-batches."""
    minibatches: int = 1
    """Optimizer steps per rollout batch. Above 1 the old logprobs are computed before the first."""

    def __post_init__(self) -> None:
        _open_unit("algo.clip_low", self.clip_low)
        _positive("algo.clip_high", self.clip_high, "try 0.2")
        _at_least("algo.kl_coef", self.kl_coef, 0)
        _at_least("algo.std_eps", self.std_eps, 0)
        _at_least("algo.minibatches", self.minibatches, 1)


@dataclass(kw_only=True)
class ParallelConfig:
    tensor: int = 1
    """Tensor-parallel size: ranks that share every layer's matrices."""
    pipeline: int = 1
    """Pipeline-parallel size: ranks that share the layers (1F1B schedule)."""
    data: int | None = None
    """Data-parallel size; default: whatever is left of the processes."""
    sequence: bool = False
    """Sequence parallel: activations outside the matrices are split over the tensor ranks."""
    spec: Spec = Spec.auto
    """Layers: ``te`` (Transformer Engine, GPU), ``torch`` (plain PyTorch), ``auto`` picks and
    logs."""
    micro_batch_tokens: int = 4096
    """Token budget of one packed micro-batch; a longer sequence gets one of its own."""
    logprob_chunk: int = 2048
    """Rows whose logits exist at a time."""
    distributed_optimizer: bool = True
    """Shard the optimizer's state over the data-parallel ranks."""
    timeout_minutes: float = 30.0
    """Collectives that take longer are an error. Must cover the longest rollout phase."""
    megatron: dict[str, Any] = field(default_factory=dict)
    """Any further field of Megatron's TransformerConfig."""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "micro_batch_tokens", "logprob_chunk"):
            _at_least(f"parallel.{name}", getattr(self, name), 1)
        if self.data is not None:
            _at_least("parallel.data", self.data, 1)
        _positive("parallel.timeout_minutes", self.timeout_minutes, "use 30")
        require(
            not self.sequence or self.tensor > 1,
            "parallel.sequence",
            self.sequence,
            "needs parallel.tensor > 1",
            "unset it",
        )


@dataclass(kw_only=True)
class ServersConfig:
    mode: ServerMode = ServerMode.managed
    """``managed`` starts and stops SGLang servers beside rank 0; ``external`` uses ``urls``."""
    urls: list[str] = field(default_factory=list)
    """Base URLs of external servers (the workers themselves, not a router)."""
    count: int = 1
    """Managed servers."""
    tensor: int = 1
    """Tensor-parallel size of each server."""
    start_timeout: float = 300.0
    """Seconds until a managed server must be healthy."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further ``sglang serve`` options: ``{mem-fraction-static: 0.8, enable-metrics: true}``."""

    def __post_init__(self) -> None:
        _at_least("rollout.servers.count", self.count, 1)
        _at_least("rollout.servers.tensor", self.tensor, 1)
        _positive("rollout.servers.start_timeout", self.start_timeout, "use 300")
        external = self.mode is ServerMode.external
        require(
            bool(self.urls) == external,
            "rollout.servers.urls",
            self.urls,
            "is needed with mode=external and only there",
            "list the servers' base URLs, or set rollout.servers.mode=managed",
        )


@dataclass(kw_only=True)
class RolloutConfig:
    batch_size: int = 512
    """Rollouts (not prompts) per step."""
    group_size: int = 8
    """Rollouts per prompt."""
    temperature: float = 1.0
    """Sampling temperature; the trainer divides its logits by the same number."""
    top_p: float = 1.0
    """Must be 1: the trainer cannot know the mass that nucleus sampling cuts off."""
    top_k: int = -1
    """Must be -1, for the same reason."""
    max_new_tokens: int = 1024
    """Longest answer, in tokens."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Further token ids that end an answer (the tokenizer's end token always does)."""
    max_staleness: int = 0
    """How many weight versions a rollout may lag: 0 is synchronous on-policy, 1 one step off."""
    max_concurrency: int = 256
    """Groups in flight at a time."""
    request_timeout: float = 600.0
    """Seconds one generation request may take."""
    retries: int = 5
    """Further attempts after a connection error or a 5xx answer."""
    bucket_mb: int = 512
    """Size of one weight-sync broadcast."""
    proof: Proof = Proof.auto
    """After each weight sync: ``auto`` compares the servers' tensor checksums as far as they can be
    known and scores a canary text on both sides; ``canary`` only the latter."""
    max_canary_gap: float | None = None
    """Largest allowed |logprob difference| on the canary text; default: warn above 1e-3 (float32)
    or 0.5 (bfloat16), never stop."""
    dump: bool = True
    """Record every step's groups under ``rollouts/``."""
    replay: str | None = None
    """Run folder whose recorded groups to train on, without an engine."""
    servers: ServersConfig = field(default_factory=ServersConfig)

    def __post_init__(self) -> None:
        require(
            self.group_size >= 2,
            "rollout.group_size",
            self.group_size,
            "must be at least 2 to compare peers",
            "use 8",
        )
        require(
            self.batch_size > 0 and self.batch_size % self.group_size == 0,
            "rollout.batch_size",
            self.batch_size,
            f"must be a positive multiple of rollout.group_size ({self.group_size})",
            f"use {max(1, round(self.batch_size / self.group_size)) * self.group_size}",
        )
        _positive(
            "rollout.temperature",
            self.temperature,
            "use 1.0; greedy sampling belongs to evaluation.temperature",
        )
        _positive("rollout.request_timeout", self.request_timeout, "use 600")
        if self.max_canary_gap is not None:
            _positive("rollout.max_canary_gap", self.max_canary_gap, "use null for no limit")
        for key, value, full in (("top_p", self.top_p, 1.0), ("top_k", self.top_k, -1)):
            require(
                value == full,
                f"rollout.{key}",
                value,
                "truncated sampling would bias every ratio by the mass it cuts off",
                f"set it to {full}",
            )
        _at_least("rollout.max_staleness", self.max_staleness, 0)
        for name in ("max_new_tokens", "max_concurrency", "bucket_mb"):
            _at_least(f"rollout.{name}", getattr(self, name), 1)
        _at_least("rollout.retries", self.retries, 0)

    @property
    def prompts_per_step(self) -> int:
        return self.batch_size // self.group_size


@dataclass(kw_only=True)
class DataConfig:
    source: str = "???"
    """``arithmetic`` (generated) or a .jsonl / .parquet file of training prompts. Mandatory."""
    held_out: str | None = None
    """The same for evaluation; null: no evaluation."""
    prompt_key: str = "prompt"
    """Column that holds the prompt: a string, or a list of chat messages."""
    answer_key: str = "answer"
    """Column that holds the right answer, handed to the reward."""
    chat: bool = False
    """Render prompts through the tokenizer's chat template."""
    system: str | None = None
    """System message put first when ``chat`` is on."""
    shuffle: bool = True
    """A new order every epoch, a function of run.seed and the epoch alone."""
    max_prompt_tokens: int = 1024
    """Longer prompts are left out, and counted in the log."""

    def __post_init__(self) -> None:
        _at_least("data.max_prompt_tokens", self.max_prompt_tokens, 1)
        require(
            self.system is None or self.chat,
            "data.system",
            self.system,
            "has no effect without data.chat",
            "set data.chat=true",
        )


@dataclass(kw_only=True)
class RewardConfig:
    kind: RewardKind = RewardKind.arithmetic
    """``arithmetic`` (exact match), ``gsm8k`` (final number), ``function`` (your own)."""
    function: str | None = None
    """``package.module:callable`` taking (prompt, rollout) and returning a float."""
    workers: int = 1
    """Processes that compute rewards."""
    timeout: float = 10.0
    """Seconds one reward may take."""
    on_error: OnError = OnError.zero
    """A reward that fails or takes too long: reward 0 and a warning that names the sample, or
    stop."""

    def __post_init__(self) -> None:
        _at_least("reward.workers", self.workers, 1)
        _positive("reward.timeout", self.timeout, "use 10")
        require(
            (self.function is not None) == (self.kind is RewardKind.function),
            "reward.function",
            self.function,
            "is needed with reward.kind=function and only there",
            "name it as package.module:callable",
        )


@dataclass(kw_only=True)
class OptimConfig:
    lr: float = 1e-6
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    schedule: Schedule = Schedule.constant
    """Shape after the warm-up, down to ``min_lr`` at run.steps."""
    min_lr: float = 0.0
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    """A loss or gradient norm that is NaN or infinite: skip the update, or stop; the batch is
    dumped either way."""

    def __post_init__(self) -> None:
        _positive("optim.lr", self.lr, "the usual value is 1e-6")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name}", value, "must lie in [0, 1)", "use 0.9 / 0.95")
        for name in ("eps", "weight_decay", "clip_grad", "warmup_steps", "min_lr"):
            _at_least(f"optim.{name}", getattr(self, name), 0)
        require(
            self.min_lr == 0 or self.schedule is not Schedule.constant,
            "optim.min_lr",
            self.min_lr,
            "has no effect on a constant schedule",
            "set optim.schedule=linear or cosine",
        )
        require(
            self.min_lr <= self.lr,
            "optim.min_lr",
            self.min_lr,
            f"must not exceed optim.lr ({self.lr})",
            "lower it",
        )


@dataclass(kw_only=True)
class EvaluationConfig:
    every: int = 10
    """Steps between evaluations; 0 turns them off. The first comes before the first step."""
    prompts: int = 256
    """Held-out prompts, the first of the held-out set's own fixed order."""
    temperature: float = 0.0
    """0 is greedy."""
    samples: int = 1
    """Answers per prompt; pass@1 is their mean."""
    pass_reward: float = 1.0
    """An answer passes when its reward reaches this."""

    def __post_init__(self) -> None:
        _at_least("evaluation.every", self.every, 0)
        _at_least("evaluation.prompts", self.prompts, 1)
        _at_least("evaluation.temperature", self.temperature, 0)
        _at_least("evaluation.samples", self.samples, 1)
        require(
            self.samples == 1 or self.temperature > 0,
            "evaluation.samples",
            self.samples,
            "greedy answers are all the same",
            "set evaluation.temperature or evaluation.samples=1",
        )


@dataclass(kw_only=True)
class CheckpointConfig:
    every: int = 50
    """Steps between checkpoints; the end of the run always gets one. 0: only the end."""
    keep: int = 2
    """Newest checkpoints kept; 0 keeps all."""
    fallback: bool = False
    """On resume, if the newest checkpoint is damaged, use the newest one that is complete."""

    def __post_init__(self) -> None:
        _at_least("checkpoint.every", self.every, 0)
        _at_least("checkpoint.keep", self.keep, 0)


@dataclass(kw_only=True)
class LoggerConfig:
    console: bool = True
    """Live table in a terminal, one line a step elsewhere."""
    tensorboard: bool = True
    """Event files under ``tensorboard/`` of the run."""
    wandb: str = "off"
    """``off``, ``offline`` or ``online``."""
    wandb_project: str = "peergrad"

    def __post_init__(self) -> None:
        require(
            self.wandb in ("off", "offline", "online"),
            "logger.wandb",
            self.wandb,
            "must be off, offline or online",
            "use offline where there is no network",
        )


@dataclass(kw_only=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
