"""Tiny HF checkpoints with random weights, for tests."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "0123456789+-*/= .,?!abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ\n"
LENGTH = "original_max_position_embeddings"
SCALED = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        **{"rope_type": "llama3", "factor": 6, LENGTH: 40},
        **{"low_freq_factor": 1.5, "high_freq_factor": 5.0},
    },
    "yarn": {"rope_type": "yarn", "factor": 16.0, LENGTH: 32, "beta_fast": 4.0},
}
"""Rotary embeddings that differ from the plain one, and from each other, within 40 tokens."""
VARIED: dict[str, dict[str, Any]] = {
    # Tied embeddings are the harder case of a pipeline: two stages hold a copy each.
    "qwen3": {"tied": True, "attention_bias": True},
    "qwen2": {"rope_parameters": SCALED["yarn"]},
    "llama": {"attention_bias": True, "rope_parameters": SCALED["llama3"]},
    "mistral": {"head_dim": 24, "rope_parameters": SCALED["linear"]},
}
"""Every dense family, with what config.json may ask for beside the plain model."""
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **{"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48},
        **{"norm_topk_prob": True, "attention_bias": True, "rope_parameters": SCALED["yarn"]},
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
}
"""Every family of mixtures of experts."""
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; ids 0 and 1 are padding and end."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


def unfused(tensors: dict[str, Any]) -> dict[str, Any]:
    """What transformers holds in one tensor for all experts of a layer, apart, under the names that
    it has in a checkpoint."""
    found = {}
    for name, tensor in tensors.items():
        before, _, kind = name.rpartition("mlp.experts.")
        for i, one in enumerate(tensor if before else ()):
            parts = {"down_proj": one}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), one.chunk(2), strict=True))
            found |= {f"{before}mlp.experts.{i}.{p}.weight": x for p, x in parts.items()}
        if not before:
            found[name] = tensor
    return found


def make_hf_model(
    path: Path,
    *,
    family: str = "qwen3",
    seed: int = 0,
    tied: bool = False,
    layers: int = 4,
    vocab: int = 128,
    spread: float = 0.15,
    **others: Any,
) -> Path:
    """Write a random fp32 checkpoint of ``family``, with its tokenizer; ``others``: of config.json.

    The wide initialisation (standard deviation ``spread``) keeps logits far from uniform: a weight
    that is lost or mis-mapped moves logprobs by whole nats, so no test passes by chance.
    """
    torch.manual_seed(seed)
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "initializer_range": spread,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        **({"sliding_window": None} if family == "mistral" else {}),
        **others,
    }
    if family in ("qwen2", "mixtral"):  # none is known there, or none but the quotient
        del sizes["head_dim"]
    config = AutoConfig.for_model(family, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Norms start at 1 and biases at 0: make a lost one show.
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=spread)
    # The padding row starts at 0, where the first norm's gradient is 1 / sqrt(eps).
    torch.nn.init.normal_(model.model.embed_tokens.weight.data[0], std=spread)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path
