"""The objective in force: a formula with the numbers in it, and every knob."""

from collections.abc import Iterator

from peergrad.algo.knobs import Status, knobs
from peergrad.algo.plan import Old, Plan, make_plan
from peergrad.config import (
    Aggregation,
    Config,
    CorrectionKind,
    CorrectionLevel,
    Denominator,
    Fp8,
    Fp8Serving,
    KlEstimator,
    KlPlace,
    Level,
    SurrogateKind,
    TokenLevel,
)

ESTIMATE = {
    KlEstimator.k1: "d",
    KlEstimator.k2: "d²/2",
    KlEstimator.k3: "exp(−d) + d − 1",
    KlEstimator.abs: "|d|",
    KlEstimator.k3_unbiased: "exp(−d) + d − 1 by value, d by gradient",
}
OLD = {
    Old.current: "π of this forward pass, constant",
    Old.recompute: "π at the start of the step, from a pass before the first update",
    Old.engine: "the engine's logprobs: π_old = π_engine, the policy that sampled",
    Old.loglinear: "log π_old = log π_engine + λ (log π − log π_engine), constant; "
    "λ = lag/(lag + 1), lag = weight versions since the token was sampled",
}


def explain(config: Config) -> str:
    """The text that ``tools/explain.py`` prints and every run keeps as ``objective.txt``."""
    algo = config.algo
    lines = [algo.source or "an objective of your own", ""]
    if algo.differences:
        before = " before what was changed" if ", changed: " in algo.source else ""
        heading = f"deliberate differences{before}"
        lines += [heading, *(f"  - {text}" for text in algo.differences), ""]
    plan = make_plan(config)
    rows = list(_formula(config, plan))
    width = max(len(name) for name, _ in rows)
    lines += [f"  {name:<{width}}  {text}" for name, text in rows]
    return "\n".join([*lines, "", *_table(config)]) + "\n"


def _table(config: Config) -> Iterator[str]:
    found = knobs(config)
    widths = [max(len(getattr(k, name)) for k in found) for name in ("key", "value")]
    for status in Status:
        some = [knob for knob in found if knob.status is status]
        if some:
            yield f"{status.name} ({len(some)})"
            for k in some:
                yield f"  {k.key:<{widths[0]}}  {k.value:<{widths[1]}}  {k.note}".rstrip()


def _formula(config: Config, plan: Plan) -> Iterator[tuple[str, str]]:
    algo = config.algo
    kl_in_loss = algo.kl.coef > 0 and algo.kl.place is KlPlace.loss
    terms = "c · S" if algo.correction.kind is not CorrectionKind.none else "S"
    terms += f" + {algo.kl.coef:g} · KL" if kl_in_loss else ""
    terms += f" − {algo.entropy_coef:g} · H" if algo.entropy_coef else ""
    yield "loss", f"Σ_answers Σ_tokens w · ( {terms} )"
    yield "w", _weight(config)
    yield "S", _surrogate(config)
    ratio = algo.surrogate.kind is not SurrogateKind.reinforce
    if ratio:
        yield "ρ", _ratio(config)
    rest = [*_correction(config), *_kl(config, plan)]
    yield "π", "of a sampled token, by the policy as it is now"
    asked = [text for _, text in rest]
    if ratio or any("π_old" in text for text in asked):
        one = ": ρ = 1, and the gradient is that of −A log π"
        asked.append(OLD[plan.old] + (one if ratio and plan.old is Old.current else ""))
        yield "π_old", asked[-1]
    if any("π_engine" in text for text in asked):
        yield "π_engine", "of the same token, as the engine that sampled reported it"
    yield from rest
    if algo.entropy_coef:
        yield "H", "entropy of π over the full vocabulary"
    yield from _advantage(config)
    yield from _sampling(config)
    yield "passes", _passes(plan)
    yield "precision", _precision(config, plan)


def _weight(config: Config) -> str:
    algo = config.algo
    kept = algo.denominator is Denominator.kept
    what = "kept" if kept else "sampled"
    whole = "with a kept token" if kept else "sampled"
    answers = f"answers {whole}"
    return {
        Aggregation.seq_mean_token_mean: f"1/(B n): n tokens {what} of the answer, B {answers}",
        Aggregation.token_mean: f"1/N: N tokens {what}",
        Aggregation.group_token_mean: (
            f"1/(P N_g): N_g tokens {what} of the group, P groups {whole}"
        ),
        Aggregation.seq_mean_token_sum: f"1/B: B {answers}",
        Aggregation.token_sum_const: (
            f"1/(B · {config.rollout.max_new_tokens}): B {answers}, rollout.max_new_tokens"
        ),
    }[algo.aggregation] + ", of the optimizer step over all ranks"


def _surrogate(config: Config) -> str:
    s = config.algo.surrogate
    bounds = f"{max(0.0, 1 - s.clip_low):g}, {1 + s.clip_high:g}"
    if s.kind is SurrogateKind.reinforce:
        return "−A · log π"
    if s.kind is SurrogateKind.cispo:
        mask = "; 0 where PPO would clip" if s.unified_mask else ""
        return f"−const(clip(ρ, {bounds})) · A · log π{mask}; const = no gradient through it"
    if s.kind is SurrogateKind.sapo:
        return (
            f"−A · (4/τ) · sigmoid(τ (ρ − 1)), τ = {s.tau_positive:g} where A > 0, "
            f"{s.tau_negative:g} where A < 0"
        )
    if s.kind is SurrogateKind.icepop:
        return f"−ρ A where ρ lies in [{bounds}], else 0"
    worst = "" if s.dual_clip is None else f", at most −{s.dual_clip:g} A where A < 0"
    return f"−min( ρ A, clip(ρ, {bounds}) A ){worst}"


def _ratio(config: Config) -> str:
    s = config.algo.surrogate
    d = "log π − log π_old"
    if s.log_ratio_low is not None or s.log_ratio_high is not None:
        low = "−∞" if s.log_ratio_low is None else f"{s.log_ratio_low:g}"
        high = "∞" if s.log_ratio_high is None else f"{s.log_ratio_high:g}"
        d = f"clip({d}, {low}, {high})"
    form = {
        SurrogateKind.gspo: f"exp( mean over the answer's tokens of ({d}) ), one for all of them",
        SurrogateKind.gspo_token: f"exp( mean over the answer's tokens of ({d}) ) by value, "
        "by gradient the token's own",
    }.get(s.kind, f"exp({d}) of the token")
    limit = s.max_mean_ratio
    return form if limit is None else f"{form}; a mini-batch of mean above {limit:g} is dropped"


def _correction(config: Config) -> Iterator[tuple[str, str]]:
    c = config.algo.correction
    low, high = c.bounds
    k = {
        CorrectionLevel.token: "k",
        CorrectionLevel.sequence: "Π k",
        CorrectionLevel.geometric: "geometric mean of k",
    }[c.level]
    weights = {
        CorrectionKind.tis: f"clip({k}, {low:g}, {high:g})",
        CorrectionKind.mis: f"{k} where it lies in [{low:g}, {high:g}], else dropped",
        CorrectionKind.icepop: f"k where it lies in [{low:g}, {high:g}], else dropped",
        CorrectionKind.seq_mask_tis: (
            f"k; answers whose geometric mean of k lies outside [{low:g}, {high:g}] are dropped"
        ),
    }
    if c.kind is not CorrectionKind.none:
        yield "c", f"{weights[c.kind]}, constant"
    if c.weighs_engine:
        yield "k", "π_old / π_engine of the token, constant"
    if c.dppo is not None:
        yield "dropped", f"tokens with (π − π_engine) · sign(A) > {c.dppo:g}"
    if c.opsm is not None:
        yield "dropped", f"answers with A < 0 and mean(log π_old − log π) > {c.opsm:g}"
    if c.m2po is not None:
        yield "dropped", f"tokens with the largest (log k)² until the mean of the rest < {c.m2po:g}"


def _kl(config: Config, plan: Plan) -> Iterator[tuple[str, str]]:
    kl = config.algo.kl
    if kl.coef == 0:
        return
    text = ESTIMATE[kl.estimator]
    if kl.clamp is not None:
        text += f"; the estimate within ±{kl.clamp:g}"
    policy = "π"
    if kl.place is KlPlace.reward:
        policy = "π_old" if plan.old is Old.recompute else "π_engine"
        weight = f"weight {kl.coef:g}"
        if kl.target is not None:
            weight += f", adapted towards {kl.target:g} a token over {kl.horizon} answers"
        text += f"; in the reward, {weight}"
    yield "KL", text
    held = "" if kl.clamp_log_ratio is None else f" held within ±{kl.clamp_log_ratio:g}"
    yield "d", f"log {policy} − log π_ref{held}"
    again = f"; π_ref becomes π every {kl.reset_every} steps" if kl.reset_every else ""
    yield "π_ref", f"of the same token, by the reference{again}"


def _advantage(config: Config) -> Iterator[tuple[str, str]]:
    algo = config.algo
    shaping, adv = algo.shaping, algo.advantage
    reward, where = "reward", ""
    if shaping.overlong_tokens:
        limit = config.rollout.max_new_tokens
        start = limit - shaping.overlong_tokens
        reward += f" − {shaping.overlong_factor:g} · (length − {start})₊/{shaping.overlong_tokens}"
        where = "; (x)₊ = max(x, 0)"
    if shaping.bias:
        reward = f"({reward} {shaping.bias:+g})"
    if shaping.scale != 1:
        reward = f"{shaping.scale:g} · {reward}"
    if shaping.clip is not None:
        reward = f"clip({reward}, ±{shaping.clip:g})"
    yield "r", reward + where
    yield "A", _per_answer(config)
    yield from _credit(config)
    if adv.token_mean is not TokenLevel.none or adv.token_std is not TokenLevel.none:
        text = _normalised("A", adv.token_mean.name, adv.token_std.name, adv.token_eps)
        over = _over(adv.unbiased_over_tokens) if adv.token_std is not TokenLevel.none else ""
        most = "long answers count more, groups of equal rewards get a signal"
        yield "then A", f"{text} over kept tokens{over}: {most}"
    if adv.clip is not None:
        yield "then A", f"held within ±{adv.clip:g}"


def _credit(config: Config) -> Iterator[tuple[str, str]]:
    """What a token leads to: the answer's outcome on its last token, a KL on each."""
    algo, discount = config.algo, config.algo.shaping.discount
    kl = algo.kl.coef > 0 and algo.kl.place is KlPlace.reward
    if not kl and discount == 1:
        return
    outcome = "A" if discount == 1 else f"{discount:g}^(T−t) · A"
    cost, words = "", ["t = this token"]
    if kl:
        gamma = "" if discount == 1 else f"{discount:g}^(u−t) · "
        cost = f" − {algo.kl.coef:g} · Σ_(u=t…T) {gamma}KL_u"
        words.append("KL_u = KL of token u")
    words.append("T = the answer's last token")
    yield "then A", f"{outcome}{cost};  {', '.join(words)}"


def _over(unbiased: bool) -> str:
    return f", std over their number{' − 1' if unbiased else ''}"


def _per_answer(config: Config) -> str:
    adv = config.algo.advantage
    mean = "others of the " + adv.mean.name if adv.leave_one_out else adv.mean.name
    text = _normalised("r", mean, adv.std.name, adv.eps)
    text += "; running = all answers of the run so far" if "(running)" in text else ""
    if adv.std is not Level.none:
        text += _over(adv.unbiased)
    flat = Level.group in (adv.mean, adv.std)
    return text + ("; exactly 0 in groups of equal rewards" if flat else "")


def _normalised(name: str, mean: str, std: str, eps: float) -> str:
    text = name if mean == "none" else f"{name} − mean_({mean})"
    return text if std == "none" else f"( {text} ) / ( std_({std}) + {eps:g} )"


def _sampling(config: Config) -> Iterator[tuple[str, str]]:
    algo, rollout = config.algo, config.rollout
    steps = f"{algo.epochs * algo.minibatches} optimizer step(s)"
    order = "in random order" if algo.shuffle else "in order"
    yield (
        "batch",
        (
            f"{rollout.prompts_per_step} groups of {rollout.group_size} answers, {steps}: "
            f"{algo.epochs} pass(es) over {algo.minibatches} mini-batch(es) {order}; "
            f"at most {rollout.max_staleness} version(s) old"
        ),
    )
    if algo.sampling.selects:
        flat = algo.sampling.dynamic or algo.sampling.flat_groups.name == "drop"
        rules = ["rewards are not all equal"] if flat else []
        low, high = algo.sampling.mean_low, algo.sampling.mean_high
        rules += [f"mean reward > {low:g}"] if low is not None else []
        rules += [f"mean reward < {high:g}"] if high is not None else []
        again = algo.sampling.dynamic and rollout.replay is None
        others = "replaced by other prompts'" if again else "dropped"
        yield "groups", f"kept where {' and '.join(rules)}; the others are {others}"
    if algo.shaping.overlong_filter:
        yield "answers", f"cut off at {rollout.max_new_tokens} tokens are dropped"


def _precision(config: Config, plan: Plan) -> str:
    parallel, dtype = config.parallel, config.model.dtype.name
    logits = f"logits in {config.kernels.logits.name}"
    if config.rollout.servers.fp8 is not Fp8Serving.off and config.rollout.replay is None:
        logits += f"; the engine in FP8 ({config.rollout.servers.fp8.name})"
    if parallel.fp8 is Fp8.off:
        return f"weights and products in {dtype}, {logits}"
    scale = "a block of 128" if parallel.fp8 is Fp8.blockwise else "a whole tensor"
    when = {
        "old policy": parallel.fp8_score and (plan.old is Old.recompute or plan.score_each),
        "reference": parallel.fp8_reference and plan.reference,
    }
    where = ", ".join(["updates", *(name for name, so in when.items() if so)])
    first, last = parallel.fp8_first_layers_bf16, parallel.fp8_last_layers_bf16
    but = f"; not the first {first} and the last {last} layers" if first or last else ""
    eight = f"8 bits ({parallel.fp8_format.name}, {parallel.fp8.name}: a scale for {scale})"
    held = "8 bits" if parallel.fp8_params else dtype
    return f"weights in {held}, products in {eight} in {where}{but}; else in {dtype}, {logits}"


def _passes(plan: Plan) -> str:
    found = ["reference"] if plan.reference else []
    found += ["old policy"] if plan.old is Old.recompute else []
    found += ["before every update, for the denominators"] if plan.score_each else []
    return "forward only: " + ("; ".join(found) or "none")
