"""Which tensors an HF checkpoint of a shape holds, and their sizes."""

import re
from math import prod

from peergrad.parallel.hf.config import Shape
from peergrad.parallel.hf.families import FAMILIES

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""A buffer that older versions of transformers wrote. Every reader, transformers itself too, makes
the frequencies from config.json, so leaving it out loses nothing."""


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """HF name -> size of every tensor of the model; a tied model has no head of its own.

    Example:
        >>> tensor_shapes(qwen3_0p6b)["model.layers.0.self_attn.k_proj.weight"]
        (1024, 1024)
    """
    h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = dict.fromkeys(["q_norm", "k_norm"], (shape.head_dim,)) if shape.qk_norm else {}
    attention = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q)}
    biased = "qkv" * shape.qkv_bias + "o" * shape.o_bias
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (h,),
        **{f"self_attn.{name}.weight": size for name, size in {**attention, **norms}.items()},
        **{f"self_attn.{x}_proj.bias": attention[f"{x}_proj"][:1] for x in biased},
        "post_attention_layernorm.weight": (h,),
        **_mlp(shape),
    }
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocab, h)}
    for i in range(shape.layers):
        found |= {f"model.layers.{i}.{name}": size for name, size in layer.items()}
    found["model.norm.weight"] = (h,)
    if not shape.tied:
        found[HEAD] = (shape.vocab, h)
    return found


def _mlp(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Of a layer."""
    up, down = (shape.ffn, shape.hidden), (shape.hidden, shape.ffn)
    sizes: tuple[tuple[int, ...], ...] = (up, up, down)
    mixture, experts = FAMILIES[shape.family].mixture, shape.experts
    if mixture is None or experts is None:
        names = ("gate_proj", "up_proj", "down_proj")
        return {f"mlp.{name}.weight": size for name, size in zip(names, sizes, strict=True)}
    found: dict[str, tuple[int, ...]]
    found = {f"{mixture.router}.weight": (experts.number, shape.hidden)}
    for i in range(experts.number):
        for name, size in zip(mixture.projections, sizes, strict=True):
            found[f"{mixture.expert.format(i)}.{name}.weight"] = size
    return found


def layer_weights(shape: Shape) -> int:
    """Weights in the matrices of one layer that a token meets: of its experts and their router."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    experts = shape.experts
    chosen, router = (experts.chosen, experts.number) if experts else (1, 0)
    return shape.hidden * (2 * query + 2 * key + 3 * shape.ffn * chosen + router)


def parameters(shape: Shape) -> int:
    """Parameters of the model, the vocabulary not padded."""
    return sum(map(prod, tensor_shapes(shape).values()))
