"""Whether torch finds the GPUs and Transformer Engine loads, asked in a process of its own: a
driver can hang whoever asks."""

import json
import subprocess
import sys
from types import TracebackType
from typing import Self

from peergrad.preflight.engine import judge
from peergrad.preflight.report import Found, problem

PROGRAM = """
import json, sys, torch
from importlib.util import find_spec
gpus = range(torch.cuda.device_count())
for index in gpus:
    torch.ones(1, device=("cuda", index)).item()
found = {"gpus": len(gpus), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
able = [float("%d.%d" % torch.cuda.get_device_capability(index)) for index in gpus]
found["capability"] = min(able, default=99.0)
if "engine" in sys.argv and find_spec("transformer_engine"):
    try:
        import transformer_engine.pytorch, transformer_engine_torch
        found["cudnn"] = transformer_engine_torch.get_cudnn_version()
    except Exception as error:
        found["error"] = " ".join(f"{type(error).__name__}: {error}".split())
print(json.dumps(found))
"""


class Probe:
    """Started on entry, beside whatever else is checked; ended on exit.

    Example:
        >>> with Probe(8) as probe:
        ...     found = probe.found(20.0)
    """

    def __init__(self, gpus: int, program: str = PROGRAM, *, engine: bool = False) -> None:
        """``engine``: see whether Transformer Engine can be loaded, if it is installed."""
        self._gpus, self._program = gpus, program
        self._asked = ["engine"] if engine else []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        if self._gpus:
            words = [sys.executable, "-c", self._program, *self._asked]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()

    def found(self, seconds: float) -> Found:
        """What torch says within ``seconds``; nothing is asked where there are no GPUs."""
        if self._process is None:
            return Found()
        remedy = "compare torch's CUDA with the driver (nvidia-smi), and see dmesg for Xid errors"
        try:
            said, complaint = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            rule = f"torch has not found them within {seconds:.0f} s"
            return Found((problem("gpus", self._gpus, rule, remedy),))
        if self._process.returncode:
            last = (complaint.strip().splitlines() or [f"status {self._process.returncode}"])[-1]
            return Found((problem("gpus", self._gpus, f"torch fails: {last[:200]}", remedy),))
        told = json.loads(said.splitlines()[-1])
        found = Found(facts={"nccl that torch uses": told["nccl"]})
        if told["gpus"] != self._gpus:
            found += Found((problem("gpus", self._gpus, f"torch sees {told['gpus']}", remedy),))
        return found + judge(told)
