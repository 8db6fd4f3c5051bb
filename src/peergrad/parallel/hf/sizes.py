"""The sizes of the HF tensors of a model."""

import math

from peergrad.parallel.hf.config import Shape


def hf_size(name: str, shape: Shape) -> tuple[int, ...]:
    """The size of HF tensor ``name`` in a model of ``shape``."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (shape.vocab, shape.hidden),
        "lm_head": (shape.vocab, shape.hidden),
        "q_proj": (queries, shape.hidden),
        "k_proj": (keys, shape.hidden),
        "v_proj": (keys, shape.hidden),
        "o_proj": (shape.hidden, queries),
        "q_norm": (shape.head_dim,),
        "k_norm": (shape.head_dim,),
        "gate_proj": (shape.ffn, shape.hidden),
        "up_proj": (shape.ffn, shape.hidden),
        "down_proj": (shape.hidden, shape.ffn),
    }
    return sizes.get(name.split(".")[-2], (shape.hidden,))  # the other norms


def parameter_count(shape: Shape) -> int:
    """Parameters of a model of ``shape``; a tied embedding counts once."""
    layer = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
    layer += ["input_layernorm", "post_attention_layernorm"]
    layer += ["q_norm", "k_norm"] if shape.qk_norm else []
    ends = ["embed_tokens", "norm"] + ([] if shape.tied else ["lm_head"])
    return sum(
        times * math.prod(hf_size(f"{name}.weight", shape))
        for names, times in ((layer, shape.layers), (ends, 1))
        for name in names
    )
