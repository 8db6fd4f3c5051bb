"""Whether torch finds the GPUs, asked in a process of its own: a driver can hang whoever asks."""

import json
import subprocess
import sys
from types import TracebackType
from typing import Self

from peergrad.preflight.report import Found, problem

PROGRAM = """
import json, torch
number = torch.cuda.device_count()
for index in range(number):
    torch.ones(1, device=("cuda", index)).item()
print(json.dumps([number, ".".join(map(str, torch.cuda.nccl.version()))]))
"""


class Probe:
    """Started on entry, beside whatever else is checked; ended on exit.

    Example:
        >>> with Probe(8) as probe:
        ...     found = probe.found(20.0)
    """

    def __init__(self, gpus: int, program: str = PROGRAM) -> None:
        self._gpus, self._program = gpus, program
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        if self._gpus:
            words = [sys.executable, "-c", self._program]
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
        number, nccl = json.loads(said.splitlines()[-1])
        found = Found(facts={"nccl that torch uses": nccl})
        if number != self._gpus:
            found += Found((problem("gpus", self._gpus, f"torch sees {number}", remedy),))
        return found
