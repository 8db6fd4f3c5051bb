"""Make the tiny model of the arithmetic example: adds two-digit numbers, but forgets carries.

    python tools/make_tiny_model.py --out runs/tiny

GRPO only learns from groups of unequal answers, so its model has to be right sometimes. Random
weights never are. This model is therefore first taught by supervised learning, but by a *careless
teacher*, who adds every column correctly and then forgets each carry with probability
``1 - CARRY_RATE``. The pupil learns the skill and the mistake: about 0.4 of its sampled answers
are right, and about a quarter of its most likely ones. What is left for GRPO is to stop forgetting
carries, with nothing but right or wrong to go by. It is an honest task (no test problem is ever
shown) but an easy one: it proves that the training loop learns, not that it learns from scratch.

The same seed gives the same weights on the same machine and number of threads.
"""

import argparse
import logging
import os
import random
import shutil
import sys
import time
import warnings
from pathlib import Path

from peergrad.config import require
from peergrad.prompts.arithmetic import careless_answer, problems
from peergrad.storage import partial_of, put_in_place, writing

if __name__ == "__main__":
    print("loading libraries ...", flush=True)
    warnings.simplefilter("ignore")  # the libraries' warnings are no news
    logging.basicConfig(handlers=[logging.NullHandler()])

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

# 61 characters and 3 special tokens are 64: no id the model can sample is without a text.
CHARACTERS = "0123456789+-*/= .,?!:()\nabcdefghijklmnopqrstuvwxyz;'\"<>%^_#$&"
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"  # the question as it is
PAD, EOS = 0, 1
PROMPT_LENGTH, ANSWER_LENGTH = 6, 4  # "17+25=" and "123<eos>" in characters

CARRY_RATE = 0.3
STEPS, BATCH, LEARNING_RATE, WARMUP = 500, 128, 3e-3, 40
PASS_RATE_RANGE = (0.2, 0.5)  # outside of it, the warm-up did not do what it says above


def main() -> int:
    args = parse_arguments()
    try:
        check_out(args.out, force=args.force)
        torch.set_num_threads(1)  # so small that a second thread only waits for the first
        tokenizer = make_tokenizer()
        model, sampled, greedy = train(tokenizer, args.seed)
        low, high = PASS_RATE_RANGE
        if not low <= sampled <= high:
            raise RuntimeError(
                f"--seed = {args.seed}: the model's pass rate {sampled:.3f} is not in "
                f"[{low}, {high}], nothing was written; try another seed"
            )
        write(args.out, model, tokenizer)
    except (ValueError, RuntimeError) as error:
        if "\n" in str(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"wrote {args.out} (greedy pass rate {greedy:.3f})")
    print(f"pass rate {sampled:.3f}")
    return 0


def check_out(out: Path, *, force: bool) -> None:
    """Before the minutes of training: ValueError or StorageError if ``out`` cannot be written."""
    there = os.path.lexists(out)
    require(
        force or not there,
        "--out",
        str(out),
        "exists already",
        "pass --force to replace it, or name a new folder",
    )
    require(
        not there or (out / "config.json").is_file(),
        "--out",
        str(out),
        "is no checkpoint, and --force replaces nothing else",
        "name a new folder",
    )
    with writing("--out", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out.parent, os.W_OK | os.X_OK):
            raise PermissionError(13, "permission is denied", str(out.parent))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the demonstrations")
    parser.add_argument("--force", action="store_true", help="replace an existing folder")
    return parser.parse_args()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; ids 0 and 1 are padding and end."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()  # joins without spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(seed: int) -> Qwen3ForCausalLM:
    """Random weights; heads, KV heads and widths divide by 4, so tensor parallel 4 fits."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            num_hidden_layers=4,
            hidden_size=128,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=16,
            intermediate_size=256,
            vocab_size=64,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            pad_token_id=PAD,
            eos_token_id=EOS,
            bos_token_id=None,
        )
    )


def encode(pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Token ids (B, 10): question, answer, end, padding."""
    texts = [f"{prompt}{answer}<eos>" for prompt, answer in pairs]
    longest = PROMPT_LENGTH + ANSWER_LENGTH
    encoded = tokenizer(texts, padding="max_length", max_length=longest, return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    return ids


def answer_logits(model: Qwen3ForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, 4, V), labels (B, 4) and the mask (B, 4) of the answer's tokens with its end."""
    # Padding is on the right, where causal attention cannot see it: no attention mask.
    logits = model(ids[:, :-1], use_cache=False, logits_to_keep=ANSWER_LENGTH).logits
    labels = ids[:, PROMPT_LENGTH:]
    return logits, labels, labels != PAD


def answer_logprobs(model: Qwen3ForCausalLM, ids: Tensor) -> Tensor:
    """log p(answer with its end | question) of each row (B,)."""
    logits, labels, mask = answer_logits(model, ids)
    logprobs = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (logprobs * mask).sum(-1)


@torch.no_grad()
def pass_rates(model: Qwen3ForCausalLM, test_ids: Tensor) -> tuple[float, float]:
    """Exact expected pass rate at temperature 1, and the greedy one, of the test problems.

    Nothing is sampled: the chance to sample an answer is its teacher-forced probability.
    """
    logits, labels, mask = answer_logits(model, test_ids)
    greedy = ((logits.argmax(-1) == labels) | ~mask).all(-1).float().mean()
    return answer_logprobs(model, test_ids).exp().mean().item(), greedy.item()


def train(tokenizer: PreTrainedTokenizerFast, seed: int) -> tuple[Qwen3ForCausalLM, float, float]:
    """Teach a fresh model the careless answers of the train split; also its two pass rates."""
    model, rng = make_model(seed), random.Random(seed)
    prompts = [prompt for prompt, _ in problems("train", seed)]
    test_ids = encode(problems("test", seed), tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    start = time.monotonic()
    for step in range(1, STEPS + 1):
        batch = [
            (prompt, careless_answer(prompt, carry_rate=CARRY_RATE, rng=rng))
            for prompt in rng.sample(prompts, BATCH)
        ]
        ids = encode(batch, tokenizer)
        loss = -answer_logprobs(model, ids).mean()
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * schedule(step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            sampled, greedy = pass_rates(model, test_ids)
            print(
                f"step {step}/{STEPS} loss {loss.item():.3f} pass rate {sampled:.3f} "
                f"greedy {greedy:.3f} ({time.monotonic() - start:.0f} s)",
                flush=True,
            )
    return model, sampled, greedy


def schedule(step: int) -> float:
    """Linear rise over ``WARMUP`` steps, then a linear fall to (almost) 0."""
    return min(step / WARMUP, (STEPS + 1 - step) / (STEPS - WARMUP))


def write(out: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write under a hidden name next to ``out``, then rename: never half a model."""
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=EOS, pad_token_id=PAD)
    partial = partial_of(out)
    try:
        with writing("--out", out):
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            put_in_place(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


if __name__ == "__main__":
    transformers_logging.disable_progress_bar()
    sys.exit(main())
