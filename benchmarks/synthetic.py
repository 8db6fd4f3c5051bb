"""A model of random weights and groups of random tokens, of given sizes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3Config

from peergrad.data import Group, Prompt, Rollout

QWEN3_0P6B = {
    "num_hidden_layers": 28,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
QWEN3_1P7B = QWEN3_0P6B | {"hidden_size": 2048, "intermediate_size": 6144}
QWEN3_8B = QWEN3_0P6B | {
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "intermediate_size": 12288,
    "tie_word_embeddings": False,
}
SHAPES = {"qwen3-0.6b": QWEN3_0P6B, "qwen3-1.7b": QWEN3_1P7B, "qwen3-8b": QWEN3_8B}
TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
}


@dataclass(frozen=True)
class Work:
    """What one step trains on, and in what portions."""

    groups: int = 64
    group_size: int = 8
    prompt: int = 256  # tokens of every prompt
    answer: int = 1024  # tokens of the longest answer; lengths are uniform from an eighth of it
    micro_batch_tokens: int = 8192
    chunk_mb: int = 4096  # for the rows whose logits exist at a time


TINY_WORK = Work(4, 4, prompt=16, answer=32, micro_batch_tokens=256, chunk_mb=1)


def write_model(folder: Path, sizes: dict[str, int]) -> None:
    """An HF checkpoint of Qwen3's architecture: tied embeddings unless ``sizes`` say otherwise,
    bfloat16 matrices from N(0, 0.02), norms of 1.

    Drawn on the GPU if there is one: a core takes minutes for the largest."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen3Config(**{"tie_word_embeddings": True, **sizes}, rope_parameters=rope)
    config.save_pretrained(folder)
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)
    tensors = {name: _tensor(size, generator) for name, size in _sizes(sizes).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _tensor(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    empty = torch.empty(size, dtype=torch.bfloat16, device=generator.device)
    drawn = empty.fill_(1) if len(size) == 1 else empty.normal_(0, 0.02, generator=generator)
    return drawn.cpu()


def _sizes(sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor under its HF name."""
    hidden, head, ffn = sizes["hidden_size"], sizes["head_dim"], sizes["intermediate_size"]
    query, key = (sizes[f"num_{x}_heads"] * head for x in ("attention", "key_value"))
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "self_attn.o_proj": (hidden, query),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    layers, table = range(sizes["num_hidden_layers"]), (sizes["vocab_size"], hidden)
    return {
        "model.embed_tokens.weight": table,
        **{f"model.layers.{i}.{name}.weight": size for i in layers for name, size in layer.items()},
        "model.norm.weight": (hidden,),
        **({} if sizes.get("tie_word_embeddings", True) else {"lm_head.weight": table}),
    }


def make_groups(work: Work, vocab: int) -> list[Group]:
    """Random token ids, answer lengths and rewards of 0 or 1; the same for the same sizes."""
    rng = np.random.default_rng(0)

    def rollout() -> Rollout:
        length = int(rng.integers(max(1, work.answer // 8), work.answer + 1))
        return Rollout(
            tokens=rng.integers(0, vocab, length).astype(np.int32),
            logprobs=np.full(length, -np.log(vocab), np.float32),
            versions=((0, 0, length),),
            finish="stop",
            text="",
            reward=float(rng.integers(0, 2)),
        )

    def group(index: int) -> Group:
        tokens = rng.integers(0, vocab, work.prompt).astype(np.int32)
        rollouts = tuple(rollout() for _ in range(work.group_size))
        return Group(str(index), Prompt(str(index), tokens, text="", answer=""), rollouts)

    return [group(index) for index in range(work.groups)]
