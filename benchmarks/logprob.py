"""Log probabilities and their gradients, from logits and from hidden states, ours and others'.

    python benchmarks/logprob.py            # one GPU: the sizes of an 8B model's head
    python benchmarks/logprob.py --tiny     # seconds on a CPU: shows that the script works
    python benchmarks/logprob.py --sweep    # one GPU: how the Triton kernels are best cut

Times are medians with the 10th and 90th percentile. Before each, inputs are restored and the cache
is overwritten; the clock is the GPU's own, started behind a wait so that the host is ahead of it.
"Share" is the floor over the time: bytes that must move at the speed of a copy, or multiplications
that must be made at the speed of one large product, both measured in the same run. Memory is what a
call allocates beyond its inputs, gradients included but for the head's float32 main gradient, which
a trainer holds anyway and peergrad adds to (others return one in the head's dtype). Errors are the
largest of 64 rows against float64: of logp, and of the gradient relative to its norm.

All peers are optional; ``gpu.sh`` gathers them for a machine without a network.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import logprob_methods as methods
import torch
from logprob_methods import FromHidden, FromLogits, Missing, Outputs
from machine import describe, load_average, result_path, title
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from summary import Spread, save_result, spread, write_result
from torch import Tensor

from peergrad.kernels import triton_runs

CHECKED = 64  # rows compared with float64
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Sizes:
    """Rows, columns, hidden size; share of the rows that are ignored, or have no gradient."""

    rows: int
    vocab: int
    hidden: int = 0
    ignored: float = 0.0
    idle: float = 0.0

    def text(self) -> str:
        parts = [f"{self.rows} x {self.vocab}"] + [f"H {self.hidden}"] * bool(self.hidden)
        parts += [f"{share:.0%} {name}" for name, share in self._shares() if share]
        return ", ".join(parts)

    def _shares(self) -> list[tuple[str, float]]:
        return [("ignored", self.ignored), ("without gradient", self.idle)]


Build = Callable[[], Any]
Line = tuple[str, Sizes, str, Build]  # section, sizes, method, how to build it


def lines(tiny: bool) -> Iterator[Line]:
    """Everything to measure, in order. A section is one kind of work."""
    full = Sizes(64, 1000) if tiny else Sizes(8192, 151936)
    shard = Sizes(64, 125) if tiny else Sizes(8192, 18992)
    for sizes, name in ((full, "from logits"), (shard, "from logits, an eighth of the vocabulary")):
        with_it = f"{name}, with entropy"
        yield with_it, sizes, "peergrad", lambda: methods.ours(entropy=True)
        yield with_it, sizes, "peergrad reference", lambda: methods.ours(entropy=True, plain=True)
        yield with_it, sizes, "torch eager", lambda: methods.eager(entropy=True)
        yield with_it, sizes, "torch.compile", lambda: methods.compiled(entropy=True)
        yield name, sizes, "peergrad", lambda: methods.ours(entropy=False)
        yield name, sizes, "torch eager", lambda: methods.eager(entropy=False)
        yield name, sizes, "torch cross_entropy", methods.cross_entropy
        yield name, sizes, "torch.compile", lambda: methods.compiled(entropy=False)
        yield name, sizes, "megatron fused", lambda: methods.megatron(fused=True)
        yield name, sizes, "megatron", lambda: methods.megatron(fused=False)
        yield name, sizes, "liger vocab-parallel", lambda: methods.liger(vocab_parallel=True)
        yield name, sizes, "liger, scalar loss", lambda: methods.liger(vocab_parallel=False)
    yield from _from_hidden(tiny)


def _from_hidden(tiny: bool) -> Iterator[Line]:
    rows, vocab, hidden = (64, 1000, 32) if tiny else (8192, 151936, 4096)
    small, large = (16, 32) if tiny else (2048, 8192)
    whole, name = Sizes(rows, vocab, hidden), "from hidden states, training"
    for chunk, dtype in itertools.product((small, large), (BF16, FP32)):
        label = f"peergrad, chunk {chunk}, logits {str(dtype)[6:]}"
        yield name, whole, label, partial(methods.fused, chunk, dtype)
    yield name, whole, "peergrad, logits twice", lambda: methods.linear(small, BF16)
    yield name, whole, "torch eager", lambda: methods.eager_head
    yield name, whole, "verl", methods.verl
    yield name, whole, "cut-cross-entropy", methods.cut_cross_entropy
    yield name, whole, "liger, scalar loss", methods.liger_head
    for share in ({"ignored": 0.5}, {"idle": 0.5}):
        sizes = Sizes(rows, vocab, hidden, **share)
        yield name, sizes, f"peergrad, chunk {large}", lambda: methods.fused(large, BF16)
    tall = Sizes(rows * 4, vocab, hidden)
    yield name, tall, f"peergrad, chunk {small}", lambda: methods.fused(small, BF16)
    name = "from hidden states, scores"
    for dtype in (BF16, FP32):
        label = f"peergrad, logits {str(dtype)[6:]}"
        yield name, whole, label, partial(methods.linear, small, dtype)
    yield name, whole, "torch eager", lambda: methods.eager_head
    yield name, whole, "verl", methods.verl


class Bench:
    """Inputs of one size, restored before every call."""

    def __init__(self, section: str, sizes: Sizes) -> None:
        self.sizes, self.training = sizes, "scores" not in section
        generator = torch.Generator(DEVICE).manual_seed(0)

        def normal(*shape: int, scale: float) -> Tensor:
            x = torch.randn(*shape, generator=generator, device=DEVICE, dtype=FP32)
            return x.mul_(scale).to(BF16)

        rows, vocab = sizes.rows, sizes.vocab
        self.targets = torch.randint(0, vocab, (rows,), generator=generator, device=DEVICE)
        self.d_logp = torch.randn(rows, generator=generator, device=DEVICE)
        # every second, or whatever the share is, in no blocks
        place = torch.arange(rows, device=DEVICE)
        for share, values, value in (
            (sizes.ignored, self.targets, -1),
            (sizes.idle, self.d_logp, 0.0),
        ):
            values[(place * share).floor() != ((place + 1) * share).floor()] = value
        if sizes.hidden:
            self.hidden = normal(rows, sizes.hidden, scale=1.0).requires_grad_()
            self.weight = normal(vocab, sizes.hidden, scale=2.0 / sizes.hidden**0.5)
            self.weight.requires_grad_()
        else:
            self.source = normal(rows, vocab, scale=2.0)
            self.logits = torch.empty_like(self.source)

    def restore(self, ours: bool) -> None:
        """Fresh logits, or no gradients and (for ours) the float32 one that Megatron keeps."""
        if not self.sizes.hidden:
            self.logits = self.logits.detach().copy_(self.source).requires_grad_()
            return
        self.hidden.grad = self.weight.grad = None
        if ours and self.training and not hasattr(self.weight, "main_grad"):
            self.weight.main_grad = torch.zeros_like(self.weight, dtype=FP32)  # type: ignore[attr-defined]
        elif not ours and hasattr(self.weight, "main_grad"):
            del self.weight.main_grad

    def call(self, method: Any) -> Outputs:
        if not self.sizes.hidden:
            from_logits: FromLogits = method
            return from_logits(self.logits, self.targets, self.d_logp)
        from_hidden: FromHidden = method
        with torch.set_grad_enabled(self.training):
            return from_hidden(self.hidden, self.weight, self.targets, self.d_logp)

    def errors(self, outputs: Outputs, per_token: bool) -> dict[str, float]:
        """Of the first rows, after a backward pass if this is training."""
        some = slice(0, min(CHECKED, self.sizes.rows))
        weight = self.weight.detach().double() if self.sizes.hidden else None
        x = (
            self.source[some].double()
            if weight is None
            else self.hidden[some].double() @ weight.t()
        )
        log_p = x.detach().log_softmax(-1)
        y, scored = self.targets[some], self.targets[some] >= 0
        exact = log_p.gather(1, y.clamp(min=0)[:, None])[:, 0]
        found = {}
        if outputs.logp is not None:
            difference = outputs.logp[some].detach().double() - exact
            found["logp"] = float(difference[scored].abs().max())
        if not (self.training and per_token and len(outputs.values) == 1):
            return found
        gradient = -log_p.exp()
        gradient[torch.arange(len(y)), y.clamp(min=0)] += 1
        gradient *= (self.d_logp[some] * scored)[:, None]
        wanted = gradient if weight is None else gradient @ weight
        got = self.logits.grad if weight is None else self.hidden.grad
        assert got is not None
        found["gradient"] = float((got[some].double() - wanted).norm() / wanted.norm())
        return found


class Clock:
    """Seconds between marks, on the device."""

    def __init__(self) -> None:
        self.cache = torch.empty(2**28 if GPU else 2**16, dtype=torch.int8, device=DEVICE)

    def time(self, *parts: Callable[[], Any]) -> list[float]:
        """Seconds from the start to the end of each part."""
        self.cache.zero_()
        if not GPU:
            begin, ends = perf_counter(), []
            for part in parts:
                part()
                ends.append(perf_counter() - begin)
            return ends
        torch.cuda._sleep(3_000_000)  # type: ignore[no-untyped-call]  # about 2 ms
        event = partial(torch.cuda.Event, enable_timing=True)
        marks = [event() for _ in range(len(parts) + 1)]
        marks[0].record()
        for part, mark in zip(parts, marks[1:], strict=True):
            part()
            mark.record()
        torch.cuda.synchronize()
        return [marks[0].elapsed_time(mark) / 1e3 for mark in marks[1:]]


def measure(bench: Bench, name: str, method: Any, *, warmup: int, repeats: int) -> dict[str, Any]:
    """Spreads of seconds of the forward pass and of both, memory and errors."""
    clock, times, ours = Clock(), [], name.startswith("peergrad")
    for _ in range(warmup + repeats):
        bench.restore(ours)
        kept: list[Outputs] = []
        parts: list[Callable[[], Any]] = [partial(_forward, bench, method, kept)]
        if bench.training:
            parts.append(partial(_backward, kept))
        if GPU:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        times.append(clock.time(*parts))
    found: dict[str, Any] = {
        "seconds": {
            kind: spread([t[i] for t in times[warmup:]])
            for i, kind in enumerate(("forward", "both")[: len(parts)])
        }
    }
    if GPU:
        found["memory_gib"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)
    return found | {"errors": bench.errors(kept[0], "scalar" not in name)}


def _forward(bench: Bench, method: Any, kept: list[Outputs]) -> None:
    kept.append(bench.call(method))


def _backward(kept: list[Outputs]) -> None:
    kept[0].backward()


def floors(tiny: bool) -> dict[str, float]:
    """Bytes/s of a copy and FLOP/s of a product, bfloat16, as everything else is measured."""
    clock, size = Clock(), 256 if tiny else 8192
    source = torch.ones(2**18 if tiny else 2**30, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    left, right = torch.randn(2, size, size, device=DEVICE).to(BF16)
    copy = spread([clock.time(lambda: target.copy_(source))[0] for _ in range(12)][2:])
    product = spread([clock.time(lambda: left @ right)[0] for _ in range(12)][2:])
    return {
        "bytes_per_second": 2 * source.numel() / copy.median,
        "flops_per_second": 2 * size**3 / product.median,
    }


def floor_seconds(section: str, sizes: Sizes, floors: dict[str, float]) -> dict[str, float]:
    """What the work must take at least. From logits: one read forward, one read and one write
    backward. From hidden states: one product to score, three to train, of the rows concerned."""
    if not sizes.hidden:
        once = sizes.rows * sizes.vocab * 2 / floors["bytes_per_second"]
        return {"forward": once, "both": 3 * once}
    rows = sizes.rows * (1 - sizes.ignored)
    once = 2 * rows * sizes.vocab * sizes.hidden / floors["flops_per_second"]
    return {"forward": once} if "scores" in section else {"both": (3 - 2 * sizes.idle) * once}


def run(tiny: bool, warmup: int, repeats: int) -> Iterator[dict[str, Any]]:
    """One record per line, errors among them; the floors first."""
    speed = floors(tiny)
    yield {"floors": speed}
    for (section, sizes), group in itertools.groupby(lines(tiny), key=lambda line: line[:2]):
        bench = Bench(section, sizes)
        for *_, name, build in group:
            record = {"section": section, "sizes": asdict(sizes), "text": sizes.text()}
            record["method"] = name
            record |= _measured(bench, name, build, warmup=warmup, repeats=repeats)
            if "seconds" in record:
                record["floor"] = floor_seconds(section, sizes, speed)
            yield record
            if GPU:
                torch.cuda.empty_cache()
        del bench


def _measured(bench: Bench, name: str, build: Build, **options: int) -> dict[str, Any]:
    try:
        return measure(bench, name, build(), **options)
    except Missing as reason:
        return {"missing": str(reason)}
    except Exception as error:  # a peer's, or too little memory: the rest goes on
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def sweep(tiny: bool, short: bool, repeats: int) -> Iterator[dict[str, Any]]:
    """The Triton kernels of the first section under other cuts, a few of them if ``short``."""
    from peergrad.kernels import triton_stages as kernels

    sizes = Sizes(1, 300) if tiny else Sizes(8192, 151936)
    bench = Bench("from logits", sizes)
    cuts = ((256, 512), (4, 8), (2, 4)) if short else ((128, 256, 512), (2, 4, 8), (1, 2, 4, 8))
    for vectors, warps, tiles in itertools.product(*cuts):
        if vectors < 32 * warps:
            continue
        kernels.VECTORS, kernels.WARPS, kernels.TILES = vectors, warps, tiles
        build = partial(methods.ours, entropy=True)
        found = _measured(bench, "peergrad", build, warmup=2, repeats=repeats)
        yield {"section": "sweep", "text": sizes.text(), **found} | {
            "method": f"{vectors} vectors, {warps} warps, {tiles} tiles"
        }


def show(records: list[dict[str, Any]], machine: str) -> None:
    console = Console(width=140)
    console.print(f"\nlogprobs on {machine}")
    for section, group in itertools.groupby(records, key=lambda r: r["section"]):
        table = Table("method", "sizes", box=SIMPLE, title=section, title_justify="left")
        for column in ("forward ms", "both ms", "share", "GiB", "logp error", "gradient error"):
            table.add_column(column, justify="right")
        for record in group:
            reason = record.get("missing") or record.get("failed")
            if reason:
                table.add_row(record["method"], record["text"], f"not measured: {reason}")
                continue
            seconds: dict[str, Spread] = record["seconds"]
            milli = [
                Spread(1e3 * s.median, 1e3 * s.p10, 1e3 * s.p90, s.count).text()
                for s in seconds.values()
            ]
            last = list(seconds)[-1]
            share = record.get("floor", {}).get(last, float("nan")) / seconds[last].median
            errors = [record["errors"].get(kind) for kind in ("logp", "gradient")]
            table.add_row(
                record["method"],
                record["text"],
                *[*milli, ""][:2],
                f"{share:.0%}" if share == share else "",
                str(record.get("memory_gib", "")),
                *("" if e is None else f"{e:.1e}" for e in errors),
            )
        console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes: try the script on a CPU")
    said = "try all cuts of the Triton kernels, or eight"
    parser.add_argument("--sweep", nargs="?", const="all", choices=("all", "short"), help=said)
    parser.add_argument("--warmup", type=int, default=3, help="calls left out")
    parser.add_argument("--repeats", type=int, default=15, help="calls measured")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if not (GPU or options.tiny):
        raise ValueError("there is no GPU; on a CPU only --tiny ends in reasonable time")
    if options.sweep and not triton_runs(DEVICE):
        raise ValueError("--sweep is of Triton kernels; without a GPU set TRITON_INTERPRET=1")
    gpu = torch.cuda.get_device_name() if GPU else None
    memory = torch.cuda.get_device_properties(0).total_memory if GPU else None
    result = describe(gpu, memory) | {"load_average_before": load_average()}
    stream = (
        sweep(options.tiny, options.sweep == "short", options.repeats)
        if options.sweep
        else run(options.tiny, options.warmup, options.repeats)
    )
    out = options.out or result_path(gpu, "logprob-sweep" if options.sweep else "logprob")
    records = []
    for record in stream:
        records.append(record)
        print(
            f"{len(records)}: {record.get('section', 'floors')}, {record.get('method')}", flush=True
        )
        plain = {"warmup": options.warmup, "records": [_plain(r) for r in records]}
        save_result(out, result | plain)
    show([r for r in records if "section" in r], title(result))
    write_result(out, result | plain)
    return 0


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    seconds = {k: asdict(v) for k, v in record.get("seconds", {}).items()}
    return record | ({"seconds": seconds} if seconds else {})


if __name__ == "__main__":
    sys.exit(main())
