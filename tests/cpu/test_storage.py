"""Whole or not there: names, renames, links, and what a real full disk leaves behind."""

import errno
import os
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest

from peergrad.data import Group, Prompt, Rollout
from peergrad.recording import read_groups, write_groups
from peergrad.storage import (
    StorageError,
    in_bytes,
    partial_of,
    put_in_place,
    remove,
    restore_old,
    writing,
)
from tests.disk import small_disk


def folder_with(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


def group(seed: int = 0) -> Group:
    """About 200 kB once compressed."""
    rng = np.random.default_rng(seed)
    rollout = Rollout(
        tokens=rng.integers(0, 1 << 30, 20_000).astype(np.int32),
        logprobs=-rng.random(20_000).astype(np.float32),
        versions=((0, 0, 20_000),),
        finish="stop",
        text="a\u2028b",  # a line separator to Python, not to JSON lines
        reward=1.0,
    )
    prompt = Prompt(id="p", tokens=np.array([1], np.int32), text="t", answer="a")
    return Group(id="g", prompt=prompt, rollouts=(rollout,))


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "600k") as disk:
        path = disk / "rollouts" / "step.parquet"
        write_groups(path, [group()])
        before = path.read_bytes()
        with pytest.raises(StorageError) as caught:
            write_groups(path, map(group, range(5)))
        line = str(caught.value)
        assert line.startswith(
            f"rollouts = '{path}': cannot be written, the disk has too little space ("
        )
        assert "of 614.4 kB free); free some space" in line and "\n" not in line
        assert isinstance(caught.value.__cause__, OSError)
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]
        assert len(read_groups(path)) == 1


def test_a_damaged_recording_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.zst"
    write_groups(path, [group(), group()])
    content = path.read_bytes()
    middle = content[:1000] + bytes(50) + content[1050:]
    for damaged in (content[:-1], content[: len(content) // 2], b"", b"{}", middle):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^rollouts = .*x\.zst': is damaged \([^\n]*$"):
            read_groups(path)
    path.write_bytes(content)
    assert read_groups(path)[1].rollouts[0].text == "a\u2028b"


@pytest.mark.parametrize(
    ("error", "rule"),
    [
        (OSError(errno.EDQUOT, "x"), "the disk quota is used up ("),
        (OSError(errno.EROFS, "x"), "the file system is read-only; choose a folder"),
        (
            RuntimeError("Worker failure: [Errno 28] No space left"),
            "the disk has too little space (",
        ),
        (
            Exception("Error: I/O error: No space left (os error 28)"),
            "the disk has too little space (",
        ),
    ],
)
def test_every_writer_s_words_for_it_are_understood(
    tmp_path: Path, error: Exception, rule: str
) -> None:
    with pytest.raises(StorageError) as caught, writing("thing", tmp_path, then=lambda: ", now"):
        raise error
    assert rule in str(caught.value) and str(caught.value).endswith(", now")


@pytest.mark.parametrize(
    "error", [KeyError("x"), ConnectionResetError(104, "x"), RuntimeError("enforce fail")]
)
def test_errors_of_another_kind_pass(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, writing("thing", tmp_path):
        raise error
    assert caught.value is error


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="a file is where a folder should be"):
        write_groups(tmp_path / "file" / "sub" / "x.zst", [])
    with pytest.raises(NotADirectoryError):
        put_in_place(folder_with(tmp_path / "new", "new"), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_partial_files_of_the_dead_are_removed_and_those_of_the_living_kept(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    host = socket.gethostname()
    dead, living, elsewhere, other = (
        folder_with(tmp_path / name, "")
        for name in (
            f".x.partial-{host}-{gone.pid}",
            f".x.partial-{host}-{os.getppid()}",
            f".x.partial-another{host}-{gone.pid}",
            f".y.partial-{host}-{gone.pid}",
        )
    )
    mine = partial_of(tmp_path / "x")
    assert mine.parent == tmp_path and mine.name.endswith(f"-{os.getpid()}")
    assert not dead.exists() and living.exists() and elsewhere.exists() and other.exists()
    partial_of(tmp_path / "x", siblings="*")
    assert not other.exists()


def test_a_folder_is_replaced_and_found_again_after_a_crash(tmp_path: Path) -> None:
    target = folder_with(tmp_path / "x", "one")
    put_in_place(folder_with(tmp_path / "new", "two"), target)
    assert (target / "file").read_text() == "two"
    assert os.listdir(tmp_path) == ["x"]
    with pytest.raises(FileExistsError):
        put_in_place(folder_with(tmp_path / "new", "three"), target, replace=False)
    target.replace(tmp_path / ".x.old")  # killed between the two renames
    assert restore_old(target) and (target / "file").read_text() == "two"
    assert not restore_old(target)


def test_nothing_is_removed_through_a_link(tmp_path: Path) -> None:
    """Neither the link's folder when the link is replaced or removed, nor that of a link inside."""
    theirs = folder_with(tmp_path / "theirs", "precious")
    link = tmp_path / "x"
    link.symlink_to(theirs)
    put_in_place(folder_with(tmp_path / "new", "new"), link)
    assert not link.is_symlink() and (link / "file").read_text() == "new"
    (link / "inner").symlink_to(theirs)
    remove(link)
    link.symlink_to(theirs)
    remove(link)
    link.symlink_to(tmp_path / "nowhere")
    put_in_place(folder_with(tmp_path / "new", "new"), link)
    assert (theirs / "file").read_text() == "precious"


def test_sizes_are_read_as_disks_are_sold() -> None:
    assert [in_bytes(n) for n in (12, 8192, 34e6, 1.2e9)] == [
        "12 bytes",
        "8.2 kB",
        "34.0 MB",
        "1.2 GB",
    ]
