"""The optimizer's section: learning rate, AdamW, what it keeps and how."""

from dataclasses import dataclass
from enum import Enum

from peergrad.config.rules import at_least, positive, require

OnNonfinite = Enum("OnNonfinite", ["skip", "stop"])
Schedule = Enum("Schedule", ["constant", "linear", "cosine"])
StateDtype = Enum("StateDtype", ["float32", "bfloat16", "float16", "fp8"])


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
    """Shape after the warm-up, down to ``min_lr``."""
    decay_steps: int | None = None
    """Training steps until ``schedule`` is at its end; default: run.steps."""
    min_lr: float = 0.0
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    """A loss or gradient norm that is NaN or infinite: skip the update, or stop; the batch is
    dumped either way."""
    use_precision_aware_optimizer: bool = False
    """Of float32 main parameters keep what the bfloat16 ones leave out, and moments as said below.
    Needs a GPU, the package transformer-engine, parallel.distributed_optimizer, bfloat16."""
    main_params_dtype: StateDtype = StateDtype.float32
    """With it: float32, or float16, scaled."""
    exp_avg_dtype: StateDtype = StateDtype.float32
    """With it: Adam's first moment, float32, bfloat16, float16 or fp8, the last two scaled."""
    exp_avg_sq_dtype: StateDtype = StateDtype.float32
    """With it: the second one."""
    optimizer_cpu_offload: bool = False
    """With it: the CPU keeps main parameters and moments, float32, and computes their update."""
    optimizer_offload_fraction: float = 1.0
    """Of the parameters, with ``optimizer_cpu_offload``."""
    overlap_cpu_optimizer_d2h_h2d: bool = False
    """With ``optimizer_cpu_offload``: update some while others are being copied."""

    def __post_init__(self) -> None:
        self._check_states()
        positive("optim.lr", self.lr, "the usual value is 1e-6")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name}", value, "must lie in [0, 1)", "use 0.9 / 0.95")
        # Adam divides 0 by 0 where a gradient has always been 0, as for the padded vocabulary.
        positive("optim.eps", self.eps, "the usual value is 1e-8")
        for name in ("weight_decay", "clip_grad", "warmup_steps", "min_lr"):
            at_least(f"optim.{name}", getattr(self, name), 0)
        require(
            self.min_lr == 0 or self.schedule is not Schedule.constant,
            "optim.min_lr",
            self.min_lr,
            "has no effect on a constant schedule",
            "set optim.schedule=linear or cosine",
        )
        if self.decay_steps is not None:
            at_least("optim.decay_steps", self.decay_steps, 1)
        require(
            self.decay_steps is None or self.schedule is not Schedule.constant,
            "optim.decay_steps",
            self.decay_steps,
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

    def _check_states(self) -> None:
        """What is set must have an effect, and be what Megatron and Transformer Engine know."""
        aware, offload = self.use_precision_aware_optimizer, self.optimizer_cpu_offload
        remedy, fraction = "set that, or unset this", self.optimizer_offload_fraction
        for name in ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
            key, kind = f"optim.{name}", getattr(self, name)
            plain = kind is StateDtype.float32
            rule = "has no effect without optim.use_precision_aware_optimizer"
            require(plain or aware, key, kind.name, rule, remedy)
            rule = "has no effect with optim.optimizer_cpu_offload, which keeps float32"
            require(plain or not offload, key, kind.name, rule, "unset one of the two")
        kind = self.main_params_dtype
        fit = kind in (StateDtype.float32, StateDtype.float16)
        rule = "must be float32 or float16"
        require(fit, "optim.main_params_dtype", kind.name, rule, "use float32")
        rule = "is a part of optim.use_precision_aware_optimizer"
        require(aware or not offload, "optim.optimizer_cpu_offload", offload, rule, remedy)
        key, rule = "optim.optimizer_offload_fraction", "must lie in (0, 1]"
        require(0 < fraction <= 1, key, fraction, rule, "use 1 for all")
        for name, unset in (
            ("optimizer_offload_fraction", 1),
            ("overlap_cpu_optimizer_d2h_h2d", 0),
        ):
            key, value = f"optim.{name}", getattr(self, name)
            rule = "has no effect without optim.optimizer_cpu_offload"
            require(offload or value == unset, key, value, rule, remedy)
