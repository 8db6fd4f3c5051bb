"""A tiny model that pauses before it answers, so that its answers are 64 to 256 tokens long.

    python benchmarks/long_model.py --tiny models/tiny --out models/tiny-long

It solves the quickstart's task under the quickstart's reward, which ignores white space around an
answer: ``17+25=`` is answered by 60 to 251 blanks and line breaks in random order, then by the sum.
It starts from the quickstart's model and imitates its careless teacher, who now waits before he
writes. How long is the model's own choice, token by token: answers of one batch end at different
times, as those of a reasoning model do, and nobody has to forbid or force an end.

Lengths move a little as training goes on, and not in the same way in two trainers: compare seconds
per thousand answer tokens, too.
"""

import argparse
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from peergrad.prompts.arithmetic import careless_answer, problems
from peergrad.storage import partial_of, put_in_place

PAD, EOS = 0, 1
PAUSES = " \n"
SHORTEST, LONGEST = 60, 251  # pauses; with two or three digits and the end 63 to 255 tokens
CARRY_RATE = 0.3  # the careless teacher of tools/make_tiny_model.py
STEPS, BATCH, LEARNING_RATE = 300, 32, 1e-3
EASY = 0.5  # share of the steps over which pauses grow from a few to their full length


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--tiny", type=Path, default=Path("models/tiny"), help="what to start from")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    make(options.tiny, options.out, options.steps)
    return 0


def make(tiny: Path, out: Path, steps: int = STEPS) -> None:
    """Write ``out``: the model and everything else of ``tiny``'s folder. Takes minutes."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    train(model, AutoTokenizer.from_pretrained(tiny), steps)
    partial = partial_of(out)
    shutil.copytree(tiny, partial)
    model.save_pretrained(partial)
    put_in_place(partial, out, replace=False)


def train(model: Any, tokenizer: Any, steps: int) -> None:
    """Imitate the waiting teacher."""
    rng = random.Random(0)
    prompts = [prompt for prompt, _ in problems("train", 0)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    began = time.monotonic()
    for step in range(1, steps + 1):
        grown = min(1.0, step / (EASY * steps))
        pairs = [demonstration(rng.choice(prompts), grown, rng) for _ in range(BATCH)]
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * schedule(step, steps)
        loss = imitation(model, *encode(pairs, tokenizer), tokenizer)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            seconds = time.monotonic() - began
            print(f"step {step}/{steps} loss {loss.item():.3f} ({seconds:.0f} s)", flush=True)


def schedule(step: int, steps: int) -> float:
    """Linear rise over 20 steps; linear fall over the last third."""
    return min(1.0, step / 20, 3 * (steps + 1 - step) / steps)


def imitation(model: Any, ids: Tensor, mask: Tensor, tokenizer: Any) -> Tensor:
    """The mean loss of all the teacher's tokens, and that of his sums once more.

    Among 150 pauses the sums' three tokens would be forgotten. They count as chosen among what is
    no pause: else the end of the pauses would weigh more, too, and they would become shorter.
    """
    logits = model(ids[:, :-1], use_cache=False).logits
    labels = ids[:, 1:]
    pauses = torch.tensor(tokenizer(PAUSES)["input_ids"])
    sums = mask * ~torch.isin(labels, pauses)
    without = logits.index_fill(-1, pauses, -torch.inf)
    everything = masked_mean(token_losses(logits, labels), mask)
    return everything + masked_mean(token_losses(without, labels.masked_fill(sums == 0, EOS)), sums)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of each label (B, T) under logits (B, T, V)."""
    return -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


def demonstration(prompt: str, grown: float, rng: random.Random) -> tuple[str, str]:
    """A prompt, and what the teacher writes."""
    low, high = round(grown * SHORTEST), round(grown * LONGEST)
    pauses = "".join(rng.choices(PAUSES, k=rng.randint(low, high)))
    return prompt, pauses + careless_answer(prompt, carry_rate=CARRY_RATE, rng=rng)


def encode(pairs: list[tuple[str, str]], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids (B, T), padded on the right, and which of those behind the first are the answer's
    or its end (B, T - 1)."""
    rows = [tokenizer(p)["input_ids"] + tokenizer(a)["input_ids"] + [EOS] for p, a in pairs]
    starts = [len(tokenizer(prompt)["input_ids"]) for prompt, _ in pairs]
    ids = torch.full((len(rows), max(map(len, rows))), PAD)
    mask = torch.zeros(ids.shape)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, start : len(row)] = 1
    return ids, mask[:, 1:]


if __name__ == "__main__":
    sys.exit(main())
