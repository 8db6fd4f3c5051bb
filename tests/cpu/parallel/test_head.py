"""Which kernels a run gets, and what it is told."""

import logging

import pytest
import torch

from peergrad.config import Logprob
from peergrad.parallel import head
from peergrad.parallel.head import choose_logprob

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("wanted", "device", "triton", "chosen", "stages"),
    [
        ("auto", CPU, False, "reference", "PyTorch"),
        ("fused_linear", CPU, False, "fused_linear", "PyTorch"),
        ("from_logits", CPU, False, "from_logits", "PyTorch"),
        ("auto", GPU, True, "fused_linear", "Triton"),
        ("auto", GPU, False, "reference", "PyTorch"),
        ("from_logits", GPU, True, "from_logits", "Triton"),
        ("reference", GPU, True, "reference", "PyTorch"),
    ],
)
def test_choice_is_made_and_logged(
    wanted: str,
    device: torch.device,
    triton: bool,
    chosen: str,
    stages: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(head, "triton_runs", lambda device: triton)
    with caplog.at_level(logging.INFO):
        assert choose_logprob(Logprob[wanted], device).name == chosen
    assert caplog.messages == [f"logprob kernels: {chosen} ({stages})"]


@pytest.mark.parametrize("wanted", ["fused_linear", "from_logits"])
def test_a_gpu_without_triton(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "triton_runs", lambda device: False)
    with pytest.raises(ValueError, match=f"kernels.logprob = '{wanted}': needs the package triton"):
        choose_logprob(Logprob[wanted], GPU)


def test_no_gpu_no_triton() -> None:
    """What the machine itself says; on a CPU only the interpreter would run."""
    assert not head.triton_runs(CPU)
