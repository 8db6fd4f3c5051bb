"""What will run, on a few lines for a person."""

import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from peergrad.checks.fp8 import both_in_blocks, other_weights
from peergrad.checks.inputs import Inputs, Source
from peergrad.checks.layout import data_ranks
from peergrad.checks.place import (
    checkpoint_bytes,
    disk_warning,
    gigabytes,
    resumed_step,
    run_folder,
)
from peergrad.checks.recording import foreign
from peergrad.config import (
    Config,
    Fp8,
    Fp8Serving,
    KlPlace,
    ParallelConfig,
    Replay,
    RewardKind,
    ServerMode,
    ServersConfig,
    Spec,
    SurrogateKind,
)
from peergrad.parallel import engine
from peergrad.parallel.hf.config import Experts, Shape
from peergrad.parallel.hf.tensors import parameters
from peergrad.prompts import GENERATED, paths
from peergrad.running.environment import conflicts

WIDTH, LABEL = 80, 13
REWARDS = {
    RewardKind.arithmetic: "arithmetic: 1 if the whole answer is right, else 0",
    RewardKind.gsm8k: "gsm8k: 1 if the final number is right, else 0",
    RewardKind.math: "math: 1 if the final expression is right, else 0",
}


def summary(config: Config, world: int, inputs: Inputs) -> str:
    """``plan`` with its warnings: what ``check`` and ``check_inputs`` have let pass."""
    warnings = [("warning", text) for text in warnings_of(config, inputs)]
    return plan(config, world, inputs) + _table(warnings)


def plan(config: Config, world: int, inputs: Inputs) -> str:
    """What will run, in about 13 lines of 80 columns."""
    return _table(
        [*_model(config, world, inputs), *_work(config, inputs), *_results(config, inputs)]
    )


def evaluation_plan(config: Config, shape: Shape, held_out: Source) -> str:
    """What an evaluation alone will do, in some lines, and what is perhaps not meant."""
    evaluation, dtype = config.evaluation, config.model.dtype.name
    size = f"{_count(parameters(shape))} parameters in {dtype}"
    used, longest = min(evaluation.prompts, held_out.prompts), config.rollout.max_new_tokens
    rows = [
        ("model", f"{_path(config.model.path, 40)}: {size}"),
        ("prompts", f"the first {used} of {_source(held_out)}"),
        ("answers", f"{evaluation.samples} to each, {_drawn(config)}, of at most {longest} tokens"),
        ("reward", _reward(config)),
        ("servers", _servers(config)),
        *(("warning", note) for note in held_out.notes),
    ]
    return _table(rows)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "".join(line for label, text in rows for line in _lines(label, text))


def _lines(label: str, text: str) -> Iterator[str]:
    """``label`` and ``text`` side by side, the text wrapped if it must be."""
    parts = textwrap.wrap(text, WIDTH - LABEL - 2, break_on_hyphens=False)
    for i, part in enumerate(parts):
        yield f"{'' if i else label:<{LABEL}}  {part}\n"


def _path(path: str | Path, room: int = 45) -> str:
    """A path, cut in front to fit."""
    text = str(path)
    return text if len(text) <= room else f"...{text[-(room - 3) :]}"


def _model(config: Config, world: int, inputs: Inputs) -> Iterator[tuple[str, str]]:
    shape, parallel, algo = inputs.shape, config.parallel, config.algo
    size = f"{shape.layers} layers of {shape.hidden}, {_count(parameters(shape))} parameters"
    yield "model", f"{_path(config.model.path, 25)}: {shape.family}, {size}"
    if config.model.weights is not None:
        yield "weights", f"{_path(config.model.weights)}"
    pieces = f" ({parallel.virtual_pipeline} pieces each)" if parallel.virtual_pipeline > 1 else ""
    context = f" x CP {parallel.context}" if parallel.context > 1 else ""
    data, experts = data_ranks(config, world), shape.experts
    grid = f"TP {parallel.tensor} x PP {parallel.pipeline}{pieces}{context} x DP {data}"
    grid += ", sequence parallel" if parallel.sequence else ""
    processes = _plural(world, "process", "processes")
    dtype = config.model.dtype.name + _fp8(parallel)
    yield "layout", f"{processes}: {grid}, {_spec(config)} layers in {dtype}"
    if experts is not None:
        yield "experts", _experts(config, experts)
    place = " in the reward" if algo.kl.place is KlPlace.reward else ""
    kl = f"; KL {algo.kl.coef:g}{place}" if algo.kl.coef else ""
    yield "objective", f"{algo.title}{kl}"


def _experts(config: Config, experts: Experts) -> str:
    parallel, moe = config.parallel, config.moe
    shared = parallel.expert_tensor or parallel.tensor
    text = (
        f"{experts.chosen} of {experts.number} in each layer, EP {parallel.expert} x ETP {shared}"
    )
    losses = {"balance": moe.aux_loss_coef, "z": moe.z_loss_coef}
    text += "".join(f"; {name} loss {coef:g}" for name, coef in losses.items() if coef)
    chosen = {Replay.auto: ", where it says them", Replay.on: ""}.get(moe.replay)
    return text + ("" if chosen is None else f"; those that the engine chose{chosen}")


def _work(config: Config, inputs: Inputs) -> Iterator[tuple[str, str]]:
    rollout, algo = config.rollout, config.algo
    updates = algo.epochs * algo.minibatches
    yield (
        "step",
        f"{rollout.prompts_per_step} prompts x {rollout.group_size} answers, "
        f"{_plural(updates, 'update')}, at most {_count(_tokens(config, inputs))} tokens",
    )
    yield "steps", _steps(config, inputs)
    if rollout.replay is not None:
        yield "rollouts", f"recorded ones of {_path(rollout.replay)}; no engine, no evaluation"
        return
    assert inputs.train is not None
    yield "prompts", _source(inputs.train)
    yield "reward", _reward(config)
    stale = config.rollout.max_staleness
    lag = f"; answers up to {_plural(stale, 'version')} old" if stale else ""
    yield "servers", _servers(config) + _held(config) + lag
    if both_in_blocks(config):
        others = other_weights(config, inputs.shape)
        alike = f"not the trainer's: {others[0]}" if others else "the trainer's, bit for bit"
        yield "FP8 weights", f"those that servers multiply with are {alike}"
    yield "evaluation", _evaluation(config, inputs)


def _results(config: Config, inputs: Inputs) -> Iterator[tuple[str, str]]:
    every, keep = config.checkpoint.every, config.checkpoint.keep
    every = every if every < config.run.steps else 0
    often = f"every {_plural(every, 'step')}" if every else "at the end"
    kept = f", {f'the newest {keep}' if keep else 'all'} kept" if every else ""
    size = gigabytes(checkpoint_bytes(config, inputs.shape))
    yield "checkpoints", f"{often}{kept}, about {size} each"
    step = resumed_step(config)
    state = "new" if step is None else f"resumed after step {step}"
    yield "run folder", f"{_path(run_folder(config))} ({state})"


def warnings_of(config: Config, inputs: Inputs) -> Iterator[str]:
    """What is allowed, and perhaps not meant."""
    disk = disk_warning(config, inputs.shape)
    if disk is not None:
        yield disk
    yield from conflicts(config)
    recorded = foreign(config)
    if recorded is not None:
        algo = config.algo
        ratio = algo.surrogate.kind is not SurrogateKind.reinforce or algo.correction.weighs_engine
        acts = f"algo.old_policy={algo.old_policy.name} decides what ratios are taken to"
        yield (
            f"rollout.replay {recorded}, so this run's policy is not the one that answered: "
            f"{acts if ratio else 'algo.surrogate.kind=reinforce has no ratio that corrects it'}"
        )
    train, wanted = inputs.train, config.rollout.prompts_per_step
    if train is not None and train.prompts < wanted:
        yield f"a step takes {wanted} prompts, data.source has {train.prompts}: some come twice"
    evaluation = config.evaluation
    if evaluation.every and config.data.held_out is None and train is not None:
        yield f"evaluation.every={evaluation.every} has no effect without data.held_out"
    yield from _prompt_warnings(config, inputs)
    servers, usual = config.rollout.servers, ServersConfig()
    if servers.mode is ServerMode.external and not servers.wait:  # else peergrad.serve reads them
        for key in ("count", "tensor", "start_timeout", "args"):
            if getattr(servers, key) != getattr(usual, key):
                yield f"rollout.servers.{key} has no effect with mode=external: nothing is started"
    step = resumed_step(config)
    if step is not None and step >= config.run.steps:
        yield f"the newest checkpoint is of step {step}: nothing is left of run.steps to train"
    if config.run.resume and step is None:
        yield "run.resume=true, but there is no checkpoint: the run starts from the beginning"


def _prompt_warnings(config: Config, inputs: Inputs) -> Iterator[str]:
    for option, source in (("data.source", inputs.train), ("data.held_out", inputs.held_out)):
        if source is None:
            continue
        yield from source.notes
        if source.repeated:
            also = f", {source.contradicting} with another answer" if source.contradicting else ""
            counts = f"{source.repeated} of {source.prompts} prompts"
            yield f"{option}: {counts} repeat the tokens of an earlier one{also}"
    held_out = inputs.held_out
    if inputs.train is None or held_out is None:
        return
    trained = paths(config.data.source)
    # The two splits of what is generated share no problem.
    if set(trained) & set(paths(config.data.held_out)) - {GENERATED}:
        which = "has a file" if trained[1:] else "is the file"
        yield f"data.held_out {which} that is trained on: its pass@1 will say nothing"
    elif inputs.shared:
        counts = f"{inputs.shared} of {held_out.prompts} prompts"
        yield f"data.held_out: {counts} are trained on, too: its pass@1 will be too high"


def _tokens(config: Config, inputs: Inputs) -> int:
    """The most that a step can train on, prompts included."""
    longest = config.data.max_prompt_tokens if inputs.train is None else inputs.train.longest
    return config.rollout.batch_size * (longest + config.rollout.max_new_tokens)


def _steps(config: Config, inputs: Inputs) -> str:
    steps, optim = config.run.steps, config.optim
    text = f"{steps}"
    if inputs.train is not None:
        passes = steps * config.rollout.prompts_per_step / inputs.train.prompts
        text += f" ({passes:.2g} epochs)"
    text += f", lr {optim.lr:g} {optim.schedule.name}"
    return text + (
        f", {_plural(optim.warmup_steps, 'update')} of warm-up" if optim.warmup_steps else ""
    )


def _source(source: Source) -> str:
    out = f", {source.left_out} left out" if source.left_out else ""
    lengths = f"{source.typical} tokens, longest {source.longest}"
    return f"{_path(source.name, 30)}: {source.prompts}, median {lengths}{out}"


def _servers(config: Config) -> str:
    servers = config.rollout.servers
    if servers.mode is ServerMode.external:
        more = len(servers.urls) - 2
        return " ".join(servers.urls[:2]) + (f" and {more} more" if more > 0 else "")
    tensor = f" of TP {servers.tensor}" if servers.tensor > 1 else ""
    return f"{servers.count}{tensor}, started and stopped by the run"


def _evaluation(config: Config, inputs: Inputs) -> str:
    evaluation, held_out = config.evaluation, inputs.held_out
    if held_out is None or not evaluation.every:
        return "none" if evaluation.every else "none (evaluation.every=0)"
    used = min(evaluation.prompts, held_out.prompts)
    samples = f" x {evaluation.samples}" if evaluation.samples > 1 else ""
    where = f"{used} of {held_out.prompts} in {_path(held_out.name, 25)}"
    return f"every {_plural(evaluation.every, 'step')}: {where}{samples}, {_drawn(config)}"


def _drawn(config: Config) -> str:
    """How answers to held-out prompts are drawn."""
    heat = config.evaluation.temperature
    return f"temperature {heat:g}" if heat else "greedy"


def _reward(config: Config) -> str:
    processes = _plural(config.reward.workers, "process", "processes")
    return REWARDS.get(config.reward.kind, f"{config.reward.function} in {processes}")


def _spec(config: Config) -> str:
    """``auto`` is known without asking for a GPU where Transformer Engine is not installed."""
    spec = config.parallel.spec
    if spec is Spec.auto and not engine.installed():
        spec = Spec.torch
    return {Spec.torch: "PyTorch", Spec.te: "Transformer Engine"}.get(spec, "auto")


def _fp8(parallel: ParallelConfig) -> str:
    if parallel.fp8 is Fp8.off:
        return ""
    kept = ", weights too" if parallel.fp8_params else ""
    return f", products in FP8 ({parallel.fp8.name} {parallel.fp8_format.name}{kept})"


def _held(config: Config) -> str:
    """What servers hold matrices in, and whether these are the trainer's."""
    servers = config.rollout.servers
    if servers.fp8 is Fp8Serving.off:
        return ""
    if servers.fp8 is Fp8Serving.flash_rl:
        return ", in FP8 (flash_rl)"
    return f", in FP8 (block, scales {servers.fp8_scales.name})"


def _count(number: int) -> str:
    """A number for people: 3 significant digits."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _plural(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
