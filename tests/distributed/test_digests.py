"""Digests of files, taken and compared by two ranks."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.spawn import run_ranks

EMPTY, ABC = "99aa06d3014798d86001c324468d497f", "06b05ab6733a618578af5f94892f3950"
"""XXH3-128 of nothing and of b"abc", by its reference implementation."""


def take_and_compare(root: str) -> dict[str, Any]:
    from peergrad.config import ParallelConfig
    from peergrad.parallel.digests import changed_file, digests
    from peergrad.parallel.mesh import init_mesh

    mesh = init_mesh(ParallelConfig(), seed=0)
    folder = Path(root)
    names = [f"model/__{rank}_{i}.distcp" for rank in (0, 1, 5) for i in (0, 1)] + ["meta", "empty"]
    seen: dict[str, Any] = {"taken": (taken := digests(folder, names, mesh))}
    seen["same"] = changed_file(folder, taken, mesh)

    def after(damage: Any) -> Any:
        mesh.share(damage)
        found = changed_file(folder, taken, mesh)
        mesh.barrier()
        return found

    for name in names[:-1]:
        file = folder / name
        content = mesh.share(file.read_bytes)  # rank 0 alone: it is the one that writes
        flipped = bytes([content[0] ^ 1]) + content[1:]
        seen[name] = after(lambda f=file, c=flipped: f.write_bytes(c))
        mesh.share(lambda f=file, c=content: f.write_bytes(c))
    seen["gone"] = after((folder / "meta").unlink)
    try:
        digests(folder, names, mesh)
    except OSError as error:
        seen["unread"] = str(error)
    return seen


@pytest.mark.distributed
def test_two_ranks_see_every_flipped_bit(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for rank in (0, 1, 5):
        for i in (0, 1):
            (tmp_path / f"model/__{rank}_{i}.distcp").write_bytes(os.urandom(5 << 20))
    (tmp_path / "meta").write_bytes(b"abc")
    (tmp_path / "empty").write_bytes(b"")
    first, second = run_ranks(2, take_and_compare, str(tmp_path))
    assert first == second
    taken = first.pop("taken")
    assert taken["empty"] == EMPTY and taken["meta"] == ABC
    assert len(set(taken.values())) == len(taken) == 8
    assert first.pop("same") is None
    assert first.pop("gone") == f"{tmp_path}/meta: No such file or directory"
    assert first.pop("unread") == f"{tmp_path}/meta: No such file or directory"
    assert first == {
        name: f"{name} has another content than was written (XXH3)"
        for name in taken
        if name != "empty"
    }
