"""From hidden states: values and gradients against float64, what is computed and what is not."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from peergrad.kernels import (
    fused_linear_loss,
    linear_logits,
    linear_logprob,
    vocab_parallel_logprob,
)
from peergrad.kernels.gradient import ActiveRows, Arriving, active_first
from tests.kernels.conftest import COMPILED, INTERPRETED
from tests.kernels.oracle import exact
from tests.spawn import run_ranks

HIDDEN, REAL, PADDED = 24, 45, 64  # over four ranks the last one holds nothing but padding
METHODS = ["fused", "linear", "logits"]


def draw(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """hidden, weight, targets, temperature and two upstream gradients; rows 1, 5, 9 .. are ignored,
    2, 6, 10 .. have no gradient."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(rows)
    hidden = torch.randn(rows, HIDDEN, generator=generator).to(dtype)
    weight = (0.5 * torch.randn(PADDED, HIDDEN, generator=generator)).to(dtype)
    targets = torch.randint(0, REAL, (rows,), generator=generator)
    temperature = 0.5 + torch.rand(rows, generator=generator)
    d_logp, d_entropy = torch.randn(2, rows, generator=generator)
    targets[1::4] = -100
    d_logp[2::4] = d_entropy[2::4] = 0.0
    return hidden, weight, targets, temperature, d_logp, d_entropy


def run(
    method: str,
    hidden: Tensor,
    weight: Tensor,
    rest: tuple[Tensor, ...],
    *,
    group: Any = None,
    chunk: int = 7,
    scale: float = 1.0,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, loss), after ``(scale * loss).backward()``, by one of the three ways."""
    targets, tau, a, b = rest
    shared = {"group": group, "temperature": tau}
    if method == "logits":
        dtype = options.pop("logits", torch.float32)
        logp, entropy = vocab_parallel_logprob(
            linear_logits(hidden, weight, dtype=dtype),
            targets,
            valid_vocab=REAL,
            with_entropy=True,
            inplace=True,
            **shared,
        )
        loss = (a * logp + b * entropy).sum()
    elif method == "linear":
        logp, entropy = linear_logprob(
            hidden,
            weight,
            targets,
            vocab_size=REAL,
            chunk=chunk,
            with_entropy=True,
            **shared,
            **options,
        )
        loss = (a * logp + b * entropy).sum()
    else:

        def derivative(logp: Tensor, entropy: Tensor, rows: Any) -> Any:
            return (a[rows] * logp + b[rows] * entropy).sum(), a[rows], b[rows]

        loss, logp, entropy = fused_linear_loss(
            hidden, weight, targets, derivative, vocab_size=REAL, chunk=chunk, **shared, **options
        )
    (scale * loss).backward()
    return logp.detach(), entropy.detach(), loss.detach()


def oracle(hidden: Tensor, weight: Tensor, rest: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """logp, entropy, d_hidden, d_weight in float64."""
    targets, tau, a, b = rest
    x, w = hidden.double(), weight.double()
    logp, entropy, d_logits = exact(x @ w.t(), targets, tau, REAL, a, b)
    return logp, entropy, d_logits @ w, d_logits.t() @ x


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("rows", [1, 2, 21])
@pytest.mark.parametrize("method", METHODS)
def test_equals_float64(method: str, rows: int, chunk: int) -> None:
    hidden, weight, *rest = draw(rows)
    x, w = leaf(hidden), leaf(weight)
    logp, entropy, loss = run(method, x, w, tuple(rest), chunk=chunk)
    wanted = oracle(hidden, weight, tuple(rest))
    for ours, theirs in zip((logp, entropy, x.grad, w.grad), wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=5e-6, rtol=2e-6)
    assert float(loss) == pytest.approx(float(rest[2] @ logp + rest[3] @ entropy), abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_main_gradient_takes_the_heads_and_autograd_none(method: str) -> None:
    """Two micro-batches of bfloat16 add up in the float32 gradient that was there before."""
    hidden, weight, *rest = draw(21, torch.bfloat16)
    before = torch.randn(PADDED, HIDDEN)
    w = leaf(weight)
    w.main_grad = before.clone()  # type: ignore[attr-defined]
    for _ in range(2):
        x = leaf(hidden)
        run(method, x, w, tuple(rest))
    assert w.grad is None and x.grad is not None and x.grad.dtype == torch.bfloat16
    _, _, d_hidden, d_weight = oracle(hidden, weight, tuple(rest))
    # the gradient of the logits is rounded to bfloat16, 2^-9 of each, before the two products
    error = (w.main_grad.double() - before - 2 * d_weight).norm() / (2 * d_weight).norm()  # type: ignore[attr-defined]
    assert error < 2e-3
    assert (x.grad.double() - d_hidden).norm() / d_hidden.norm() < 4e-3


def test_upstream_scale() -> None:
    """Without a main gradient it scales; with one, which already has it, it must be 1."""
    hidden, weight, *rest = draw(9)
    x, w = leaf(hidden), leaf(weight)
    run("fused", x, w, tuple(rest), scale=3.0)
    _, _, d_hidden, d_weight = oracle(hidden, weight, tuple(rest))
    torch.testing.assert_close(x.grad.double(), 3 * d_hidden, atol=2e-5, rtol=2e-6)
    torch.testing.assert_close(w.grad.double(), 3 * d_weight, atol=2e-5, rtol=2e-6)
    if COMPILED:
        return  # there the device says so, and is lost to this process
    w.main_grad = torch.zeros(PADDED, HIDDEN)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="must reach backward\\(\\) unscaled"):
        run("fused", x, w, tuple(rest), scale=3.0)


def test_without_gradients_main_gradient_is_left_alone() -> None:
    hidden, weight, targets, tau, a, _ = draw(9)
    w = leaf(weight)
    w.main_grad = torch.zeros(PADDED, HIDDEN)  # type: ignore[attr-defined]

    def derivative(logp: Tensor, entropy: Tensor, rows: Any) -> Any:
        return (a[rows] * logp).sum(), a[rows], None

    options: dict[str, Any] = {"group": None, "vocab_size": REAL, "temperature": tau, "chunk": 4}
    with torch.no_grad():
        loss, logp, _ = fused_linear_loss(leaf(hidden), w, targets, derivative, **options)
    assert not loss.requires_grad and not w.main_grad.any()  # type: ignore[attr-defined]
    assert float(loss) == pytest.approx(float(a @ logp), abs=1e-5)


@pytest.mark.parametrize("method", ["linear", "logits"])
def test_two_backward_passes_of_one_graph(method: str) -> None:
    """Each gives its own gradient, and the second leaves the first as it was."""
    hidden, weight, targets, tau, *_ = draw(9)
    w = leaf(weight)
    options: dict[str, Any] = {"group": None, "temperature": tau, "with_entropy": False}
    if method == "linear":
        logp, entropy = linear_logprob(hidden, w, targets, vocab_size=REAL, chunk=4, **options)
    else:
        logits = linear_logits(hidden, w, dtype=torch.float32)
        logp, entropy = vocab_parallel_logprob(logits, targets, valid_vocab=REAL, **options)
    assert entropy is None
    found = [
        torch.autograd.grad(logp[part].sum(), w, retain_graph=True)[0]
        for part in (slice(0, 3), slice(3, 9))
    ]
    for part, ours in zip((slice(0, 3), slice(3, 9)), found, strict=True):
        a = torch.zeros(9)
        a[part] = 1.0
        wanted = oracle(hidden, weight, (targets, tau, a, torch.zeros(9)))[3]
        torch.testing.assert_close(ours.double(), wanted, atol=5e-6, rtol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_second_derivatives_are_refused(method: str) -> None:
    hidden, weight, targets, tau, *_ = draw(5)
    x, w = leaf(hidden), leaf(weight)
    if method == "fused":
        value = fused_linear_loss(
            x, w, targets, lambda logp, h, rows: (logp.sum(), torch.ones_like(logp), None),
            group=None, vocab_size=REAL, temperature=tau, chunk=4,
        )[0]  # fmt: skip
    elif method == "linear":
        value = linear_logprob(
            x, w, targets, group=None, vocab_size=REAL, temperature=tau, chunk=4, with_entropy=True
        )[0].sum()
    else:
        value = vocab_parallel_logprob(
            x @ w.t(), targets, group=None, temperature=tau, valid_vocab=REAL, with_entropy=False
        )[0].sum()
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.square().sum(), x)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_nobody_wants(method: str, frozen: str) -> None:
    hidden, weight, *rest = draw(9)
    x = hidden if frozen != "weight" else leaf(hidden)
    w = weight if frozen != "hidden" else leaf(weight)
    if frozen == "both":
        with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
            run(method, x, w, tuple(rest))
        return
    run(method, x, w, tuple(rest))
    _, _, d_hidden, d_weight = oracle(hidden, weight, tuple(rest))
    grad, wanted = (w.grad, d_weight) if frozen == "hidden" else (x.grad, d_hidden)
    torch.testing.assert_close(grad.double(), wanted, atol=5e-6, rtol=2e-6)


def bits_agree() -> list[bool]:
    """Of logp and entropy, between scoring and each way of training; of logp, between scoring with
    the entropy and without."""
    hidden, weight, *rest = draw(21)
    kept = (rest[0] >= 0).nonzero()[:, 0]  # the fused way drops ignored rows before chunking
    some, hidden = tuple(x[kept] for x in rest), hidden[kept]
    with torch.no_grad():
        options: dict[str, Any] = {"group": None, "vocab_size": REAL, "temperature": some[1]}
        scored, alone = (
            linear_logprob(hidden, weight, some[0], chunk=7, with_entropy=entropy, **options)
            for entropy in (True, False)
        )
    assert alone[1] is None and torch.equal(alone[0], scored[0])
    found = [run(method, leaf(hidden), leaf(weight), some)[:2] for method in ("fused", "linear")]
    return [torch.equal(x, y) for pair in found for x, y in zip(pair, scored, strict=True)]


@pytest.mark.distributed
def test_scoring_and_training_agree_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ratio before the first step is exactly 1. In a process of its own: MKL rounds one product
    in two ways (seen on a CPU without AVX-512) unless told otherwise before it is first used."""
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert (bits_agree() if COMPILED else run_ranks(1, bits_agree)[0]) == [True] * 4


@pytest.mark.parametrize(
    ("method", "ignored", "idle", "products"),
    [
        ("fused", 0.0, 0.0, 3.0),
        ("fused", 0.5, 0.0, 1.5),  # never projected
        ("fused", 0.0, 0.5, 2.0),  # projected, and no more
        ("fused", 0.0, 1.0, 1.0),
        ("linear", 0.0, 0.0, 4.0),
        ("linear", 0.0, 0.5, 3.0),
    ],
)
def test_matrix_products(method: str, ignored: float, idle: float, products: float) -> None:
    """Counted by PyTorch, in units of the projection of all rows."""
    rows = 32
    hidden, weight, targets, tau, a, b = draw(rows)
    targets, a, b = targets.clamp(min=0), a + 9, b + 9
    targets[: int(ignored * rows)] = -1
    a.view(8, 4)[:, : int(4 * idle)] = b.view(8, 4)[:, : int(4 * idle)] = 0.0
    with FlopCounterMode(display=False) as counter:
        run(method, leaf(hidden), leaf(weight), (targets, tau, a, b), chunk=8)
    assert counter.get_total_flops() / (2 * rows * HIDDEN * PADDED) == products


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.skipif(INTERPRETED, reason="the interpreter copies tensors as bytes")
@pytest.mark.parametrize("method", ["fused", "linear"])
def test_logits_exist_for_a_chunk_only(method: str) -> None:
    hidden, weight, *rest = draw(400)
    with Largest() as largest:
        run(method, leaf(hidden), leaf(weight), tuple(rest), chunk=5)
    # the hidden states, or four numbers for each of eight blocks; all logits would be 25 600
    assert largest.elements == {"fused": 400 * HIDDEN, "linear": 400 * 4 * 8}[method]


def test_rounded_logits() -> None:
    """``logits=bfloat16``: the softmax sees what an engine with such a head sees."""
    hidden, weight, *rest = draw(9, torch.bfloat16)
    targets, tau, a, b = rest
    rounded = (hidden.float() @ weight.float().t()).bfloat16()
    wanted = exact(rounded, targets, tau, REAL, a, b)
    for method in METHODS:
        x = leaf(hidden)
        found = run(method, x, leaf(weight), tuple(rest), logits=torch.bfloat16)
        for ours, theirs in zip(found[:2], wanted[:2], strict=True):
            torch.testing.assert_close(ours.double(), theirs, atol=2e-6, rtol=0)
        d_hidden = wanted[2] @ weight.double()
        assert (x.grad.double() - d_hidden).norm() / d_hidden.norm() < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1000, 1003])
def test_what_lies_between_rows_is_not_used(width: int, dtype: torch.dtype) -> None:
    """A bfloat16 product of 32 x 1000 by 1000 x 32 reads up to column 1008."""
    torch.set_num_threads(1)  # with two another product is chosen
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    hidden = torch.randn(32, 32, generator=generator).to(dtype)
    weight = torch.randn(width, 32, generator=generator).to(dtype)
    targets, ones = torch.arange(32), torch.ones(32)
    wanted = exact(hidden.double() @ weight.double().t(), targets, 1.0, width, ones)
    d_hidden = wanted[2] @ weight.double()
    for chunk in (32, 16):
        x = leaf(hidden)
        loss, *_ = fused_linear_loss(
            x,
            weight,
            targets,
            lambda logp, entropy, rows: (logp.sum(), torch.ones_like(logp), None),
            group=None,
            vocab_size=width,
            temperature=1.0,
            chunk=chunk,
        )
        loss.backward()
        assert x.grad is not None
        assert (x.grad.double() - d_hidden).norm() / d_hidden.norm() < 5e-3


@pytest.mark.parametrize("method", METHODS)
def test_no_rows(method: str) -> None:
    hidden, weight, *rest = draw(4)
    x, w = leaf(hidden[:0]), leaf(weight)
    logp, entropy, loss = run(method, x, w, tuple(v[:0] for v in rest))
    assert logp.shape == entropy.shape == (0,) and loss == 0
    assert x.grad.shape == (0, HIDDEN) and not w.grad.any()


class Order(TorchDispatchMode):
    """Sums over ranks and products into the head's gradient, in the order in which they begin."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.c10d.allreduce_, torch.ops.aten.addmm):
            self.begun.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def of_rank(method: str, dtype: torch.dtype) -> list[Any]:
    dist.init_process_group("gloo")
    hidden, weight, *rest = draw(21, dtype)
    x = leaf(hidden)
    w = leaf(weight.chunk(dist.get_world_size())[dist.get_rank()])
    with Order() as order:
        logp, entropy, loss = run(method, x, w, tuple(rest), group=dist.group.WORLD)
    if method == "logits":  # the others do it themselves
        dist.all_reduce(x.grad)  # as copy_to_tensor_model_parallel_region does
    return [logp, entropy, x.grad, w.grad, loss, order.begun]


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "method"), [(2, "linear"), (2, "logits"), (4, "fused")])
def test_real_ranks(ranks: int, method: str) -> None:
    found = run_ranks(ranks, of_rank, method, torch.float32)
    hidden, weight, *rest = draw(21)
    wanted = oracle(hidden, weight, tuple(rest))
    whole = [*found[0][:3], torch.cat([rank[3] for rank in found])]
    for ours, theirs in zip(whole, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=2e-6)
    for rank in found:
        assert torch.equal(rank[0], found[0][0]) and torch.equal(rank[1], found[0][1])
        assert torch.equal(rank[4], found[0][4])
        # That of a chunk's hidden states travels while the head's gradient is computed. Of the 21
        # rows the fused way leaves out those that are ignored: 16 are three chunks of 7, as all.
        both = ["allreduce_", "addmm"]
        assert rank[5] == {"linear": 3 * both, "fused": 3 * both, "logits": ["addmm"]}[method]


def test_the_host_waits_for_no_chunk_while_all_rows_are_active(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But for the first, and for those in the wake of one with idle rows."""
    made: list[Arriving] = []
    asked: list[int] = []
    create, value = Arriving.__init__, Arriving.value
    monkeypatch.setattr(
        Arriving, "__init__", lambda self, *args: (made.append(self), create(self, *args))[1]
    )
    monkeypatch.setattr(
        Arriving, "value", lambda self: (asked.append(made.index(self)), value(self))[1]
    )
    rows, waited = ActiveRows(), []
    for idle in (0, 0, 0, 2, 1, 0, 0):
        active = torch.arange(5) >= idle
        asked.clear()
        source = rows.of(active)
        waited.append(len(made) - 1 in asked)
        assert source is None or torch.equal(source, active_first(active, 5 - idle))
    assert waited == [True, False, False, False, True, True, False]


class Sums(TorchDispatchMode):
    """Whether products may be added up in the dtype of their result, at each."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            settings = torch.backends.cuda.matmul
            self.allowed.append(settings.allow_bf16_reduced_precision_reduction)
            self.allowed.append(settings.allow_fp16_reduced_precision_reduction)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(INTERPRETED, reason="knows no kernel")
@pytest.mark.parametrize("method", METHODS)
def test_products_are_added_up_in_float32(method: str) -> None:
    hidden, weight, *rest = draw(9)
    x, w = leaf(hidden), leaf(weight)
    # backward() runs in this thread on a CPU, and sees the mode
    with Sums() as sums:
        run(method, x, w, tuple(rest))
    assert len(sums.allowed) >= 6 and not any(sums.allowed)
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


class Allocations(TorchDispatchMode):
    """Sizes of tensors that are made, by the operation that makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        new = func.overloadpacket in (aten.empty, aten.new_empty, aten.mm)
        if isinstance(made, Tensor) and new and "out" not in (kwargs or {}):
            self.shapes.append(tuple(made.shape))
        return made


@pytest.mark.skipif(INTERPRETED, reason="the interpreter copies tensors as bytes")
def test_no_large_memory_has_a_size_that_depends_on_data() -> None:
    """Of 16 rows a chunk, 3 to 9 have a gradient: nothing of such a number of rows is allocated."""
    hidden, weight, targets, tau, a, b = draw(32)
    targets = targets.clamp(min=0)
    a[:] = b[:] = 0.0
    a[3:9], a[20:23] = 1.0, 1.0
    with Allocations() as made:
        run("fused", leaf(hidden), leaf(weight), (targets, tau, a, b), chunk=16)
    large = [shape for shape in made.shapes if len(shape) == 2 and shape[1] in (HIDDEN, PADDED)]
    assert large and all(shape[0] in (16, 32, PADDED) for shape in large)


@pytest.mark.skipif(INTERPRETED, reason="knows no kernel")
@pytest.mark.parametrize("direct", [False, True])
def test_checkpoints_do_not_add_twice(direct: bool) -> None:
    """A reentrant one takes the gradient in its second call alone. The other would in both, and is
    refused where that is wrong."""
    hidden, weight, targets, tau, a, b = draw(9)

    def derivative(logp: Tensor, entropy: Tensor, rows: Any) -> Any:
        return (a[rows] * logp + b[rows] * entropy).sum(), a[rows], b[rows]

    def loss_of(x: Tensor, w: Tensor) -> Tensor:
        options: dict[str, Any] = {"group": None, "vocab_size": REAL, "temperature": tau}
        loss = fused_linear_loss(x, w, targets, derivative, chunk=4, **options)[0]
        return loss + x.exp().sum()  # what follows keeps the exponential: all is repeated for it

    for reentrant in (True, False):
        x, w = leaf(hidden), leaf(weight)
        if direct:
            w.main_grad = torch.zeros(PADDED, HIDDEN)  # type: ignore[attr-defined]
        if direct and not reentrant:
            with pytest.raises(ValueError, match="which would run twice; call it outside"):
                checkpoint(partial(loss_of, w=w), x, use_reentrant=False)
            continue
        checkpoint(partial(loss_of, w=w), x, use_reentrant=reentrant).backward()
        once = leaf(weight)
        loss_of(leaf(hidden), once).backward()
        found = w.main_grad if direct else w.grad  # type: ignore[attr-defined]
        torch.testing.assert_close(found, once.grad, atol=1e-6, rtol=1e-6)
    with pytest.raises(RuntimeError, match="to differentiate twice"):
        w = leaf(weight)
        w.main_grad = torch.zeros(PADDED, HIDDEN)  # type: ignore[attr-defined]
        loss = loss_of(leaf(hidden), w)
        loss.backward(retain_graph=True)
        loss.backward()


@pytest.mark.skipif(INTERPRETED, reason="knows no kernel")
def test_a_loss_scale_is_not_rounded_to_bfloat16() -> None:
    """1002 is 1000 there: all of a gradient would be 0.2 % off."""
    hidden, weight, *rest = draw(9, torch.bfloat16)
    x, w = leaf(hidden), leaf(weight)
    run("fused", x, w, tuple(rest), scale=1002.0)
    y, v = leaf(hidden), leaf(weight)
    run("fused", y, v, tuple(rest))
    for scaled, plain in ((x.grad, y.grad), (w.grad, v.grad)):
        assert scaled is not None and plain is not None
        assert torch.equal(scaled, (1002.0 * plain.double()).bfloat16())


def test_active_first_has_no_hazard_in_place() -> None:
    assert active_first(torch.tensor([0, 1, 0, 0, 1, 1]) > 0, 3).tolist() == [4, 1, 5]
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    for size in range(12):
        for _ in range(20):
            active = torch.rand(size, generator=generator) < 0.5
            source = active_first(active, int(active.sum()))
            assert sorted(source.tolist()) == active.nonzero()[:, 0].tolist()
            for row, origin in enumerate(source.tolist()):
                # what is read from elsewhere lies behind everything that is written
                assert origin == row or origin >= len(source)
