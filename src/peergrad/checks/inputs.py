"""What the run will read, read once before anything is started: weights, tokenizer, prompts, the
reward function, Megatron's options."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from peergrad.checks.account import check_account
from peergrad.checks.configuration import check_steps
from peergrad.checks.place import resumed_step, run_folder
from peergrad.checks.replay import check_recorded
from peergrad.config import (
    Config,
    Fp8,
    Fp8Serving,
    Recompute,
    RewardKind,
    ServerMode,
    Spec,
    require,
)
from peergrad.data import Prompt
from peergrad.parallel.hf.companions import Companions
from peergrad.parallel.hf.config import Shape, read_shape
from peergrad.parallel.hf.fit import check_weights
from peergrad.prompts import (
    Loaded,
    TokenizerFacts,
    load_tokenizer,
    paths,
    read_prompts,
    source_name,
    tokenizer_facts,
)
from peergrad.rewards import check_answers, check_function

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1024
"""Answers that are tokenised at a time."""


@dataclass(frozen=True)
class Source:
    """The prompts of one source, as far as a person wants to know.

    Example:
        ``Source(name="train.jsonl", prompts=7461, left_out=12, typical=84, longest=231)``
    """

    name: str
    prompts: int
    left_out: int  # longer than data.max_prompt_tokens
    typical: int  # tokens: the median
    longest: int  # tokens
    repeated: int = 0  # prompts whose tokens an earlier one has
    contradicting: int = 0  # those of them with another answer
    notes: tuple[str, ...] = ()  # what is perhaps not meant


@dataclass(frozen=True)
class Inputs:
    """What was found. A replay needs neither tokenizer nor prompts.

    Example:
        ``Inputs(shape=Shape(...), tokenizer=TokenizerFacts(...), train=Source(...),
        held_out=None)``
    """

    shape: Shape
    tokenizer: TokenizerFacts | None
    train: Source | None
    held_out: Source | None
    shared: int = 0  # held-out prompts that are trained on, too
    steps: int | None = None  # of the run, if run.epochs asks for as many as it takes


def check_inputs(config: Config, heard: Callable[[str], None] = lambda text: None) -> Inputs:
    """Read what a run of ``config`` reads on rank 0 and starts with; ``check`` has passed.
    ``heard`` is told how far the prompts are read.

    Raises ValueError with one line for the first thing that the run would fail on. Takes seconds:
    imports transformers; torch and Megatron only if something was asked of them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries as they are imported: no news for a check
        return _check_inputs(config, read_shape(config.model.path), heard)


def _check_inputs(config: Config, shape: Shape, heard: Callable[[str], None]) -> Inputs:
    check_account(config)
    _check_models(config, shape)
    if config.rollout.replay is not None:
        _check_resume(config, shape)
        check_recorded(config, shape)
        found = Inputs(shape, None, None, None)
    else:
        tokenizer = load_tokenizer(config.model.path)
        chat = config.data.chat
        facts = tokenizer_facts(tokenizer, config.model.path, vocab=shape.vocab, chat=chat)
        read = partial(read_source, config, tokenizer, vocab=shape.vocab, heard=heard)
        train, held_out, shared = _read_sources(config, tokenizer, read)
        check_function(config.reward)
        counted = _counted(config, train.prompts)
        _check_resume(counted, shape)
        steps = None if config.run.epochs is None else counted.run.steps
        found = Inputs(shape, facts, train, held_out, shared, steps)
    _check_megatron(config, shape)
    return found


def _counted(config: Config, prompts: int) -> Config:
    """With ``run.epochs`` over so many prompts as ``run.steps``."""
    epochs = config.run.epochs
    if epochs is None:
        return config
    steps = max(1, math.ceil(round(epochs * prompts / config.rollout.prompts_per_step, 6)))
    counted = replace(config, run=replace(config.run, steps=steps, epochs=None))
    check_steps(counted)
    return counted


def _check_models(config: Config, shape: Shape) -> None:
    model = config.model
    _keep_apart(config)
    Companions.read(Path(model.path))
    if model.weights is None or servers_load(config):
        check_weights(model.path, "model.path", shape)
    if model.reference is not None:
        check_weights(
            model.reference, "model.reference", read_shape(model.reference, "model.reference")
        )
    if model.weights is not None:
        _check_checkpoint(Path(model.weights), shape)


def _keep_apart(config: Config) -> None:
    """No model is read from where the run writes its own at the end."""
    exported = run_folder(config) / "hf"
    for key, path in (("path", config.model.path), ("reference", config.model.reference)):
        require(
            path is None or Path(path).resolve() != exported.resolve(),
            f"model.{key}",
            path,
            "is the folder that this run replaces by the trained model",
            "choose another run.name, or move that folder",
        )


def servers_load(config: Config) -> bool:
    """Whether managed servers read the weights of model.path."""
    servers = config.rollout.servers
    managed = config.rollout.replay is None and servers.mode is ServerMode.managed
    formats = [servers.args.get(key) for key in ("load-format", "load_format", "--load-format")]
    return managed and "dummy" not in formats and servers.fp8 is not Fp8Serving.block


def _check_checkpoint(path: Path, shape: Shape) -> None:
    from peergrad.parallel.damage import damage, read_meta
    from peergrad.parallel.resume import require_same_model

    problem = damage(path)
    require(
        problem is None,
        "model.weights",
        str(path),
        f"is no whole checkpoint ({problem})",
        "name a step folder written by a run or by tools/hf_to_megatron.py",
    )
    require_same_model("model.weights", path, read_meta(path), shape)


def _check_resume(config: Config, shape: Shape) -> None:
    """The checkpoint that the run goes on from, if there is one."""
    step = resumed_step(config)
    if step is None:
        return
    from peergrad.parallel.damage import damage, read_meta
    from peergrad.parallel.resume import require_resumable

    folder = run_folder(config) / "checkpoints"
    path = folder / f"step_{step:06d}"
    problem = damage(path)
    if problem is not None:
        others = [p for p in folder.glob("step_*") if p != path and damage(p) is None]
        remedy = "set checkpoint.fallback=true to use an older one, or choose a new run.name"
        require(
            config.checkpoint.fallback and bool(others),
            "run.resume",
            True,
            f"checkpoint {path} is damaged ({problem})",
            remedy if others else "choose a new run.name: there is no other whole one",
        )
        return
    require_resumable(path, read_meta(path), shape, config)


def _read_sources(
    config: Config, tokenizer: "PreTrainedTokenizerBase", read: Callable[[str], Loaded]
) -> tuple[Source, Source | None, int]:
    """Training and held-out prompts, as the collector reads them, and how many are both."""
    data = config.data
    train = read("data.source")
    check_answer_lengths(config, train.prompts, tokenizer, "data.source")
    if data.held_out is None:
        return describe(data.source, train), None, 0
    test = read("data.held_out")
    return describe(data.source, train), describe(data.held_out, test), test.shared(train)


def read_source(
    config: Config,
    tokenizer: "PreTrainedTokenizerBase",
    option: str,
    *,
    vocab: int,
    heard: Callable[[str], None],
) -> Loaded:
    """The prompts that ``option`` names, with answers that can be matched."""
    data, train = config.data, option == "data.source"
    source = data.source if train else data.held_out
    loaded = read_prompts(
        data,
        source,
        split="train" if train else "test",
        tokenizer=tokenizer,
        seed=config.run.seed if train else 0,
        vocab=vocab,
        heard=heard,
    )
    files = paths(source)
    for number, file in enumerate(files):
        name = file if files[1:] else option
        check_answers(config.reward.kind, loaded.prompts.part(number), name)
    return loaded


def check_answer_lengths(
    config: Config, prompts: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase", option: str
) -> None:
    """An exact match needs room for the answer and the end token. ``option`` names the prompts."""
    if config.reward.kind is not RewardKind.arithmetic:
        return
    lengths: set[int] = set()
    for start in range(0, len(prompts), CHUNK):
        answers = [prompt.answer for prompt in prompts[start : start + CHUNK]]
        encoded = tokenizer(answers, add_special_tokens=False, verbose=False)["input_ids"]
        lengths.update(map(len, encoded))
    least = min(lengths) + 1
    require(
        least <= config.rollout.max_new_tokens,
        "rollout.max_new_tokens",
        config.rollout.max_new_tokens,
        f"is too few for any answer of {option}: the shortest takes {least} with its end token",
        f"use at least {max(lengths) + 1}",
    )


def describe(source: str | Sequence[str], loaded: Loaded) -> Source:
    lengths = loaded.prompts.lengths()
    return Source(
        source_name(source),
        prompts=len(lengths),
        left_out=loaded.left_out,
        typical=int(np.median(lengths)),
        longest=int(lengths.max()),
        repeated=loaded.repeated,
        contradicting=loaded.contradicting,
        notes=loaded.notes,
    )


def _check_megatron(config: Config, shape: Shape) -> None:
    """Nothing of the kind is imported, which takes seconds, unless something was asked of it."""
    parallel = config.parallel
    if parallel.deterministic_mode:
        from peergrad.parallel.determinism import require_determinism

        require_determinism()
    if config.optim.use_precision_aware_optimizer:
        from peergrad.parallel.states import require_states

        require_states(config.optim)
    special = parallel.megatron or parallel.recompute is not Recompute.off
    special = special or parallel.fp8 is not Fp8.off
    if parallel.spec is not Spec.te and not special:
        return
    from peergrad.parallel.options import choose_spec

    spec = choose_spec(parallel.spec)
    if special:
        from peergrad.parallel.model import transformer_config

        transformer_config(shape, parallel, config.model.dtype, spec)
