"""What an evaluation alone needs of a run's configuration, and what it will do."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peergrad.checks.configuration import check_engine, check_ids, check_lengths
from peergrad.checks.inputs import Source, check_answer_lengths, describe, read_source
from peergrad.config import Config, Fp8Serving, ServerMode, require
from peergrad.parallel.hf.config import Shape, read_shape
from peergrad.parallel.hf.fit import check_weights
from peergrad.prompts import check_source, load_tokenizer, tokenizer_facts
from peergrad.rewards import check_function


@dataclass(frozen=True)
class Evaluated:
    """What was found of an evaluation's model and prompts.

    Example:
        ``Evaluated(shape=Shape(...), held_out=Source(...))``
    """

    shape: Shape
    held_out: Source


def check_evaluation(config: Config, heard: Callable[[str], None]) -> Evaluated:
    """Read what an evaluation reads; ``heard`` is told how far its prompts are. Raises ValueError
    for the first thing that it would fail on. What only a trainer has (layout, objective, training
    prompts, run folder) may be missing or elsewhere."""
    path, data = config.model.path, config.data
    _check_place(config)
    _check_servers(config)
    shape = read_shape(path)
    require(
        data.held_out is not None,
        "data.held_out",
        data.held_out,
        "is what is evaluated on, and there is none",
        "name a file of prompts",
    )
    check_source(data.held_out, "data.held_out")
    check_engine(config, shape)
    check_lengths(config, shape)
    check_ids(config, shape)
    check_weights(path, "model.path", shape)
    tokenizer = load_tokenizer(path)
    tokenizer_facts(tokenizer, path, vocab=shape.vocab, chat=data.chat)
    loaded = read_source(config, tokenizer, "data.held_out", vocab=shape.vocab, heard=heard)
    check_answer_lengths(config, loaded.prompts, tokenizer, "data.held_out")
    check_function(config.reward)
    return Evaluated(shape, describe(data.held_out, loaded))


def _check_place(config: Config) -> None:
    """The model is an HF folder, which servers read, and answers come from an engine."""
    path, weights, replay = config.model.path, config.model.weights, config.rollout.replay
    rule = "is a checkpoint for training, which no server reads"
    convert = "set model.path to what python tools/megatron_to_hf.py --checkpoint {} --out makes"
    require(weights is None, "model.weights", weights, rule, convert.format(weights))
    if not (Path(path) / "config.json").is_file():
        checkpoint, run = (Path(path) / "meta.json").is_file(), Path(path) / "hf"
        require(not checkpoint, "model.path", path, rule, convert.format(path))
        is_run = (run / "config.json").is_file()
        require(not is_run, "model.path", path, "is the folder of a run", f"set model.path={run}")
    rule = "has recorded answers to training prompts, and others are to be drawn"
    require(replay is None, "rollout.replay", replay, rule, "remove it")


def _check_servers(config: Config) -> None:
    servers = config.rollout.servers
    weightless = servers.mode is ServerMode.managed and servers.fp8 is Fp8Serving.block
    rule = "has servers start without weights, which come from a trainer, and there is none"
    remedy = "start servers on what python tools/quantize_fp8.py makes, and name them (external)"
    require(not weightless, "rollout.servers.fp8", servers.fp8.name, rule, remedy)
