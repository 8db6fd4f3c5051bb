"""Buckets: size, alignment, and that nothing is lost on the way."""

import math

import pytest
import torch

from peergrad.rollout.buckets import buckets

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.float64]


def received(named, limit):
    """Unpack each bucket as SGLang does, while it is valid."""
    tensors, sizes, lasts = {}, [], []
    for bucket, last in buckets(named, limit):
        offset = 0
        for name, dtype, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
            dtype = getattr(torch, dtype)
            size = math.prod(shape) * dtype.itemsize
            assert offset % dtype.itemsize == 0, f"{name} is unaligned"
            tensors[name] = bucket.flat[offset : offset + size].view(dtype).view(shape).clone()
            offset += size
        assert offset == len(bucket.flat)
        sizes.append(offset)
        lasts.append(last)
    return tensors, sizes, lasts


@pytest.mark.parametrize("limit", [1, 64, 1000, 1 << 20])
def test_every_tensor_arrives_bit_by_bit_in_buckets_within_the_limit(limit):
    torch.manual_seed(0)
    named = {f"t{i}": (torch.randn(i % 5 + 1, 3 + i % 4) * 50).to(DTYPES[i % 4]) for i in range(40)}
    tensors, sizes, lasts = received(named.items(), limit)
    assert list(tensors) == list(named)
    assert all(torch.equal(tensors[name], named[name]) for name in named)
    assert lasts == [False] * (len(lasts) - 1) + [True]
    largest = max(t.numel() * t.element_size() for t in named.values())
    assert max(sizes) <= max(limit, largest)


def test_a_bucket_ends_where_the_next_tensor_would_be_unaligned():
    named = [("a", torch.ones(3, dtype=torch.bfloat16)), ("b", torch.ones(2))]
    tensors, sizes, _ = received(named, 1000)
    assert sizes == [6, 8]
    assert tensors["b"].tolist() == [1, 1]


def test_views_and_scalars_are_sent_as_they_look():
    named = [("transposed", torch.arange(6.0).view(2, 3).T), ("scalar", torch.tensor(3.0))]
    tensors, sizes, _ = received(named, 1000)
    assert sizes == [28]
    assert tensors["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert tensors["scalar"].item() == 3


def test_the_stream_is_consumed_one_bucket_at_a_time():
    asked = []

    def named():
        for i in range(10):
            asked.append(i)
            yield f"t{i}", torch.zeros(25)  # 100 bytes

    stream = buckets(named(), 250)
    next(stream)
    assert asked == [0, 1, 2]  # two fill the bucket, the third shows that it is full


def test_no_tensors_no_buckets():
    assert list(buckets([], 100)) == []
