"""Log probabilities on a CPU: the PyTorch stages beside torch's own, and what a chunk's size does.

    python benchmarks/logprob_cpu.py    # three minutes of two cores without other work

All ways of a table are called in turn, a round of all after the other, so that whatever else the
machine does meets all of them; times are milliseconds, median and 10th to 90th percentile of the
rounds. Every call makes its outputs and gradients anew, in memory that the system may have to give
first: a trainer pays for that, too.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from machine import describe, load_average, result_path, title
from summary import Spread, spread, write_result
from torch import Tensor

from peergrad.kernels import (
    fused_linear_loss,
    linear_logprob,
    rows_that_fit,
    vocab_parallel_logprob,
)

Way = Callable[[], tuple[float, ...]]  # seconds since its start: of the forward pass, of both


@dataclass(frozen=True)
class Sizes:
    rows: int = 256
    vocab: int = 32_000
    hidden: int = 256
    taller: int = 8  # times as many rows, where they are cut into chunks
    rounds: int = 25
    warmup: int = 2


TINY = Sizes(8, 1000, 16, rounds=1, warmup=0)


def timed(forward: Callable[[], Sequence[Tensor]], *, backward: bool = True) -> tuple[float, ...]:
    """Seconds until the values are there, and until the gradients of their sum are."""
    with torch.set_grad_enabled(backward):
        begin = perf_counter()
        values = forward()
        middle = perf_counter() - begin
        if not backward:
            return (middle,)
        torch.autograd.backward([x.sum() for x in values])
        return middle, perf_counter() - begin


def from_logits(sizes: Sizes) -> dict[str, Way]:
    logits = torch.randn(sizes.rows, sizes.vocab) * 3
    targets = torch.randint(0, sizes.vocab, (sizes.rows,))

    def ours(x: Tensor, *, entropy: bool) -> Sequence[Tensor]:
        options: dict[str, Any] = {"group": None, "temperature": 1.0, "valid_vocab": sizes.vocab}
        found = vocab_parallel_logprob(x, targets, with_entropy=entropy, plain=True, **options)
        return [v for v in found if v is not None]

    def eager(x: Tensor) -> Sequence[Tensor]:
        log_p = x.log_softmax(-1)
        return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    ways: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {
        "reference": partial(ours, entropy=False),
        "F.cross_entropy": lambda x: [F.cross_entropy(x, targets, reduction="none")],
        "reference, with entropy": partial(ours, entropy=True),
        "log_softmax, gather, entropy": eager,
    }

    def way(function: Callable[[Tensor], Sequence[Tensor]]) -> tuple[float, ...]:
        x = logits.clone().requires_grad_()
        return timed(lambda: function(x))

    return {name: partial(way, function) for name, function in ways.items()}


def from_hidden(sizes: Sizes) -> dict[str, Way]:
    """The pass of the reference model: no gradients."""
    hidden, weight, targets = drawn(sizes.rows, sizes)

    def ours(*, entropy: bool) -> Sequence[Tensor]:
        found = linear_logprob(
            hidden,
            weight,
            targets,
            group=None,
            vocab_size=sizes.vocab,
            temperature=1.0,
            chunk=rows_that_fit(weight, torch.float32),
            with_entropy=entropy,
            plain=True,
        )
        return [v for v in found if v is not None]

    def torchs() -> Sequence[Tensor]:
        return [F.cross_entropy(hidden @ weight.t(), targets, reduction="none")]

    ways: dict[str, Callable[[], Sequence[Tensor]]] = {
        "scores": partial(ours, entropy=False),
        "product, F.cross_entropy": torchs,
        "scores, with entropy": partial(ours, entropy=True),
    }
    return {name: partial(timed, function, backward=False) for name, function in ways.items()}


def budgets(sizes: Sizes) -> dict[str, Way]:
    """Training from hidden states by the size of a chunk."""
    hidden, weight, targets = drawn(sizes.taller * sizes.rows, sizes)
    weight.requires_grad_().main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]

    def derivative(logp: Tensor, entropy: Tensor, rows: Tensor | slice) -> Any:
        return logp.sum(), torch.ones_like(logp), None

    def train(chunk: int) -> Sequence[Tensor]:
        options: dict[str, Any] = {"group": None, "vocab_size": sizes.vocab, "temperature": 1.0}
        x = hidden.clone().requires_grad_()
        return fused_linear_loss(x, weight, targets, derivative, chunk=chunk, **options)[:1]

    ways: dict[str, Way] = {}
    for size in (16, 32, 64, 128, 256):
        rows = rows_that_fit(weight, torch.float32, megabytes=size)
        ways[f"{size} MiB, {rows} rows"] = partial(timed, partial(train, rows))
    return ways


def drawn(rows: int, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(rows, sizes.hidden), torch.randn(sizes.vocab, sizes.hidden)
    return hidden, weight.mul_(3 / sizes.hidden**0.5), torch.randint(0, sizes.vocab, (rows,))


def in_turn(ways: Mapping[str, Way], *, warmup: int, rounds: int) -> dict[str, list[Spread]]:
    """Milliseconds of each way, of its forward pass and of both."""
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
    for turn in range(warmup + rounds):
        for name, way in ways.items():
            seconds = way()
            if turn >= warmup:
                times[name].append(seconds)
    return {
        name: [spread([1e3 * x for x in column]) for column in zip(*rows, strict=True)]
        for name, rows in times.items()
    }


TABLES: dict[str, Callable[[Sizes], dict[str, Way]]] = {
    "from logits": from_logits,
    "from hidden states, scores": from_hidden,
    "from hidden states, training": budgets,
}


def measure(sizes: Sizes, threads: Sequence[int]) -> list[dict[str, Any]]:
    """A record for every table, way and number of threads."""
    records = []
    for count in threads:
        torch.set_num_threads(count)
        for table, build in TABLES.items():
            torch.manual_seed(0)
            rounds, warmup = sizes.rounds, sizes.warmup
            if build is budgets:  # seconds each
                rounds, warmup = -(-rounds // 8), -(-warmup // 2)
            found = in_turn(build(sizes), warmup=warmup, rounds=rounds)
            for way, spreads in found.items():
                text = "  ".join(x.text(".1f") for x in spreads)
                print(f"{count} threads, {table}, {way}: {text} ms", flush=True)
                milliseconds = dict(zip(("forward", "both"), map(asdict, spreads), strict=False))
                record = {"threads": count, "table": table, "way": way}
                records.append(record | {"milliseconds": milliseconds})
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes: try the script")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of torch, in turn")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    sizes = TINY if options.tiny else Sizes()
    result = describe() | {"load_average_before": load_average(), "sizes": asdict(sizes)}
    print(title(result))
    records = measure(sizes, options.threads)
    write_result(options.out or result_path(None, "logprob-cpu"), result | {"records": records})
    return 0


if __name__ == "__main__":
    sys.exit(main())
