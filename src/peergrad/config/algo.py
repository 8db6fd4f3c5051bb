"""The objective: every knob of every GRPO variant, and the combinations that make no sense.

A knob whose default turns it off (null, false, 0) and that could have no effect here is a
``Conflict`` in ``__post_init__``: refused, or put back if only a preset sets it
(``running.preset``). Which of the others are without effect depends on the whole run:
``algo.knobs`` knows.
"""

import re
from dataclasses import dataclass, field
from enum import Enum

from peergrad.config.conflict import agree, belongs
from peergrad.config.rules import at_least, finite, optional_positive, positive, require

Level = Enum("Level", ["none", "group", "batch", "running"])
TokenLevel = Enum("TokenLevel", ["none", "group", "batch"])
SurrogateKind = Enum(
    "SurrogateKind", ["clip", "gspo", "gspo_token", "cispo", "sapo", "icepop", "reinforce"]
)
CorrectionKind = Enum("CorrectionKind", ["none", "tis", "icepop", "mis", "seq_mask_tis"])
CorrectionLevel = Enum("CorrectionLevel", ["token", "sequence", "geometric"])
KlPlace = Enum("KlPlace", ["loss", "reward"])
KlEstimator = Enum("KlEstimator", ["k1", "k2", "k3", "abs", "k3_unbiased"])
Aggregation = Enum(
    "Aggregation",
    "seq_mean_token_mean token_mean group_token_mean seq_mean_token_sum token_sum_const",
)
Denominator = Enum("Denominator", ["all", "kept"])
OldPolicy = Enum("OldPolicy", ["auto", "recompute", "engine", "loglinear"])
FlatGroups = Enum("FlatGroups", ["keep", "drop"])

SEQUENCE_RATIO = (SurrogateKind.gspo, SurrogateKind.gspo_token)


@dataclass(kw_only=True)
class SamplingConfig:
    dynamic: bool = False
    """DAPO's dynamic sampling: a group of equal rewards, or outside the two bounds below, is
    replaced by another prompt's until the batch is full."""
    flat_groups: FlatGroups = FlatGroups.keep
    """Groups of equal rewards without dynamic sampling: ``keep`` (their advantage is 0) or ``drop``
    (none of their tokens is trained on)."""
    mean_low: float | None = None
    """Only groups whose mean reward lies above this are trained on."""
    mean_high: float | None = None
    """Only groups whose mean reward lies below this are trained on."""
    limit: int = 10
    """Dynamic sampling gives up when it has drawn this many times the groups of a step."""

    def __post_init__(self) -> None:
        at_least("algo.sampling.limit", self.limit, 2)
        low, high = self.mean_low, self.mean_high
        finite("algo.sampling.mean_low", low)
        finite("algo.sampling.mean_high", high)
        require(
            low is None or high is None or low < high,
            "algo.sampling.mean_low",
            low,
            f"must be below algo.sampling.mean_high ({high})",
            "lower it",
        )

    @property
    def selects(self) -> bool:
        """Whether any group may be turned away."""
        bounded = self.mean_low is not None or self.mean_high is not None
        return self.dynamic or bounded or self.flat_groups is FlatGroups.drop


@dataclass(kw_only=True)
class ShapingConfig:
    overlong_tokens: int = 0
    """DAPO's soft punishment: the last so many tokens before rollout.max_new_tokens cost up to
    ``overlong_factor``; 0 turns it off."""
    overlong_factor: float = 1.0
    """Reward that an answer of full length loses."""
    overlong_filter: bool = False
    """Do not train on answers that were cut off at rollout.max_new_tokens."""
    bias: float = 0.0
    """Added to every reward."""
    scale: float = 1.0
    """Multiplies every reward after ``bias``."""
    clip: float | None = None
    """Rewards are held within plus and minus this, after ``scale``."""
    discount: float = 1.0
    """Weight of what a token leads to, per token in between; 1 gives every token of an answer the
    same credit."""

    def __post_init__(self) -> None:
        at_least("algo.shaping.overlong_tokens", self.overlong_tokens, 0)
        positive("algo.shaping.overlong_factor", self.overlong_factor, "the usual value is 1")
        finite("algo.shaping.bias", self.bias, "use 0")
        finite("algo.shaping.scale", self.scale, "use 1")
        wrong = "erases every reward" if self.scale == 0 else "rewards what ought to be punished"
        require(
            self.scale > 0, "algo.shaping.scale", self.scale, wrong, "use 1, or another above 0"
        )
        optional_positive("algo.shaping.clip", self.clip)
        require(
            0 < self.discount <= 1,
            "algo.shaping.discount",
            self.discount,
            "must lie in (0, 1]",
            "use 1",
        )


@dataclass(kw_only=True)
class AdvantageConfig:
    mean: Level = Level.group
    """Whose mean reward is subtracted: of the ``group``, of the ``batch``, of all so far
    (``running``), or none."""
    std: Level = Level.group
    """Whose standard deviation of rewards divides; the same choice."""
    leave_one_out: bool = False
    """The mean is that of the others (RLOO)."""
    unbiased: bool = True
    """Standard deviations divide by n - 1 instead of n."""
    eps: float = 1e-6
    """Added to the standard deviation; where all rewards are equal, the result is exactly 0."""
    token_mean: TokenLevel = TokenLevel.none
    """Then subtract the mean over tokens: long answers count more, and groups of equal rewards get
    an advantage."""
    token_std: TokenLevel = TokenLevel.none
    """And divide by the standard deviation over tokens."""
    token_unbiased: bool | None = None
    """The same of that over tokens; default: as ``unbiased``."""
    token_eps: float = 1e-5
    """Added to the standard deviation over tokens."""
    clip: float | None = None
    """Advantages are held within plus and minus this, last of all."""

    def __post_init__(self) -> None:
        at_least("algo.advantage.eps", self.eps, 0)
        at_least("algo.advantage.token_eps", self.token_eps, 0)
        optional_positive("algo.advantage.clip", self.clip)
        agree(
            not self.leave_one_out or self.mean in (Level.group, Level.batch),
            "algo.advantage.leave_one_out",
            self.leave_one_out,
            f"needs the mean of a group or a batch, not {self.mean.name}",
            "set algo.advantage.mean=group",
        )

    @property
    def unbiased_over_tokens(self) -> bool:
        return self.unbiased if self.token_unbiased is None else self.token_unbiased


@dataclass(kw_only=True)
class SurrogateConfig:
    kind: SurrogateKind = SurrogateKind.clip
    """``clip`` (PPO's token ratio), ``gspo`` and ``gspo_token`` (sequence ratio), ``cispo``,
    ``sapo``, ``icepop`` (the ratio to the engine, kept within a band), ``reinforce`` (no ratio)."""
    clip_low: float = 0.2
    """The ratio is held above ``1 - clip_low``; 1 and more is no lower bound. ``icepop``: the lower
    end of its band is ``1 - clip_low``."""
    clip_high: float = 0.2
    """The ratio is held below ``1 + clip_high``."""
    dual_clip: float | None = None
    """Where the advantage is negative, the loss is at most this times its size (above 1,
    usually 3)."""
    log_ratio_low: float | None = None
    """Logarithms of ratios are held above this, before anything else; no gradient beyond it."""
    log_ratio_high: float | None = None
    """Logarithms of ratios are held below this."""
    unified_mask: bool = False
    """``cispo`` drops the tokens that PPO would clip."""
    tau_positive: float = 1.0
    """``sapo``: steepness of the gate where the advantage is positive."""
    tau_negative: float = 1.05
    """``sapo``: steepness of the gate where it is negative."""
    max_mean_ratio: float | None = None
    """A mini-batch whose mean ratio exceeds this is dropped."""

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high"):
            positive(f"algo.surrogate.{name}", getattr(self, name), "the usual value is 0.2")
        for name in ("tau_positive", "tau_negative"):
            positive(f"algo.surrogate.{name}", getattr(self, name), "the usual value is 1")
        kind, key = self.kind, "algo.surrogate"
        for name in ("dual_clip", "log_ratio_low", "max_mean_ratio"):
            finite(f"{key}.{name}", getattr(self, name), "use null to turn it off")
        belongs(f"{key}.dual_clip", self.dual_clip, kind, [SurrogateKind.clip, *SEQUENCE_RATIO])
        belongs(f"{key}.unified_mask", self.unified_mask, kind, [SurrogateKind.cispo])
        ratio = [k for k in SurrogateKind if k is not SurrogateKind.reinforce]
        for name in ("log_ratio_low", "log_ratio_high", "max_mean_ratio"):
            belongs(f"{key}.{name}", getattr(self, name), kind, ratio)
        if self.dual_clip is not None:
            remedy = "use 3, or null to turn it off"
            require(self.dual_clip > 1, f"{key}.dual_clip", self.dual_clip, "must exceed 1", remedy)
        low, high = self.log_ratio_low, self.log_ratio_high
        require(low is None or low < 0, f"{key}.log_ratio_low", low, "must be negative", "use -20")
        optional_positive(f"{key}.log_ratio_high", high, "use 20, or null to turn it off")
        least = self.max_mean_ratio
        require(
            least is None or least > 1,
            f"{key}.max_mean_ratio",
            least,
            "must exceed 1, the ratio on policy",
            "use 5, or null to turn it off",
        )


@dataclass(kw_only=True)
class CorrectionConfig:
    kind: CorrectionKind = CorrectionKind.none
    """How k = pi_old / pi_engine weighs a token: ``tis`` min(k, high), ``mis`` k within the bounds
    and 0 outside, ``icepop`` the same per token, ``seq_mask_tis`` k per token where the geometric
    mean of the sequence lies within the bounds."""
    level: CorrectionLevel = CorrectionLevel.token
    """``tis`` and ``mis``: k of the ``token``, the product over the ``sequence``, or its
    ``geometric`` mean."""
    low: float | None = None
    """Lower bound of k; default: 0, or 0.5 for ``icepop``."""
    high: float | None = None
    """Upper bound of k; default: 2, or 5 for ``icepop``."""
    dppo: float | None = None
    """Drop tokens whose probability moved from the engine's by more than this, in the direction
    that their advantage pushes (usually 0.2)."""
    opsm: float | None = None
    """Drop answers with a negative advantage whose mean log(pi_old / pi) exceeds this
    (usually 1e-4)."""
    m2po: float | None = None
    """Drop the tokens with the largest log(k)^2 until the mean of the rest is below this
    (usually 0.04)."""

    def __post_init__(self) -> None:
        for name in ("dppo", "opsm", "m2po"):
            optional_positive(f"algo.correction.{name}", getattr(self, name))
        none = CorrectionKind.none
        weights = [kind for kind in CorrectionKind if kind is not none]
        for name in ("low", "high"):
            belongs(f"algo.correction.{name}", getattr(self, name), self.kind, weights)
        low, high = self.bounds
        outside = "leaves out 1, which is k of every token on policy"
        require(low <= 1, "algo.correction.low", low, outside, "use at most 1")
        require(high >= 1, "algo.correction.high", high, outside, "use at least 1")
        require(
            0 <= low < high,
            "algo.correction.low",
            low,
            f"must lie in [0, algo.correction.high ({high}))",
            "lower it" if low > 0 else "use 0",
        )

    @property
    def bounds(self) -> tuple[float, float]:
        """The bounds of k in force."""
        usual = (0.5, 5.0) if self.kind is CorrectionKind.icepop else (0.0, 2.0)
        low = usual[0] if self.low is None else self.low
        return low, usual[1] if self.high is None else self.high

    @property
    def drops_tokens(self) -> list[str]:
        """The knobs in force that may drop a part of an answer."""
        kind, token = self.kind, self.level is CorrectionLevel.token
        drops = kind is CorrectionKind.icepop or (kind is CorrectionKind.mis and token)
        single = [name for name in ("dppo", "m2po") if getattr(self, name) is not None]
        return [*(["kind"] if drops else []), *single]

    @property
    def decides_by_sequence(self) -> str | None:
        """The knob in force that looks at an answer as a whole, if there is one."""
        if self.kind is CorrectionKind.seq_mask_tis:
            return "kind"
        weighs = self.kind in (CorrectionKind.tis, CorrectionKind.mis)
        if weighs and self.level is not CorrectionLevel.token:
            return "level"
        return None if self.opsm is None else "opsm"

    @property
    def drops(self) -> bool:
        """Whether any token may be dropped."""
        whole = self.kind in (CorrectionKind.mis, CorrectionKind.seq_mask_tis)
        return whole or bool(self.drops_tokens) or self.opsm is not None

    @property
    def weighs_engine(self) -> bool:
        """Whether pi_old / pi_engine is looked at."""
        return self.kind is not CorrectionKind.none or self.m2po is not None


@dataclass(kw_only=True)
class KlConfig:
    coef: float = 0.04
    """Weight of KL(policy || reference); 0 loads no reference."""
    place: KlPlace = KlPlace.loss
    """In the ``loss``, or token by token in the ``reward``."""
    estimator: KlEstimator = KlEstimator.k3
    """With d = log(pi / pi_ref): ``k1`` d, ``k2`` d^2 / 2, ``k3`` exp(-d) + d - 1, ``abs`` |d|;
    ``k3_unbiased`` is k3 with the gradient d of KL(policy || reference)."""
    clamp_log_ratio: float | None = None
    """d is held within plus and minus this; no gradient beyond it."""
    clamp: float | None = None
    """The estimate is held within plus and minus this; no gradient beyond it."""
    target: float | None = None
    """In the reward: adapt ``coef`` until the KL per token is this."""
    horizon: int = 10_000
    """Rollouts over which the adaptation acts."""
    reset_every: int = 0
    """Steps after which the reference becomes the present policy (R1); 0: never."""

    def __post_init__(self) -> None:
        for name in ("coef", "reset_every"):
            at_least(f"algo.kl.{name}", getattr(self, name), 0)
        at_least("algo.kl.horizon", self.horizon, 1)
        for name in ("clamp_log_ratio", "clamp", "target"):
            optional_positive(f"algo.kl.{name}", getattr(self, name))
            belongs(f"algo.kl.{name}", getattr(self, name), self.coef > 0, [True], "algo.kl.coef>0")
        belongs("algo.kl.reset_every", self.reset_every, self.coef > 0, [True], "algo.kl.coef>0")
        reward = self.place is KlPlace.reward
        belongs("algo.kl.target", self.target, reward, [True], "algo.kl.place=reward")
        in_loss = self.coef > 0 and not reward
        require(
            not (in_loss and self.estimator is KlEstimator.k1),
            "algo.kl.estimator",
            "k1",
            "has no expected gradient in the loss: it would regularise nothing",
            "use k2 or k3, or set algo.kl.place=reward",
        )
        require(
            not (reward and self.estimator is KlEstimator.k3_unbiased),
            "algo.kl.estimator",
            "k3_unbiased",
            "differs from k3 in its gradient alone, and rewards have none",
            "use k3",
        )


@dataclass(kw_only=True)
class AlgoConfig:
    source: str = ""
    """Where this objective comes from, and what was changed of it; ``explain`` prints it."""
    differences: list[str] = field(default_factory=list)
    """Where it deliberately differs from its source."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    surrogate: SurrogateConfig = field(default_factory=SurrogateConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    kl: KlConfig = field(default_factory=KlConfig)
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, over the full vocabulary."""
    aggregation: Aggregation = Aggregation.seq_mean_token_mean
    """How per-token losses become one scalar; denominators are global over ranks and
    micro-batches."""
    denominator: Denominator = Denominator.all
    """Whether tokens and answers that were dropped still count there (``all``) or not (``kept``).
    """
    old_policy: OldPolicy = OldPolicy.auto
    """The policy that ratios are taken to: that of the start of the step (``recompute``), the
    ``engine``'s logprobs, or ``loglinear`` between engine and present by version. ``auto``: the
    engine's for rollouts older than the weights if nothing corrects them, else ``recompute``."""
    epochs: int = 1
    """Passes over the rollouts of a step."""
    minibatches: int = 1
    """Optimizer steps per pass."""
    shuffle: bool = False
    """Divide the groups into mini-batches at random, anew for every pass."""

    def __post_init__(self) -> None:
        at_least("algo.entropy_coef", self.entropy_coef, 0)
        for name in ("epochs", "minibatches"):
            at_least(f"algo.{name}", getattr(self, name), 1)
        agree(
            not self.shuffle or self.minibatches > 1,
            "algo.shuffle",
            self.shuffle,
            "has no effect with one mini-batch",
            "set algo.minibatches above 1, or remove it",
        )
        self._check_ratio()
        self._check_old_policy()

    @property
    def title(self) -> str:
        """Whose objective it is and what was changed of it, without the source's own settings."""
        return re.sub(r" \(there:[^)]*\)", "", self.source) or "an objective of your own"

    def _check_ratio(self) -> None:
        kind, correction = self.surrogate.kind, self.correction
        for name in correction.drops_tokens if kind in SEQUENCE_RATIO else []:
            agree(
                False,
                f"algo.correction.{name}",
                getattr(getattr(correction, name), "name", getattr(correction, name)),
                f"drops single tokens, but surrogate.kind={kind.name} has one ratio per answer",
                "drop whole answers (seq_mask_tis, or mis with level=sequence), or use kind=clip",
                idle=False,
            )
        decides = correction.decides_by_sequence
        for name in correction.drops_tokens if decides else []:
            agree(
                False,
                f"algo.correction.{name}",
                getattr(getattr(correction, name), "name", getattr(correction, name)),
                f"drops single tokens, but algo.correction.{decides} judges whole answers",
                "use one of the two",
                gives_way=(f"algo.correction.{name}", f"algo.correction.{decides}"),
                idle=False,
            )
        varies = [
            ("algo.kl.place", "reward", self.kl.coef > 0 and self.kl.place is KlPlace.reward),
            ("algo.shaping.discount", self.shaping.discount, self.shaping.discount < 1),
        ]
        for key, value, on in varies:
            require(
                not (on and kind is SurrogateKind.gspo),
                key,
                value,
                "gives the tokens of an answer different advantages; gspo has one ratio for all",
                "set algo.surrogate.kind=gspo_token",
            )

    def _check_old_policy(self) -> None:
        old, correction = self.old_policy, self.correction
        engine = old is OldPolicy.engine or self.surrogate.kind is SurrogateKind.icepop
        agree(
            not (engine and correction.weighs_engine),
            "algo.correction.kind" if correction.m2po is None else "algo.correction.m2po",
            correction.kind.name if correction.m2po is None else correction.m2po,
            "corrects the old policy towards the engine's, but the old policy is the engine's",
            "set algo.old_policy=recompute (and another surrogate.kind than icepop), or remove it",
        )
        agree(
            self.surrogate.kind is not SurrogateKind.icepop
            or old in (OldPolicy.auto, OldPolicy.engine),
            "algo.old_policy",
            old.name,
            "the ratio of surrogate.kind=icepop is to the engine",
            "set algo.old_policy=engine",
        )
        also = () if correction.m2po else ("algo.denominator",)
        needs_pass = correction.m2po is not None or (
            self.denominator is Denominator.kept and correction.drops
        )
        agree(
            not (old is OldPolicy.loglinear and needs_pass),
            "algo.old_policy",
            "loglinear",
            "must be known before the update, for m2po or for the denominator=kept of a correction",
            f"set algo.old_policy=recompute{''.join(f' or {key}=all' for key in also)}",
            gives_way=(*also, "algo.old_policy"),
            idle=False,
        )
