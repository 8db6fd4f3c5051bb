"""What the compiler makes of the kernels for Hopper, read from the machine code. No GPU needed.

A spilled register, a two-byte load, a barrier in the hot loop or a float64 constant each cost more
than any idea saves, and none of them shows in a result.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("kernels are either interpreted or compiled", allow_module_level=True)

triton = pytest.importorskip("triton")
from peergrad.kernels import tiled  # noqa: E402
from peergrad.kernels import triton as kernels  # noqa: E402

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FLOAT, IDS = "*fp32", "*i64"


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code and what its listing says."""

    resources: dict[str, int]  # REG, STACK, SHARED, LOCAL
    lines: list[tuple[int, str]]  # address, instruction without its predicate
    ptx: str
    shared: int  # bytes of dynamic shared memory

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


def build(
    folder: Path,
    kernel: Any,
    pointers: dict[str, str],
    integers: str,
    constants: dict[str, Any],
    *,
    divisible: str,
    warps: int = 4,
    stages: int = 3,
) -> Compiled:
    """Compile for sm_90. ``divisible``: integers that are multiples of 16, as in real shapes; so
    are all pointers."""
    names = kernel.arg_names
    types = pointers | {n: "i64" if "stride" in n else "i32" for n in integers.split()}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = [*pointers, *divisible.split()]
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={name: types[name] for name in names},
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=target, options=options)
    file = folder / "kernel.cubin"
    file.write_bytes(made.asm["cubin"])
    usage = _tool("cuobjdump", "-res-usage", file)
    listing = _tool("nvdisasm", "-c", "-hex", file)
    resources = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return Compiled(resources, _instructions(listing), made.asm["ptx"], made.metadata.shared)


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


def partials(folder: Path, dtype: str, **changed: Any) -> Compiled:
    wide = 4 if dtype == "fp32" else 8
    constants = {
        "BLOCKS": 8,
        "ALIGNED": True,
        "EVEN": True,
        "ENTROPY": True,
        "LANES": 256,
        "WIDE": wide,
    }
    return build(
        folder,
        kernels.partials_kernel,
        {"logits": f"*{dtype}", "targets": IDS, "temperature": FLOAT, "out": FLOAT},
        "stride rows first width valid",
        constants | changed,
        divisible="stride width valid",
    )


def dlogits(folder: Path, dtype: str, *, compact: bool) -> Compiled:
    rows = ["temperature", "peak", "log2d", "factor0", "factor1", "factor2"]
    pointers = {"logits": f"*{dtype}", "out": "*bf16", "targets": IDS} | dict.fromkeys(rows, FLOAT)
    constants = {"COMPACT": compact, "ALIGNED": True, "EVEN": True, "ENTROPY": True}
    constants |= {"LANES": 256, "TILES": 4}
    return build(
        folder,
        kernels.dlogits_kernel,
        pointers | ({"source": IDS} if compact else {}),
        "stride out_stride first width valid parts",
        constants | ({} if compact else {"source": None}),
        divisible="stride out_stride width valid",
    )


def linear_partials(folder: Path) -> Compiled:
    inputs = {"hidden": "*bf16", "weight": "*bf16", "targets": IDS, "temperature": FLOAT}
    return build(
        folder,
        tiled.linear_partials_kernel,
        {**inputs, "out": FLOAT},
        "hidden_stride weight_stride rows size first width valid",
        {"BLOCKS": 8, "ROWS": 128, "COLUMNS": 256, "DEPTH": 64},
        divisible="hidden_stride weight_stride size width valid",
        warps=8,
        stages=4,
    )


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


@pytest.mark.parametrize(("dtype", "limit"), [("bf16", 10.5), ("fp16", 10.5), ("fp32", 11.5)])
def test_partials(tmp_path: Path, dtype: str, limit: float) -> None:
    made = partials(tmp_path, dtype)
    assert_lean(made)
    loop = hot_loop(made)
    wide = 4 if dtype == "fp32" else 8
    elements = made.count("LDG.E.128", loop) * wide
    assert elements == 2 * wide  # 256 lanes on 128 threads
    assert made.count("LDG", loop) == 2  # all of 16 bytes
    assert made.count("BAR", loop) == made.count("SHFL", loop) == 0
    assert made.count("ATOM") == made.count("RED.") == 0
    assert len(loop) / elements <= limit
    assert made.resources["REG"] <= 42  # twelve programs of 128 threads on a multiprocessor


def test_partials_without_entropy_are_cheaper(tmp_path: Path) -> None:
    with_it, without = (
        len(hot_loop(partials(tmp_path, "bf16", ENTROPY=entropy))) for entropy in (True, False)
    )
    assert without <= with_it - 16  # one instruction an element


def test_the_gate_sees_narrow_loads(tmp_path: Path) -> None:
    """It is no use if it cannot fail: without the promise of alignment the loads are narrow."""
    loop = hot_loop(partials(tmp_path, "bf16", ALIGNED=False, EVEN=False))
    loads = [code for _, code in loop if code.startswith("LDG")]
    assert len(loads) > 2 and not any(code.startswith("LDG.E.128") for code in loads)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(("dtype", "loads"), [("bf16", 16), ("fp32", 32)])
def test_dlogits(tmp_path: Path, dtype: str, loads: int, compact: bool) -> None:
    made = dlogits(tmp_path, dtype, compact=compact)
    assert_lean(made)
    # Four tiles of 2048 on 128 threads, written out twice: whole tiles and the row's end.
    assert made.count("STG.E.128") == 16 and made.count("STG") == 16
    assert made.count("LDG.E.128") == loads
    assert made.count("BAR") == made.count("SHFL") == made.count("ATOM") == made.count("RED.") == 0
    assert len(made.lines) / (2 * 4 * 16) <= 15.5  # an element
    assert made.resources["REG"] <= 48


def test_an_odd_vocabulary_costs_its_end_only(tmp_path: Path) -> None:
    """50257 real columns in aligned rows: the loop is as wide as ever."""
    loop = hot_loop(partials(tmp_path, "bf16", EVEN=False))
    assert [code[:9] for _, code in loop if code.startswith("LDG")] == ["LDG.E.128"] * 2


@pytest.mark.parametrize("one_row", [False, True])
def test_merge(tmp_path: Path, one_row: bool) -> None:
    """A single row is a case of its own: Triton turns an argument of 1 into a constant."""
    results = ["logp", "entropy", "peak", "log2d"]
    made = build(
        tmp_path,
        kernels.merge_kernel,
        {"parts": FLOAT, "targets": IDS, "temperature": FLOAT} | dict.fromkeys(results, FLOAT),
        "step" if one_row else "rows step",
        {"ALL_BLOCKS": 8, "LANES": 128} | ({"rows": 1} if one_row else {}),
        divisible="",
    )
    assert_lean(made)


def test_linear_partials(tmp_path: Path) -> None:
    made = linear_partials(tmp_path)
    assert_lean(made)
    assert made.count("HGMMA.64x256x16") == 4  # the widest product of the tensor cores
    assert made.count("UTMALDG") == 8  # four stages of two tiles, by the memory accelerator
    assert made.shared <= 227 * 1024
    products = [loop for loop in made.loops() if made.count("HGMMA", loop)]
    inner = min(products, key=len)
    assert made.count("HGMMA", inner) == 4 and made.count("MUFU", inner) == 0
