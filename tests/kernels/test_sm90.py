"""What the compiler makes of the kernels for Hopper, read from the machine code. No GPU needed.

A spilled register, a two-byte load, a barrier in the hot loop or a float64 constant each cost more
than any idea saves, and none of them shows in a result. What is compiled is what the functions that
launch would launch for real models: they are called, on tensors without memory.
"""

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from peergrad.kernels.gradient import Scores
from peergrad.kernels.projection import Projection
from peergrad.kernels.shard import Shard
from peergrad.parallel.hf.config import VOCAB_MULTIPLE
from tests.kernels.conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("kernels are either interpreted or compiled", allow_module_level=True)

triton = pytest.importorskip("triton")
from peergrad.kernels import triton_stages as kernels  # noqa: E402

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
VOCABULARIES = {
    "Llama 2, Mistral 7B": 32000,
    "Llama 2 with a padding token": 32001,
    "SmolLM2": 49152,
    "GPT-2": 50257,
    "Llama 3": 128256,
    "Llama 3 with a padding token": 128257,
    "Qwen3": 151936,
    "Gemma": 256000,
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code and what its listing says."""

    resources: dict[str, int]  # REG, STACK, SHARED, LOCAL
    lines: list[tuple[int, str]]  # address, instruction without its predicate
    ptx: str

    def count(self, prefix: str, lines: list[tuple[int, str]] | None = None) -> int:
        return sum(code.startswith(prefix) for _, code in lines or self.lines)

    def loops(self) -> list[list[tuple[int, str]]]:
        """Bodies of the loops: from the target of every backward branch to the branch."""
        found = []
        for at, code in self.lines:
            target = re.match(r"BRA.*?(0x[0-9a-f]+)", code)
            if target and int(target[1], 16) < at:
                found.append([x for x in self.lines if int(target[1], 16) <= x[0] <= at])
        return found


def _tool(name: str, *arguments: Any) -> str:
    return subprocess.run(
        [BINARIES / name, *arguments], capture_output=True, text=True, check=True
    ).stdout


def _instructions(listing: str) -> list[tuple[int, str]]:
    """Addresses and instructions; labels are replaced by the addresses they stand for."""
    found: list[tuple[int, str]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in listing.splitlines():
        named = re.match(r"(\.L_x_\d+):", line.strip())
        code = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z].*?);", line)
        if named:
            waiting.append(named[1])
        elif code:
            labels |= dict.fromkeys(waiting, int(code[1], 16))
            waiting = []
            found.append((int(code[1], 16), code[2].strip()))
    label = re.compile(r"`\((\.L_x_\d+)\)")
    return [(at, label.sub(lambda m: hex(labels.get(m[1], 1 << 62)), code)) for at, code in found]


class Hopper:
    """A driver that knows a Hopper and has none: kernels are compiled, and never run."""

    def get_current_device(self) -> int:
        return 90

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What would have been launched, compiled."""
    found: list[Any] = []
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    for kernel in (kernels.partials_kernel, kernels.merge_kernel, kernels.dlogits_kernel):

        def run(*args: Any, compile: Any = kernel.run, **options: Any) -> None:
            found.append(compile(*args, **options | {"warmup": True}))

        monkeypatch.setattr(kernel, "run", run)
    yield found


@pytest.fixture
def read(tmp_path: Path) -> Callable[[Any], Compiled]:
    def read(kernel: Any) -> Compiled:
        file = tmp_path / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", file)
        listing = _tool("nvdisasm", "-c", "-hex", file)
        resources = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
        return Compiled(resources, _instructions(listing), kernel.asm["ptx"])

    return read


@dataclass(frozen=True)
class Rank:
    """One of ``ranks`` tensor-parallel ranks with a few rows of a model's logits."""

    projection: Projection
    rows: int = 1000

    @staticmethod
    def of(vocab: int, rank: int = 0, ranks: int = 1) -> "Rank":
        padded = -(-vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        weight = torch.empty(padded // ranks, 64, dtype=BF16, device="meta")
        group: Any = SimpleNamespace(rank=lambda: rank, size=lambda: ranks)
        return Rank(Projection.of(weight, group, vocab, dtype=BF16, chunk=1000, plain=True))

    def numbers(self, count: int = 1, dtype: torch.dtype = FP32) -> list[Tensor]:
        return [torch.empty(self.rows, dtype=dtype, device="meta") for _ in range(count)]

    def partials(self, dtype: torch.dtype, *, entropy: bool = True) -> None:
        logits = self.projection.buffer(self.rows, dtype)
        targets, tau = *self.numbers(dtype=torch.int64), *self.numbers()
        kernels.partials(logits, targets, tau, self.projection.shard, entropy=entropy)

    def merge(self) -> None:
        sums = torch.empty(8, self.rows, 4, device="meta")
        kernels.merge(sums, *self.numbers(dtype=torch.int64), *self.numbers())

    def dlogits(self, dtype: torch.dtype, *, compact: bool) -> None:
        logits, out = (self.projection.buffer(self.rows, t) for t in (dtype, BF16))
        targets, source = self.numbers(2, torch.int64)
        scores = Scores(targets, *self.numbers(6))
        source_or_none = source if compact else None
        kernels.dlogits(logits, scores, self.projection.shard, out=out, source=source_or_none)


def layouts(kernel: Any) -> set[str]:
    """How threads hold the tiles that they load: it decides in which order a row is added up."""
    text = kernel.asm["ttgir"]
    named = dict(re.findall(r"(#\w+) = (#ttg\.blocked<.*>)", text))
    tiles = re.findall(r"tt\.load .*: tensor<\d+x\d+x!tt\.ptr<\w+>, (#\w+)>", text)
    assert tiles, "the listing was not understood"
    return {named[name] for name in tiles}


@pytest.mark.parametrize(("dtype", "wide"), [(BF16, 8), (FP32, 4)])
def test_one_kernel_for_every_model_and_rank(
    launched: list[Any], dtype: torch.dtype, wide: int
) -> None:
    """One way to add up, so bits are equal for every number of ranks; 16 bytes a load."""
    for vocab in VOCABULARIES.values():
        for ranks in (1, 2, 4, 8):
            for rank in {0, ranks - 1}:  # only the last one has an odd end
                Rank.of(vocab, rank, ranks).partials(dtype)
                Rank.of(vocab, rank, ranks).dlogits(dtype, compact=False)
    for same in (launched[::2], launched[1::2]):
        assert len(same) == 8 * 7 and len(set(map(id, same))) == 1
    (layout,) = layouts(launched[0])
    assert f"sizePerThread = [1, {wide}]" in layout


def assert_lean(made: Compiled) -> None:
    assert made.resources["STACK"] == made.resources["LOCAL"] == 0
    assert made.count("STL") == made.count("LDL") == 0
    assert ".f64" not in made.ptx and ".target sm_90" in made.ptx
    assert made.lines, "the listing was not understood"


def hot_loop(made: Compiled) -> list[tuple[int, str]]:
    """The loop that evaluates exponentials."""
    loops = [loop for loop in made.loops() if made.count("MUFU.EX2", loop) > 1]
    assert len(loops) == 1
    return loops[0]


@pytest.mark.parametrize(("dtype", "limit"), [(BF16, 10.5), (FP16, 10.5), (FP32, 11.5)])
def test_partials(launched: list[Any], read: Any, dtype: torch.dtype, limit: float) -> None:
    Rank.of(50257, 7, 8).partials(dtype)
    made = read(launched[0])
    assert_lean(made)
    loop = hot_loop(made)
    wide = 4 if dtype is FP32 else 8
    elements = made.count("LDG.E.128", loop) * wide
    assert elements == 2 * wide  # 256 vectors on 128 threads
    assert made.count("LDG", loop) == 2  # all of 16 bytes
    assert made.count("BAR", loop) == made.count("SHFL", loop) == 0
    assert made.count("ATOM") == made.count("RED.") == 0
    assert len(loop) / elements <= limit
    assert made.resources["REG"] <= 42  # twelve programs of 128 threads on a multiprocessor
    # the end of a row, too, is read 16 bytes at a time; the target's logit and four numbers are not
    assert made.count("LDG.E.128") == 4


def test_partials_without_entropy_are_cheaper(launched: list[Any], read: Any) -> None:
    for entropy in (True, False):
        Rank.of(151936).partials(BF16, entropy=entropy)
    with_it, without = (len(hot_loop(read(kernel))) for kernel in launched)
    assert without <= with_it - 16  # one instruction an element


def test_the_gate_sees_narrow_loads(launched: list[Any], read: Any) -> None:
    """It is no use if it cannot fail: rows of 8003 columns begin anywhere, and loads are narrow."""
    rank = Rank.of(8000)
    logits = torch.empty(rank.rows, 8003, dtype=BF16, device="meta")
    targets, tau = *rank.numbers(dtype=torch.int64), *rank.numbers()
    kernels.partials(logits, targets, tau, Shard.of(None, 8003, 8000), entropy=True)
    loads = [code for _, code in hot_loop(read(launched[0])) if code.startswith("LDG")]
    assert len(loads) > 2 and not any(code.startswith("LDG.E.128") for code in loads)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(("dtype", "loads"), [(BF16, 16), (FP32, 32)])
def test_dlogits(
    launched: list[Any], read: Any, dtype: torch.dtype, loads: int, compact: bool
) -> None:
    Rank.of(50257, 7, 8).dlogits(dtype, compact=compact)
    made = read(launched[0])
    assert_lean(made)
    # Four tiles of 2048 on 128 threads, written out twice: whole tiles and the row's end.
    assert made.count("STG.E.128") == 16 and made.count("STG") == 16
    assert made.count("LDG.E.128") == loads
    assert made.count("BAR") == made.count("SHFL") == made.count("ATOM") == made.count("RED.") == 0
    assert len(made.lines) / (2 * 4 * 16) <= 15.5  # an element
    assert made.resources["REG"] <= (48 if triton.__version__ >= "3.7" else 56)


def test_each_is_launched_on_the_device_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be the current one: a kernel would run there, on foreign addresses."""
    guarded: list[Tensor] = []
    seen: list[bool] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        guarded.append(x)
        yield
        guarded.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for kernel in (kernels.partials_kernel, kernels.merge_kernel, kernels.dlogits_kernel):
        monkeypatch.setattr(kernel, "run", lambda *args, **_: seen.append(guarded[-1] is args[0]))
    rank = Rank.of(32000)
    rank.partials(BF16)
    rank.merge()
    rank.dlogits(BF16, compact=False)
    assert seen == [True] * 3 and not guarded


def test_merge(launched: list[Any], read: Any) -> None:
    """Of one row, too, which Triton would make a case of its own."""
    Rank.of(151936).merge()
    Rank(Rank.of(151936).projection, rows=1).merge()
    assert launched[0] is launched[1]
    assert_lean(read(launched[0]))
