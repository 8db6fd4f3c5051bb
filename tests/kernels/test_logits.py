"""From logits: values and gradients against float64, hard inputs, and bits that do not depend on
how many ranks share the vocabulary."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from peergrad.kernels import vocab_parallel_logprob
from peergrad.kernels.backend import stages
from peergrad.kernels.gradient import Scores
from peergrad.kernels.shard import BLOCKS, Shard
from tests.kernels.conftest import TRITON
from tests.kernels.oracle import draw, exact
from tests.spawn import run_ranks

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def run(
    logits: Tensor, targets: Tensor, temperature: Any, valid: int, d_logp: Any, d_entropy: Any
) -> tuple[Tensor, Tensor, Tensor]:
    x = logits.clone().requires_grad_()
    logp, entropy = vocab_parallel_logprob(
        x, targets, group=None, temperature=temperature, valid_vocab=valid, with_entropy=True
    )
    assert entropy is not None and logp.dtype == entropy.dtype == torch.float32
    pairs = [(v, u) for v, u in ((logp, d_logp), (entropy, d_entropy)) if u is not None]
    gradient = torch.autograd.grad([v for v, _ in pairs], x, [u for _, u in pairs])[0]
    assert gradient.dtype == logits.dtype
    assert torch.equal(x.detach().view(torch.uint8), logits.contiguous().view(torch.uint8))
    return logp.detach(), entropy.detach(), gradient


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=EPS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "valid"),
    [
        (5, 1000, 1000),
        (9, 1003, 1000),  # no multiple of anything, padding
        (3, 64, 57),
        (2, 5, 3),  # fewer columns than blocks
        (1, 1, 1),
        (2, 2**15, 2**15 - 5),  # several tiles a block
        (4, 2**14, 2**14),  # whole tiles
    ],
)
def test_equals_float64(rows: int, width: int, valid: int, dtype: torch.dtype) -> None:
    logits, targets, temperature, *upstream = draw(rows, width, valid, dtype)
    found = run(logits, targets, temperature, valid, *upstream)
    wanted = exact(logits, targets, temperature, valid, *upstream)
    for ours, theirs in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-6, rtol=0)
    assert_close(found[2], wanted[2], dtype)
    assert not found[2][:, valid:].any() and not found[2][1::4].any() and not found[2][2::4].any()


@pytest.mark.parametrize("which", ["logp", "entropy"])
def test_one_gradient_alone(which: str) -> None:
    logits, targets, temperature, a, b = draw(4, 100, 100, torch.float32)
    upstream = (a, None) if which == "logp" else (None, b)
    found = run(logits, targets, temperature, 100, *upstream)
    assert_close(found[2], exact(logits, targets, temperature, 100, *upstream)[2])


def hard(name: str) -> Tensor:
    """Three rows of 3000 float32 logits, the middle one hard."""
    logits, *_ = draw(3, 3000, 3000, torch.float32, seed=1)
    eighths = (logits[1] * 8).round() / 8  # so that an offset is added exactly
    logits[1] = {
        "all at -150": torch.full((3000,), -150.0),
        "leading -inf": torch.cat([torch.full((1100,), -INF), logits[1, 1100:]]),
        "scattered -inf": torch.where(torch.arange(3000) % 7 > 0, -INF, logits[1]),
        "offset +3e4": eighths + 3e4,
        "offset -3e4": eighths - 3e4,
        "one-hot": logits[1] + 90.0 * (torch.arange(3000) == 2000),
        "largest finite": logits[1].masked_fill(torch.arange(3000) < 5, -3.4e38),
    }[name]
    return logits


@pytest.mark.parametrize(
    "name",
    [
        *("all at -150", "leading -inf", "scattered -inf", "offset +3e4", "offset -3e4"),
        *("one-hot", "largest finite"),
    ],
)
def test_hard_logits(name: str) -> None:
    logits, targets = hard(name), torch.tensor([7, 2002, 2999])
    upstream = torch.tensor([0.5, -2.0, 1.0]), torch.tensor([1.0, 0.3, 0.0])
    found = run(logits, targets, 1.0, 3000, *upstream)
    wanted = exact(logits, targets, 1.0, 3000, *upstream)
    assert all(torch.isfinite(x).all() for x in found)
    for ours, theirs in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-6, rtol=1e-7)
    assert_close(found[2], wanted[2])


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_bad_logit_spoils_its_own_row_only(value: float) -> None:
    logits, targets, *_ = draw(5, 700, 700, torch.float32)
    targets[1] = 3
    clean = run(logits, targets, 1.0, 700, torch.ones(5), torch.ones(5))
    logits[2, 650] = value
    for ours, theirs in zip(
        run(logits, targets, 1.0, 700, torch.ones(5), torch.ones(5)), clean, strict=True
    ):
        others = torch.arange(5) != 2
        assert torch.equal(ours[others], theirs[others]) and ours[2].isnan().any()
    # without a gradient the row is not even read
    idle = torch.tensor([1.0, 1, 0, 1, 1])
    assert not run(logits, targets, 1.0, 700, idle, None)[2][2].any()


@pytest.mark.parametrize("temperature", [1e-5, 1e-9, 1e-30])
def test_tiny_temperatures_with_impossible_columns(temperature: float) -> None:
    """Whole blocks of -inf, as guided decoding leaves them: the entropy was NaN."""
    logits, targets, *_ = draw(3, 4096, 4096, torch.float32)
    logits[:, :3000] = -INF
    logits[:, 4000] = 40.0
    targets[:] = torch.tensor([4000, 4000, 4001])
    logp, entropy, gradient = run(logits, targets, temperature, 4096, None, torch.ones(3))
    assert logp[:2].tolist() == [0.0, 0.0] and logp[2] < -1e6 and not entropy.any()
    assert torch.isfinite(gradient).all()


def test_impossible_rows() -> None:
    """A target at -inf has probability 0; a row of nothing but -inf has none at all."""
    logits, targets = torch.zeros(3, 50), torch.tensor([4, 4, 4])
    logits[0, 4], logits[1] = -INF, -INF
    logp, entropy, gradient = run(logits, targets, 1.0, 50, torch.ones(3), None)
    assert logp[0] == -INF and float(entropy[0]) == pytest.approx(math.log(49))
    assert logp[1].isnan() and entropy[1].isnan() and gradient[1].isnan().all()
    torch.testing.assert_close(gradient[0, :4], torch.full((4,), -1 / 49))
    assert torch.isfinite(logp[2]) and torch.isfinite(gradient[2]).all()


def test_rows_more_than_2_to_the_31_apart() -> None:
    far = torch.empty(0, dtype=torch.bfloat16)
    # pages of this storage that nobody touches never exist (on a GPU they do: 4 GB)
    storage = torch.UntypedStorage((2**31 + 4096) * 2, device=far.device)
    far = far.set_(storage, 0, (2, 2048), (2**31, 1))  # type: ignore[call-overload]
    near = draw(2, 2048, 2048, torch.bfloat16)[0]
    far.copy_(near)
    targets, ones = torch.tensor([5, 2000]), torch.ones(2)
    expected = run(near, targets, 1.0, 2048, ones, ones)
    shard = Shard.of(None, 2048, 2048)
    kernels = stages(far.device, plain=False)
    parts = kernels.partials(far, targets, ones, shard, entropy=True)
    logp, entropy, saved = kernels.merge(parts, targets, ones)
    scores = Scores(targets, ones, *saved, entropy, ones, ones)
    kernels.dlogits(far, scores, shard, out=far)
    for ours, theirs in zip((logp, entropy, far), expected, strict=True):
        assert torch.equal(ours, theirs)


def sharded(ranks: int, logits: Tensor, targets: Tensor, tau: Tensor, valid: int, up: Any) -> Any:
    """What ``ranks`` ranks compute, one after the other: logp, entropy, whole gradient."""
    width = logits.shape[1] // ranks
    kernels = stages(logits.device, plain=False)
    shards, columns = [], logits.split(width, 1)
    for rank in range(ranks):
        inside = max(0, min(width, valid - rank * width))
        shards.append(Shard(width, inside, rank * width, BLOCKS // ranks))
    parts = [
        kernels.partials(x, targets, tau, shard, entropy=True)
        for x, shard in zip(columns, shards, strict=True)
    ]
    logp, entropy, saved = kernels.merge(torch.cat(parts), targets, tau)
    scores = Scores(targets, tau, *saved, entropy, *up)
    gradients = [
        kernels.dlogits(x, scores, shard, out=torch.empty_like(x))
        for x, shard in zip(columns, shards, strict=True)
    ]
    return logp, entropy, torch.cat(gradients, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "valid"), [(1024, 1024), (1008, 1001), (8 * 37, 50)])
def test_bits_are_equal_for_every_number_of_ranks(
    width: int, valid: int, dtype: torch.dtype
) -> None:
    """Blocks begin where they always do, also where a rank has padding alone (50 of 296)."""
    logits, targets, tau, *upstream = draw(6, width, valid, dtype)
    one = sharded(1, logits, targets, tau, valid, upstream)
    for ranks in (2, 4, 8):
        for ours, theirs in zip(
            sharded(ranks, logits, targets, tau, valid, upstream), one, strict=True
        ):
            assert torch.equal(ours, theirs)


def of_rank(width: int, valid: int) -> list[Tensor]:
    dist.init_process_group("gloo")
    logits, targets, tau, *upstream = draw(6, width, valid, torch.float32)
    mine = logits.chunk(dist.get_world_size(), 1)[dist.get_rank()].clone().requires_grad_()
    logp, entropy = vocab_parallel_logprob(
        mine,
        targets,
        group=dist.group.WORLD,
        temperature=tau,
        valid_vocab=valid,
        with_entropy=True,
        inplace=True,
    )
    gradient = torch.autograd.grad([logp, entropy], mine, upstream)[0]
    return [x.detach() for x in (logp, entropy, gradient)]


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_real_ranks(ranks: int) -> None:
    """Three do not divide the eight blocks: the same numbers, not the same bits."""
    width, valid = 1008, 1001
    logits, targets, tau, *upstream = draw(6, width, valid, torch.float32)
    expected = run(logits, targets, tau, valid, *upstream)
    found = run_ranks(ranks, of_rank, width, valid)
    whole = torch.cat([rank[2] for rank in found], 1)
    for rank in found:
        for ours, theirs in zip((*rank[:2], whole), expected, strict=True):
            if BLOCKS % ranks == 0:
                assert torch.equal(ours, theirs)
            torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-6)
        assert torch.equal(rank[0], found[0][0]) and torch.equal(rank[1], found[0][1])


def test_in_place_only_once() -> None:
    logits, targets, tau, a, _ = draw(3, 90, 90, torch.float32)
    expected = run(logits, targets, tau, 90, a, None)[2]
    x = logits.requires_grad_() * 1
    kept = x.detach()
    logp, entropy = vocab_parallel_logprob(
        x, targets, group=None, temperature=tau, valid_vocab=90, with_entropy=False, inplace=True
    )
    assert entropy is None
    (gradient,) = torch.autograd.grad(logp, x, a, retain_graph=True)
    assert torch.equal(gradient, expected) and gradient.data_ptr() == kept.data_ptr()
    with pytest.raises(RuntimeError, match="pass inplace=False to differentiate twice"):
        torch.autograd.grad(logp, x, a)


def test_in_place_is_noticed_by_whoever_saved_the_logits() -> None:
    """A soft cap's derivative needs its result, which is no longer there."""
    raw, targets, tau, a, _ = draw(3, 90, 90, torch.float32)
    raw.requires_grad_()
    logp, _ = vocab_parallel_logprob(
        raw.tanh(), targets, group=None, temperature=tau, valid_vocab=90, with_entropy=False,
        inplace=True,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.backward(a)


def test_targets_and_temperatures_of_any_layout() -> None:
    logits, targets, tau, *upstream = draw(6, 90, 90, torch.float32)
    expected = run(logits, targets, tau, 90, *upstream)
    strided = torch.stack([targets, targets * 0 + 5], 1)[:, 0]
    for ours, theirs in zip(
        run(logits, strided, tau.double(), 90, *upstream), expected, strict=True
    ):
        assert torch.equal(ours, theirs)


def test_no_rows_and_strides() -> None:
    logits = torch.zeros(0, 32, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    options: dict[str, Any] = {"group": None, "temperature": 1.0, "with_entropy": True}
    logp, _ = vocab_parallel_logprob(logits, nothing, valid_vocab=32, **options)
    logp.sum().backward()
    assert logp.shape == (0,) and logits.grad is not None and logits.grad.shape == (0, 32)
    with pytest.raises(ValueError, match="must be dense in the vocabulary"):
        vocab_parallel_logprob(torch.zeros(4, 2).t(), nothing, valid_vocab=4, **options)
    # rows of a wider buffer
    wide = draw(3, 128, 128, torch.float32)[0]
    targets, ones = torch.tensor([1, 2, 3]), torch.ones(3)
    narrow = wide[:, :77]
    found = run(narrow, targets, 1.0, 77, ones, ones)
    again = run(narrow.contiguous(), targets, 1.0, 77, ones, ones)
    assert all(map(torch.equal, found, again))


@pytest.mark.skipif(not TRITON, reason="compares the Triton kernels with PyTorch")
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_is_the_reference(dtype: torch.dtype) -> None:
    logits, targets, tau, *upstream = draw(6, 1000, 990, dtype)
    found = []
    for plain in (False, True):
        x = logits.clone().requires_grad_()
        values = vocab_parallel_logprob(
            x, targets, group=None, temperature=tau, valid_vocab=990, with_entropy=True, plain=plain
        )
        gradient = torch.autograd.grad(values, x, upstream)[0]
        found.append((*values, gradient))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=EPS[dtype])
