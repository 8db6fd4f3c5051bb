"""Writing that is whole or not there, and what a disk refuses as one true line.

Everything is written under a hidden name beside its target, flushed, and renamed: one file system,
whatever the target's folder is a link to. The hidden name holds host and process, so that two
processes never write into the same one and a later one can tell what a dead one left behind.
"""

import errno
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from peergrad.echo import OtherRankFailed

_RULES = {
    errno.ENOSPC: ("the disk has too little space", "free some space"),
    errno.EDQUOT: ("the disk quota is used up", "free some of the quota"),
    errno.EROFS: ("the file system is read-only", "choose a folder that can be written"),
    errno.EACCES: ("permission is denied", "choose a folder that can be written"),
    errno.EPERM: ("the system does not permit it", "choose a folder that can be written"),
    errno.ENOTDIR: ("a file is where a folder should be", "move that file, or choose another name"),
    errno.EEXIST: ("something is there already", "move it, or choose another name"),
    errno.ENOTEMPTY: ("something is there already", "move it, or choose another name"),
    errno.EBUSY: ("it is in use, perhaps a mount point", "choose another name"),
    errno.ENOENT: ("its folder is not there and cannot be made", "correct the path"),
    errno.EIO: ("the disk reports an input/output error", "choose another disk"),
}
_VAGUE = ("inline_container", "PytorchStreamWriter", "iostream error")
"""How torch's writer of zip files names any failure."""


class StorageError(RuntimeError):
    """One line: what the disk refused, where, why, and what to do."""


@contextmanager
def writing(what: str, path: Path, *, then: Callable[[], str] = str) -> Iterator[None]:
    """Raise what the disk refuses in the body as a StorageError about ``path``.

    ``then()`` is what to do once the disk is mended. Errors of another kind pass as they are. The
    free space is measured here: remove partial files outside.
    """
    try:
        yield
    except (StorageError, OtherRankFailed, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        found = refusal(error, path)
        if found is None:
            raise
        rule, remedy = found
        raise StorageError(
            f"{what} = {str(path)!r}: cannot be written, {rule}; {remedy}{then()}"
        ) from error


def refusal(error: BaseException, path: Path) -> tuple[str, str] | None:
    """(rule, remedy) if ``error`` is what a disk refuses at ``path``, else None."""
    seen: BaseException | None = error
    while seen is not None:
        number = _errno(seen, path)
        if number in (errno.ENOSPC, errno.EDQUOT):
            rule, remedy = _RULES[number]
            return f"{rule}{_space(path)}", remedy
        if number is not None:
            rule, remedy = _RULES.get(number, (os.strerror(number), "choose another folder"))
            name = getattr(seen, "filename", None)
            blocked = number in (errno.ENOTDIR, errno.EEXIST) and name
            return f"{rule} ({name})" if blocked else rule, remedy
        seen = seen.__cause__
    return None


def _errno(error: BaseException, path: Path) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return None if isinstance(error, ConnectionError | TimeoutError) else error.errno
    text = str(error)  # writers in Rust, and those in other processes, only leave a text
    named = re.search(r"\[Errno (\d+)\]|\(os error (\d+)\)", text)
    if named is not None:
        return int(named[1] or named[2])
    return _probe(path) if any(word in text for word in _VAGUE) else None


def existing(path: Path) -> Path:
    """``path`` or the nearest folder above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _probe(path: Path) -> int | None:
    """The errno of writing a megabyte beside ``path``; None if that works."""
    folder = existing(path.parent)
    file = folder / f".probe.{os.getpid()}"
    try:
        file.write_bytes(bytes(1 << 20))
    except OSError as error:
        return error.errno
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)
    return None


def _space(path: Path) -> str:
    try:
        usage = shutil.disk_usage(existing(path))
    except OSError:
        return ""
    return f" ({in_bytes(usage.free)} of {in_bytes(usage.total)} free)"


def in_bytes(size: float) -> str:
    """1.2 GB, 34.0 MB, 12 bytes: decimal units, as disks are sold."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"


def size_of(folder: Path) -> int:
    """Bytes of all files in ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def partial_of(target: Path, *, siblings: str | None = None) -> Path:
    """The hidden name under which this process writes ``target``; nothing is there.

    Partial files of dead processes are removed: those of ``target``, or of every name beside it
    that the pattern ``siblings`` matches.
    """
    for path in target.parent.glob(f".{siblings or _quoted(target.name)}.partial*"):
        if not _alive(path.name):
            remove(path)
    partial = target.with_name(f".{target.name}.partial-{socket.gethostname()}-{os.getpid()}")
    remove(partial)
    return partial


def _quoted(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _alive(name: str) -> bool:
    """Whether the partial file ``name`` may belong to another living process."""
    match = re.search(r"\.partial-(.+)-(\d+)$", name)
    if match is None or match[1] != socket.gethostname():
        return True  # of another machine, or not ours at all
    try:
        os.kill(int(match[2]), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def remove(path: Path) -> None:
    """Remove a file, a link (never what it points to) or a folder; nothing if it is not there."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.exists():
        shutil.rmtree(path)


def put_in_place(partial: Path, target: Path, *, replace: bool = True) -> None:
    """Flush the folder ``partial`` to disk and rename it to ``target``.

    An older folder is moved aside before and removed after; a link of that name is replaced, not
    followed. Without ``replace`` anything that is there already is an OSError.
    """
    for path in [*partial.rglob("*"), partial]:
        flush(path)
    old = target.with_name(f".{target.name}.old")
    if os.path.lexists(target):
        if not replace:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        if not target.is_dir() and not target.is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
        remove(old)
        target.replace(old)
    partial.replace(target)
    flush(target.parent)
    remove(old)


def replace_text(path: Path, text: str) -> None:
    """Give the file ``path`` this content, all of it or, after a crash, none: by one rename."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def restore_old(target: Path) -> bool:
    """Give ``target`` its older folder back if a job died between the two renames of
    ``put_in_place``; whether it did."""
    old = target.with_name(f".{target.name}.old")
    lost = not os.path.lexists(target) and os.path.lexists(old)
    if lost:
        old.replace(target)
    return lost


def flush(path: Path) -> None:
    """Wait until ``path`` (a file, or a folder's entries) is on the disk; links are left out."""
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
