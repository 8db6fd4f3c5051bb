"""Matrices in FP8, in blocks, as config.json says it; which models have such blocks, and of which
the trainer's are the engine's. No torch here."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from peergrad.config import Fp8Scales, require
from peergrad.config.fp8 import FP8_BLOCK
from peergrad.parallel.hf.companions import CONFIG, Companions, with_dtype
from peergrad.parallel.hf.config import Shape
from peergrad.parallel.hf.families import FAMILIES

REMEDY = "serve it in bfloat16"
WITHOUT_SCALES = ("llama", "mistral")
"""SGLang looks for their scales under the name that those of whole tensors have, finds no place for
them, and serves the codes without."""


def quantization_config(shape: Shape, scales: Fp8Scales) -> dict[str, Any]:
    """What SGLang, and transformers, look for in config.json. Told that scales are powers of two,
    SGLang has such ones for activations, too."""
    found: dict[str, Any] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "modules_to_not_convert": ["lm_head", *_routers(shape)],
    }
    return found | ({"scale_fmt": "ue8m0"} if scales is Fp8Scales.power_of_two else {})


def in_blocks(companions: Companions, shape: Shape, scales: Fp8Scales) -> Companions:
    """The companions of the same model with its matrices in FP8, and all else in bfloat16."""
    config = json.loads(companions.files[CONFIG])
    config["quantization_config"] = quantization_config(shape, scales)
    text = with_dtype((json.dumps(config, indent=2) + "\n").encode(), "bfloat16")
    return replace(companions, files={**companions.files, CONFIG: text})


def _routers(shape: Shape) -> list[str]:
    mixture = FAMILIES[shape.family].mixture
    return [f"model.layers.{i}.{mixture.router}" for i in range(shape.layers)] if mixture else []


def check_blocks(key: str, value: object, shape: Shape, tensor: int = 1) -> None:
    """ValueError, which names ``key``, unless SGLang can hold the model in blocks on ``tensor``
    ranks: it fuses matrices one below the other, and divides them between whole blocks."""
    rule = f"SGLang 0.5.23 drops the scales of models of family {shape.family}"
    require(shape.family not in WITHOUT_SCALES, key, value, rule, REMEDY)
    sizes = {
        "columns (hidden_size)": shape.hidden,
        "rows of queries": shape.heads * shape.head_dim // tensor,
        "rows of keys": max(1, shape.kv_heads // tensor) * shape.head_dim,
        # How experts are divided is said elsewhere, and SGLang looks at it.
        "rows of an MLP": shape.ffn if shape.experts else shape.ffn // tensor,
    }
    ranks = f" on each of {tensor} ranks" if tensor > 1 else ""
    for what, size in sizes.items():
        rule = f"needs multiples of {FP8_BLOCK}, and the model has {size} {what}{ranks}"
        require(size % FP8_BLOCK == 0, key, value, rule, REMEDY)


def differences(
    shape: Shape, *, tensor: int, expert_tensor: int, trainer: Fp8Scales, engine: Fp8Scales
) -> Iterator[str]:
    """Why a trainer that multiplies with weights in FP8 blocks (Transformer Engine's, of its own
    layout on ``tensor`` ranks) has other weights than an engine in FP8 blocks; nothing if they are
    the same, bit for bit.

    Both quantise the same bfloat16 numbers, each in blocks of the matrix as it holds it: Megatron
    the query, key and value rows of a group one below the other, and gate over up, of each rank;
    the engine each HF matrix by itself. A block of both is then of the same numbers only where all
    of these begin on multiples of 128. Not seen here: blocks with no value of 1e-4, for which
    SGLang's scale has a least one.
    """
    query, group = shape.heads * shape.head_dim, 2 * shape.kv_heads * shape.head_dim
    ranks = expert_tensor if shape.experts else tensor
    sizes = {
        f"heads of {shape.head_dim}": (shape.head_dim, 1),
        f"{query + group} rows of queries, keys and values on {tensor} ranks": (
            query + group,
            tensor,
        ),
        f"{query} columns of attention's output on {tensor} ranks": (query, tensor),
        f"{shape.ffn} rows of an MLP on {ranks} ranks": (shape.ffn, ranks),
    }
    for what, (size, parts) in sizes.items():
        if size % (parts * FP8_BLOCK):
            yield f"{what}: a rank's part of them is no multiple of {FP8_BLOCK}"
    if trainer is not engine:
        yield f"scales of the trainer are {trainer.name}, of the engine {engine.name}"
    elif trainer is Fp8Scales.float32:
        yield "scales in float32: Transformer Engine rounds 448 / m, the engine m / 448"
