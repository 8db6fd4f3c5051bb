"""Every knob of a run: nested dataclasses, each field with its default, its meaning and its check.

Hydra composes the YAML files of ``conf/`` against these classes, so an unknown key or a wrong type
is refused; ``__post_init__`` refuses values out of range and combinations that make no sense. Past
``OmegaConf.to_object`` there are only these dataclasses. Checks that need the model's shape or the
number of processes are in ``peergrad.checks``. This package imports nothing heavy. Member names of
enumerations are what the YAML files and the command line say.
"""

from dataclasses import dataclass, field

from peergrad.config.algo import (
    SEQUENCE_RATIO,
    AdvantageConfig,
    Aggregation,
    AlgoConfig,
    CorrectionConfig,
    CorrectionKind,
    CorrectionLevel,
    Denominator,
    FlatGroups,
    KlConfig,
    KlEstimator,
    KlPlace,
    Level,
    OldPolicy,
    SamplingConfig,
    ShapingConfig,
    SurrogateConfig,
    SurrogateKind,
    TokenLevel,
)
from peergrad.config.conflict import Conflict
from peergrad.config.fp8 import Fp8
from peergrad.config.optim import OnNonfinite, OptimConfig, Schedule, StateDtype
from peergrad.config.parallel import (
    MoeConfig,
    ParallelConfig,
    Recompute,
    RecomputeMethod,
    Replay,
    Spec,
)
from peergrad.config.rollout import (
    Fp8Scales,
    Fp8Serving,
    OnGap,
    Proof,
    RolloutConfig,
    ServerMode,
    ServersConfig,
)
from peergrad.config.rules import (
    require,
)
from peergrad.config.run import (
    LARGEST_REWARD,
    WANDB_REFUSES,
    CheckpointConfig,
    DataConfig,
    Dtype,
    EvaluationConfig,
    KernelsConfig,
    LoggerConfig,
    Logprob,
    ModelConfig,
    OnError,
    RewardConfig,
    RewardKind,
    RunConfig,
)

__all__ = [
    "LARGEST_REWARD",
    "SEQUENCE_RATIO",
    "WANDB_REFUSES",
    "AdvantageConfig",
    "Aggregation",
    "AlgoConfig",
    "CheckpointConfig",
    "Config",
    "Conflict",
    "CorrectionConfig",
    "CorrectionKind",
    "CorrectionLevel",
    "DataConfig",
    "Denominator",
    "Dtype",
    "EvaluationConfig",
    "FlatGroups",
    "Fp8",
    "Fp8Scales",
    "Fp8Serving",
    "KernelsConfig",
    "KlConfig",
    "KlEstimator",
    "KlPlace",
    "Level",
    "LoggerConfig",
    "Logprob",
    "ModelConfig",
    "MoeConfig",
    "OldPolicy",
    "OnError",
    "OnGap",
    "OnNonfinite",
    "OptimConfig",
    "ParallelConfig",
    "Proof",
    "Recompute",
    "RecomputeMethod",
    "Replay",
    "RewardConfig",
    "RewardKind",
    "RolloutConfig",
    "RunConfig",
    "SamplingConfig",
    "Schedule",
    "ServerMode",
    "ServersConfig",
    "ShapingConfig",
    "Spec",
    "StateDtype",
    "SurrogateConfig",
    "SurrogateKind",
    "TokenLevel",
    "require",
]


@dataclass(kw_only=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    @property
    def evaluates(self) -> bool:
        """Whether held-out prompts are answered: some are there, an engine is, and it is wanted."""
        live = self.rollout.replay is None
        return self.evaluation.every > 0 and self.data.held_out is not None and live
