"""The trainer's part of a step on one GPU (or the CPU), without an engine.

    python benchmarks/trainer.py            # Qwen3-0.6B's shape, bfloat16, one GPU
    python benchmarks/trainer.py --shape qwen3-8b --layers 8
    python benchmarks/trainer.py --tiny     # seconds on a CPU: shows that the script works

A model of random weights trains on made-up groups of given sizes: reference pass (the KL
term is on), update (forward, backward, optimizer), and an export of every weight under its HF name
into a buffer on the device, as a weight sync reads them. The layers are those of the ``torch``
spec, so Transformer Engine is not needed. The device is waited for before every reading of the
clock. MFU counts as ``flops.py`` says; the peak is known for a few devices, else
``--peak-tflops``. A model whose weights, gradients and moments (20 bytes a weight, the reference
included) do not fit keeps its shape and loses layers: ``--layers``.

It imports neither Hydra nor SGLang nor Transformer Engine; ``gpu.sh`` runs it on a machine that has
PyTorch alone, and gathers beforehand what it needs there.
"""

import argparse
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from flops import forward_flops, mfu, peak_tflops
from machine import describe, load_average, result_path, title
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from summary import Spread, as_json, phase_seconds, summarise, write_result
from synthetic import SHAPES, TINY, TINY_WORK, Work, make_groups, write_model

from peergrad.algo.division import divide
from peergrad.algo.grading import AlgoState, grade
from peergrad.algo.objective import Objective
from peergrad.algo.packing import by_prompt
from peergrad.algo.samples import Sample, make_samples, weigh, with_logp
from peergrad.config import (
    AlgoConfig,
    Config,
    Dtype,
    KernelsConfig,
    KlConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    Spec,
)
from peergrad.observing.metrics import Metrics

if TYPE_CHECKING:
    from peergrad.parallel.policy import Policy, Scorer


def main() -> int:
    options = parse_arguments()
    preset = TINY_WORK if options.tiny else Work()
    given = {name: getattr(options, name) for name in asdict(preset)}
    work = replace(preset, **{name: n for name, n in given.items() if n is not None})
    try:
        check_arguments(options, work)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    memory = torch.cuda.get_device_properties(0).total_memory if gpu else None
    described = {**describe(gpu, memory), "load_average_before": load_average()}
    dtype, sizes = Dtype[options.dtype], model_sizes(options)
    peak = options.peak_tflops or (peak_tflops(gpu) if gpu and dtype is Dtype.bfloat16 else None)
    with tempfile.TemporaryDirectory(prefix="peergrad-trainer-") as folder:
        write_model(Path(folder), sizes)
        result = benchmark(work, folder, dtype, peak, warmup=options.warmup, steps=options.steps)
    show(result, title(described))
    name = "trainer-tiny" if options.tiny else "trainer"
    result["summary"] = as_json(result["summary"])
    write_result(
        options.out or result_path(gpu, name),
        {"benchmark": name, **described, "shape": options.shape, "work": asdict(work), **result},
    )
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model and few tokens")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b", help="of the model")
    parser.add_argument("--layers", type=int, help="of them, fewer than the shape has")
    parser.add_argument("--steps", type=int, default=10, help="measured steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them, left out")
    for name, value in asdict(Work()).items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, help=f"default {value}; --tiny: less")
    parser.add_argument("--dtype", choices=[d.name for d in Dtype], default=Dtype.bfloat16.name)
    parser.add_argument("--peak-tflops", type=float, help="of the device, dense, at that dtype")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args()


def check_arguments(options: argparse.Namespace, work: Work) -> None:
    numbers = {**asdict(work), "steps": options.steps}
    if options.layers is not None:
        numbers["layers"], most = options.layers, SHAPES[options.shape]["num_hidden_layers"]
        if options.layers > most:
            raise ValueError(f"--layers {options.layers}: {options.shape} has {most}; cut, not add")
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if options.warmup < 0:
        raise ValueError(f"--warmup {options.warmup}: must not be negative")
    if not (torch.cuda.is_available() or options.tiny):
        raise ValueError("there is no GPU; on a CPU only --tiny ends in reasonable time")


def model_sizes(options: argparse.Namespace) -> dict[str, int]:
    """Of ``--shape``; with ``--tiny`` small ones, of which the embeddings alone are its."""
    shape = SHAPES[options.shape]
    tied = {k: v for k, v in shape.items() if k == "tie_word_embeddings"}
    sizes = TINY | tied if options.tiny else shape
    layers = options.layers or sizes["num_hidden_layers"]
    return sizes | {"num_hidden_layers": min(layers, sizes["num_hidden_layers"])}


def configure(work: Work, folder: str, dtype: Dtype, steps: int) -> Config:
    return Config(
        run=RunConfig(steps=steps),
        model=ModelConfig(path=folder, dtype=dtype),
        algo=AlgoConfig(kl=KlConfig(coef=0.01)),
        parallel=ParallelConfig(
            spec=Spec.torch,
            micro_batch_tokens=work.micro_batch_tokens,
        ),
        kernels=KernelsConfig(chunk_mb=work.chunk_mb),
        rollout=RolloutConfig(
            batch_size=work.groups * work.group_size,
            group_size=work.group_size,
            max_new_tokens=work.answer,
        ),
    )


def benchmark(
    work: Work, folder: str, dtype: Dtype, peak: float | None, *, warmup: int, steps: int
) -> dict[str, Any]:
    """Build the models, run the steps, return everything the result file says of them."""
    # Imported here: --help should not have to wait for Megatron.
    from peergrad.parallel.mesh import close_mesh, init_mesh
    from peergrad.parallel.policy import Policy, Scorer

    config = configure(work, folder, dtype, warmup + steps)
    mesh = init_mesh(config.parallel, seed=0)
    try:
        policy = Policy(config, mesh)
        made = make_groups(work, policy.shape.vocab)
        state, length = AlgoState(config.algo.kl.coef), work.answer
        graded = grade(made, make_samples(made), config.algo, state, max_tokens=length)[0]
        samples = weigh(graded, config.algo, max_tokens=length)
        trainer = Trainer(config, policy, Scorer(config, mesh, path=folder), samples)
        rows = trainer.run(warmup, steps)
        return {"dtype": dtype.name, "warmup": warmup, **trainer.report(rows, peak)}
    finally:
        close_mesh()


class Trainer:
    """The trainer's stages of the loop, timed by the loop's own ``Metrics``."""

    def __init__(
        self, config: Config, policy: "Policy", reference: "Scorer", samples: Sequence[Sample]
    ) -> None:
        self.policy, self.reference, self.samples = policy, reference, samples
        self.objective = Objective(config.algo)
        largest = max(tensor.numel() for _, tensor in policy.weights())
        dtype = next(policy.model.parameters()).dtype
        self.buffer = torch.empty(largest, dtype=dtype, device=policy.mesh.device)

    def run(self, warmup: int, steps: int) -> list[dict[str, float]]:
        """Seconds per phase of every measured step; peak memory is theirs, too."""
        sink = Rows()
        metrics = Metrics([sink])
        for step in range(1, warmup + steps + 1):
            if step == warmup + 1 and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            with metrics.step(step):
                self.step(metrics)
            print(f"step {step}/{warmup + steps}  {sink.rows[-1]['step']:.3f} s", flush=True)
        return sink.rows[warmup:]

    def step(self, metrics: Metrics) -> None:
        with timed(metrics, "reference"):
            found = self.reference.score(self.samples)
        samples = with_logp(self.samples, "logp_ref", found.logp)
        with timed(metrics, "update"):
            update = self.policy.update(samples, self.objective)
        if not update.finite or update.refusal is not None:
            raise RuntimeError(f"the update was not made: {update.metrics}")
        with timed(metrics, "export"):
            for _, tensor in self.policy.weights():
                self.buffer[: tensor.numel()].copy_(tensor.reshape(-1))

    def report(self, rows: Sequence[dict[str, float]], peak: float | None) -> dict[str, Any]:
        shape, lengths = self.policy.shape, [sample.tokens.size for sample in self.samples]
        scored = sum(sample.logp_engine.size for sample in self.samples)
        budget = self.policy.config.parallel.micro_batch_tokens
        forward = forward_flops(shape, families(self.samples), scored)
        share = self.policy.model.shares_prompts
        return {
            "model": asdict(shape),
            "tokens": sum(lengths),
            "scored_tokens": scored,
            "micro_batches": len(divide(self.samples, ranks=1, budget=budget, share=share).bins[0]),
            "forward_flops": forward,
            "peak_tflops": peak,
            "peak_memory_gib": peak_memory(),
            "summary": summarise([rates(row, sum(lengths), forward, peak) for row in rows]),
            "steps": rows,
        }


def families(samples: Sequence[Sample]) -> list[list[int]]:
    """Tokens of every prompt and of the answers to it."""
    found = []
    for members in by_prompt(samples, range(len(samples))):
        prompt = samples[members[0]].prompt_length
        found.append([prompt, *(samples[i].tokens.size - prompt for i in members)])
    return found


def peak_memory() -> dict[str, float]:
    """GiB: allocated and reserved on the GPU, or the resident set of this process."""
    if torch.cuda.is_available():
        allocated = torch.cuda.max_memory_allocated()
        sizes = {"allocated": allocated, "reserved": torch.cuda.max_memory_reserved()}
    else:
        sizes = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    return {name: round(size / 2**30, 3) for name, size in sizes.items()}


class Rows:
    """A sink that keeps the seconds per phase of every step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def write(self, kind: str, step: int, row: Any) -> None:
        self.rows.append(phase_seconds(row))

    def close(self) -> None:
        pass


@contextmanager
def timed(metrics: Metrics, phase: str) -> Iterator[None]:
    """Time a phase to the end of its work on the device."""
    wait: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    with metrics.time(phase):
        yield
        wait()


def rates(row: dict[str, float], tokens: int, forward: int, peak: float | None) -> dict[str, float]:
    """Seconds of a step with what follows from them; MFU only where the peak is known."""
    both = row["reference"] + row["update"]
    found = {
        **row,
        "tokens_per_second": tokens / row["step"],
        "model_tflops_per_second": 4 * forward / both / 1e12,
    }
    if peak is not None:
        found["mfu_reference"] = mfu(forward, row["reference"], peak)
        found["mfu_update"] = mfu(3 * forward, row["update"], peak)
        found["mfu"] = mfu(4 * forward, both, peak)
    return found


def show(result: dict[str, Any], machine: str) -> None:
    spreads: dict[str, Spread] = result["summary"]
    count = len(result["steps"])
    print(f"\ntrainer's part of a step on {machine}")
    print(
        f"{result['model']['layers']} layers, hidden {result['model']['hidden']}, "
        f"{result['dtype']}; {result['tokens']} tokens in {result['micro_batches']} micro-batches"
    )
    print(f"seconds: median (p10-p90) of {count} steps, the first {result['warmup']} left out")
    table = Table("phase", box=SIMPLE)
    table.add_column("", justify="right")
    for key, value in spreads.items():
        form = ".0f" if key == "tokens_per_second" else ".4f"
        table.add_row(key.replace("_per_", " per ").replace("_", " "), value.text(form))
    for name, size in result["peak_memory_gib"].items():
        table.add_row(f"peak memory {name}", f"{size:.2f} GiB")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
