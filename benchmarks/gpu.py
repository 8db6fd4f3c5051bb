"""Everything that needs a GPU, in parts, and one file of what came out; ``gpu.sh`` starts it.

Each part is a process with a time limit of its own. One that fails or runs over it does not stop
the others: what it had written by then is kept, with the last lines that it said. The file is
written after every part.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gpu_carry
import gpu_targets
from machine import RESULTS, ROOT, describe, load_average, result_path
from summary import save_result

LINES = 40  # of a failed part's output
CARD = (
    *("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.mem"),
    *("clocks.sm", "clocks.mem", "temperature.gpu", "persistence_mode", "ecc.mode.current"),
)
WATCHED = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "utilization.gpu")
THROTTLED = "clocks_event_reasons.active"  # bits, see nvidia-smi


@dataclass(frozen=True)
class Part:
    """A script of this folder that takes ``--out``, and how long it may take.

    Example:
        ``Part("sweep", 60, ("logprob.py", "--sweep=short"))``
    """

    name: str
    limit: float  # seconds
    command: tuple[str, ...]


STEPS = ("--warmup=2", "--steps=5")
LARGE = (*STEPS, "--groups=8", "--micro-batch-tokens=4096")  # fits into 80 GB
PARTS = (  # what says most about the rest comes first
    Part("kernels", 150, ("gpu_tests.py", "tests/kernels")),
    Part("collectives", 40, ("collectives.py",)),
    Part("logprob", 150, ("logprob.py",)),
    Part("trainer-0.6b", 60, ("trainer.py", "--groups=16", *STEPS)),
    Part("trainer-1.7b", 60, ("trainer.py", "--shape=qwen3-1.7b", *LARGE)),
    Part("trainer-8b", 60, ("trainer.py", "--shape=qwen3-8b", "--layers=8", *LARGE)),
    Part("sweep", 60, ("logprob.py", "--sweep=short")),
)
INTERPRETED = ("kernels", "sweep")  # without a GPU, by Triton
SMALL = {  # what --tiny adds to a script's command
    "gpu_tests.py": ("-kin_place or no_rows",),
    "collectives.py": ("--tiny",),
    "logprob.py": ("--tiny", "--warmup=1", "--repeats=2"),
    "trainer.py": ("--tiny", "--warmup=1", "--steps=1"),
}


def main() -> int:
    options = parse_arguments()
    deadline = time.monotonic() + 60 * options.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # parts end, too
    card = read_card() or (None if options.tiny else ask_torch())
    gpu = card["name"] if card else None
    if not (gpu or options.tiny):
        print("error: there is no GPU here; on a CPU only --tiny ends", file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "benchmark": "gpu",
        **described(card),
        "card": card,
        "load_average_before": load_average(),
        "tiny": options.tiny,
        "parts": {},
        "targets": [],
    }
    out = options.out or default_path(gpu, options)
    for part in PARTS:
        if options.only and part.name not in options.only:
            continue
        if options.tiny:  # imports alone may take a busy CPU half a minute
            small = (*part.command, *SMALL[part.command[0]])
            part = replace(part, command=small, limit=3 * part.limit)
        print(f"--- {part.name}, at most {part.limit:.0f} s", flush=True)
        made = run(part, min(part.limit, deadline - time.monotonic()), gpu)
        result["parts"][part.name] = made
        if part.name == "logprob":
            records = (made["result"] or {}).get("records", [])
            result["targets"] = gpu_targets.compare(records, gpu)
        save_result(out, result)
    show(result)
    print(f"written to {out}")
    return 0 if all(part["status"] == "done" for part in result["parts"].values()) else 1


def parse_arguments() -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes: try it on a CPU")
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--minutes", type=float, default=8.8, help="until all is over")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args()


def default_path(gpu: str | None, options: argparse.Namespace) -> Path:
    """``benchmarks/results/<gpu>-<date>.json``, with the parts in its name if they are not all; in
    the folder ``$OUT`` if that is set, and in ``build/`` if it is no result."""
    name = result_path(gpu, "-".join(["tiny"] * options.tiny + (options.only or []))).name
    folder = os.environ.get("OUT") or (ROOT / "build" if options.tiny else RESULTS)
    return Path(folder) / name


def described(card: dict[str, str] | None) -> dict[str, Any]:
    """The machine; on one without the history, the commit that its packages were gathered at."""
    card = card or {}
    size = card.get("memory.total", "")  # MiB
    found = describe(card.get("name"), int(size) << 20 if size.isdigit() else None)
    if found["git"]["commit"] is None:
        found["git"] = gpu_carry.carried_commit()
    return found


def read_card() -> dict[str, str] | None:
    """What ``nvidia-smi`` says of the first GPU; None without one."""
    said = _said(_smi(CARD))
    return dict(zip(CARD, said.splitlines()[0].split(", "), strict=True)) if said else None


def ask_torch() -> dict[str, str] | None:
    """The same where ``nvidia-smi`` is missing or knows less."""
    name = _said([sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"])
    return {"name": name} if name else None


def _smi(fields: tuple[str, ...]) -> list[str]:
    wanted = f"--query-gpu={','.join(fields)}"
    return ["nvidia-smi", "--id=0", "--format=csv,noheader,nounits", wanted]


def _said(command: list[str]) -> str:
    """Nothing if it failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


@contextmanager
def watched(gpu: str | None) -> Iterator[dict[str, Any]]:
    """Clocks, power and temperature every two seconds; filled in at the end."""
    found: dict[str, Any] = {}
    if gpu is None or shutil.which("nvidia-smi") is None:
        yield found
        return
    command = [*_smi((*WATCHED, THROTTLED)), "--loop=2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield found
        finally:
            process.terminate()
        lines = [line.split(", ") for line in process.communicate()[0].splitlines()]
    whole = [line for line in lines if len(line) == len(WATCHED) + 1]
    for i, name in enumerate(WATCHED):
        with suppress(ValueError, statistics.StatisticsError):  # "[N/A]", or nothing yet
            numbers = [float(line[i]) for line in whole]
            found[name] = {"median": statistics.median(numbers), "highest": max(numbers)}
    found[THROTTLED] = sorted({line[-1] for line in whole})


def run(part: Part, limit: float, gpu: str | None) -> dict[str, Any]:
    """How a part ended, in which time, and the JSON that it had written by then."""
    begin = time.monotonic()
    with TemporaryDirectory(prefix="peergrad-gpu-") as folder, watched(gpu) as clocks:
        log, file = Path(folder) / "log", Path(folder) / f"{part.name}.json"
        script, *rest = part.command
        command = [sys.executable, str(ROOT / "benchmarks" / script), f"--out={file}", *rest]
        status = "no time was left"
        if limit > 0:
            with log.open("wb") as stream:
                status = _status(command, stream, limit, environment(part, gpu))
        said = log.read_text(errors="replace").splitlines() if log.exists() else []
        result = json.loads(file.read_text()) if file.exists() else None
    print("\n".join(said[-LINES:]), flush=True)
    print(f"--- {part.name}: {status} after {time.monotonic() - begin:.1f} s", flush=True)
    return {
        "status": status,
        "seconds": round(time.monotonic() - begin, 1),
        "limit": part.limit,
        "command": ["python", f"benchmarks/{script}", *rest],
        "clocks": clocks,
        **({} if status == "done" else {"said": said[-LINES:]}),
        "result": result,
    }


def environment(part: Part, gpu: str | None) -> dict[str, str]:
    """Of a part: this checkout's sources, and gloo by the loopback. Without a GPU one thread,
    Triton's interpreter, and no ``torch.compile``, which would call a compiler for a minute."""
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    found = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    found.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's own name need not resolve
    if gpu is None:
        found |= {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
        found |= {"TRITON_INTERPRET": "1"} if part.name in INTERPRETED else {}
    return found


def _status(command: list[str], log: Any, limit: float, env: Mapping[str, str]) -> str:
    """Run to the end or the limit. What the process started ends with it."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
    )
    try:
        code = process.wait(timeout=limit)
        return "done" if code == 0 else f"failed with status {code}"
    except subprocess.TimeoutExpired:
        return f"over its time of {limit:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def show(result: Mapping[str, Any]) -> None:
    print()
    for name, part in result["parts"].items():
        print(f"{name:14} {part['seconds']:6.1f} s  {part['status']}")
    for target in result["targets"]:
        if target["measured_ms"] is None:
            print(f"{target['what']}: not measured")
            continue
        print(
            f"{target['what']}: {target['measured_ms']:.3f} ms, aimed at {target['target_ms']:.3f} "
            f"({target['target_share']:.0%} of the floor of {target['floor_ms']:.3f})"
        )


if __name__ == "__main__":
    sys.exit(main())
