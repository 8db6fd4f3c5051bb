"""What a caller gives wrongly is one error, the same whichever way would have gone on with it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peergrad.kernels import (
    fused_linear_loss,
    linear_logits,
    linear_logprob,
    vocab_parallel_logprob,
)
from tests.kernels.conftest import INTERPRETED

ROWS, HIDDEN, WIDTH, REAL = 6, 8, 32, 29


def from_logits(**changed: Any) -> None:
    given: dict[str, Any] = {
        "logits": torch.zeros(ROWS, WIDTH),
        "targets": torch.arange(ROWS),
        "group": None,
        "temperature": 1.0,
        "valid_vocab": REAL,
        "with_entropy": True,
    } | changed
    vocab_parallel_logprob(given.pop("logits"), given.pop("targets"), **given)


def from_hidden(fused: bool) -> Callable[..., None]:
    def call(**changed: Any) -> None:
        given: dict[str, Any] = {
            "hidden": torch.zeros(ROWS, HIDDEN),
            "weight": torch.zeros(WIDTH, HIDDEN, requires_grad=True),
            "targets": torch.arange(ROWS),
            "group": None,
            "vocab_size": REAL,
            "temperature": 1.0,
            "chunk": 4,
        } | changed
        derivative = given.pop("derivative", lambda p, h, rows: (p.sum(), torch.ones_like(p), None))
        values = [given.pop(name) for name in ("hidden", "weight", "targets")]
        if "main_grad" in given:
            values[1].main_grad = given.pop("main_grad")
        if fused:
            fused_linear_loss(*values, derivative, **given)
        else:
            linear_logprob(*values, with_entropy=True, **given)

    return call


LINEAR, FUSED = from_hidden(False), from_hidden(True)
IDS = torch.arange(ROWS)
TOO_LARGE = IDS.clone()
TOO_LARGE[4] = REAL
HUGE = IDS + 2**32


def bad_rows() -> list[tuple[dict[str, Any], str]]:
    return [
        ({"targets": IDS[:5]}, r"targets = \[5\] int64 on cpu: must be \[6\] int64"),
        ({"targets": IDS[:, None]}, r"targets = \[6, 1\]"),
        ({"targets": IDS.float()}, r"targets = \[6\] float32"),
        ({"targets": IDS.int()}, r"targets = \[6\] int32"),
        ({"targets": TOO_LARGE}, "targets: must be below the vocabulary of 29"),
        ({"targets": HUGE}, "targets: must be below the vocabulary of 29"),
        ({"temperature": 0.0}, "temperature = 0.0: must be above 0"),
        ({"temperature": float("nan")}, "temperature = nan: must be above 0"),
        ({"temperature": torch.tensor([1.0] * 5 + [-1.0])}, "temperature: must be above 0"),
        ({"temperature": torch.ones(5)}, r"temperature = \[5\] float32 on cpu: must be one number"),
        ({"temperature": torch.ones(ROWS, 1)}, r"temperature = \[6, 1\]"),
        ({"temperature": torch.ones((), requires_grad=True)}, "requires a gradient: .* detach it"),
    ]


CASES: list[tuple[Callable[..., None], dict[str, Any], str]] = [
    *((call, *case) for case in bad_rows() for call in (from_logits, LINEAR, FUSED)),
    (from_logits, {"valid_vocab": 33}, "vocabulary = 33: must be 1 to 32"),
    (LINEAR, {"vocab_size": 0}, "vocabulary = 0"),
    (from_logits, {"logits": torch.zeros(2, 3, WIDTH)}, r"logits = \[2, 3, 32\] float32"),
    (from_logits, {"logits": torch.zeros(ROWS, WIDTH).double()}, r"logits = \[6, 32\] float64"),
    (from_logits, {"logits": torch.zeros(WIDTH, ROWS).t()}, "must be dense in the vocabulary"),
    (
        from_logits,
        {"logits": torch.zeros(1, WIDTH).expand(ROWS, WIDTH), "inplace": True},
        "rows that share memory cannot be overwritten; copy them",
    ),
]
for call in (LINEAR, FUSED):
    bf16 = torch.bfloat16
    CASES += [
        (call, {"hidden": torch.zeros(2, 3, HIDDEN)}, r"hidden = \[2, 3, 8\]"),
        (call, {"weight": torch.zeros(WIDTH, 7)}, r"weight = \[32, 7\] .* must be \[w, 8\]"),
        (call, {"hidden": torch.zeros(ROWS, HIDDEN, dtype=bf16)}, "must be torch.bfloat16 on cpu"),
        (call, {"logits": torch.float16}, "logits = torch.float16: must be float32 or"),
        (call, {"chunk": 0}, "chunk = 0: must be 1 row or more"),
        (call, {"main_grad": torch.zeros(16, HIDDEN)}, r"main_grad = \[16, 8\] float32"),
    ]
CASES += [
    (FUSED, {"derivative": lambda *_: None}, "derivative = NoneType: must be"),
    (FUSED, {"derivative": lambda p, h, r: (p.sum(), None, None)}, "derivative = tuple: must be"),
    (FUSED, {"derivative": lambda p, h, r: (p.sum(), p[:2], None)}, r"dL/dlogp = \[2\]"),
    (FUSED, {"derivative": lambda p, h, r: (p.sum(), p, h[:2])}, r"dL/dentropy = \[2\]"),
]


@pytest.mark.skipif(INTERPRETED, reason="knows no kernel")
def test_what_the_cases_change_is_good_as_it_is() -> None:
    for call in (from_logits, LINEAR, FUSED):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="values fail assertions on a GPU, for good")
@pytest.mark.parametrize(("call", "changed", "message"), CASES)
def test_one_error(call: Callable[..., None], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call(**changed)
    assert "\n" not in str(caught.value)


def test_logits_of_another_dtype_than_the_weight() -> None:
    with pytest.raises(ValueError, match=r"must be torch\.bfloat16 on"):
        linear_logits(
            torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(4, 8), dtype=torch.float32
        )


def test_values_on_a_gpu_are_asserted_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied to the host: a fake tensor has no value that could be."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from peergrad.kernels.inputs import check_rows

    asserted: list[str] = []
    monkeypatch.setattr(
        torch, "_assert_async", lambda ok, message: asserted.append(message.split(":")[0])
    )
    with FakeTensorMode(), torch.device("cuda:1"):
        targets, tau, like = torch.zeros(3, dtype=torch.int64), torch.ones(3), torch.zeros(3, 5)
        found: tuple[Tensor, Tensor] = check_rows(targets, tau, like, vocab=5, columns=5)
    assert asserted == ["targets", "temperature"] and found[1].device.index == 1
