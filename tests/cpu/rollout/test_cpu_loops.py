"""What replaces SGLang's loops over requests does what they do."""

import inspect
import pkgutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")

from peergrad.rollout import cpu_loops

OURS = {cpu_loops.POSITIONS: cpu_loops.positions, cpu_loops.ROWS: cpu_loops.write_rows}


def sglangs(name):
    """Its own function, also if it is replaced already."""
    return inspect.unwrap(pkgutil.resolve_name(name))


@pytest.mark.parametrize("name", OURS)
def test_they_are_found_and_take_the_same_arguments(name):
    assert inspect.signature(sglangs(name)).parameters.keys() == (
        inspect.signature(OURS[name]).parameters.keys()
    )
    cpu_loops.replace_loops()
    replaced = pkgutil.resolve_name(name)
    assert replaced is not sglangs(name) and inspect.unwrap(replaced) is sglangs(name)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions(dtype):
    for prefix, fresh in (([0, 3, 0, 70], [2, 1, 5, 30]), ([4], [1]), ([0, 0], [1, 1])):
        lengths = torch.tensor(prefix, dtype=dtype), torch.tensor(fresh, dtype=dtype)
        places, begins = cpu_loops.positions(*lengths)
        expected = [p + i for p, f in zip(prefix, fresh, strict=True) for i in range(f)]
        assert places.tolist() == expected
        for one, other in zip(
            (places, begins), sglangs(cpu_loops.POSITIONS)(*lengths), strict=True
        ):
            assert one.dtype == other.dtype and one.tolist() == other.tolist()


class Table:
    """What is used of SGLang's table of requests, with its dtype."""

    def __init__(self):
        self.req_to_token = torch.full((9, 40), -1, dtype=torch.int32)

    def write(self, indices, values):
        self.req_to_token[indices] = values


def test_rows(monkeypatch):
    from sglang.srt.mem_cache import allocation

    torch_native = SimpleNamespace(attention_backends=lambda: ("torch_native", "torch_native"))
    monkeypatch.setattr(allocation, "attention_backends", torch_native.attention_backends)
    rows = torch.tensor([4, 0, 7, 2])
    prefix, fresh = torch.tensor([0, 12, 3, 0]), torch.tensor([5, 1, 20, 2])
    ends = prefix + fresh
    slots = torch.randperm(100)
    cached = [slots[50 : 50 + n] for n in prefix.tolist()]
    tables = Table(), Table()
    for write, table in zip((cpu_loops.write_rows, sglangs(cpu_loops.ROWS)), tables, strict=True):
        lengths = prefix, prefix, ends, ends, fresh, fresh
        write(slots[:28], rows, rows, *lengths, cached, table)
    one, other = (table.req_to_token for table in tables)
    assert torch.equal(one, other)
    assert one[7].tolist() == [*slots[50:53].tolist(), *slots[6:26].tolist(), *[-1] * 17]
    assert (one >= 0).sum() == 28 + 15
