"""Rows of .jsonl and .parquet files, one after the other: no file is ever held as a whole."""

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peergrad.config import require
from peergrad.config.rules import one_line

BATCH = 1024
"""Rows of a parquet file that are Python objects at a time."""
GENERATED = "arithmetic"


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Example:
        ``Row(index=3, where="row 4 of gsm8k.jsonl", columns={"prompt": "1+2=", "answer": "3"})``
    """

    index: int
    where: str
    columns: dict[str, Any]


Heard = Callable[[str], None]
"""Is told how far something is, as in "12,288 rows, 31% of train.jsonl"."""
Read = Iterator[tuple[int, float, Any]]  # (index of the row, share of the file so far, the row)


def paths(source: str | Sequence[str]) -> list[str]:
    """The files of ``data.source`` or ``data.held_out``, which is one or a list."""
    return [source] if isinstance(source, str) else list(source)


def check_source(source: str | Sequence[str], option: str) -> None:
    """Raise ValueError unless ``source`` is ``arithmetic``, or one or several different files of a
    kind that can be read; looks at names alone and needs no tokenizer."""
    if source == GENERATED:
        return
    several = paths(source)
    rule, remedy = "is generated and stands alone", "name either it or files"
    require(GENERATED not in several, option, source, rule, remedy)
    found = [_check_path(path, option) for path in several]
    twice = next((path for path in found if found.count(path) > 1), None)
    require(twice is None, option, source, f"names {twice} twice", "name every file once")


def _check_path(source: str, option: str) -> Path:
    path = Path(source)
    try:
        folder, file = path.is_dir(), path.is_file()
    except OSError as error:  # a name that no file can have
        raise ValueError(f"{option} = {source!r}: {error.strerror}; correct the path") from error
    if folder:
        inside = sorted(p for p in (*path.glob("*"), *path.glob("*/*")) if p.suffix in READERS)
        remedy = "name a .jsonl or .parquet file: there is none in it"
        remedy = f"name one of the files in it, as in {option}={inside[0]}" if inside else remedy
        require(False, option, source, "is a folder, not a file", remedy)
    rule = "must be arithmetic or a .jsonl or .parquet file"
    if path.suffix not in READERS:
        packed = {".gz": "unpack it first", ".zst": "unpack it first", ".bz2": "unpack it first"}
        require(False, option, source, rule, packed.get(path.suffix, "convert it to one of these"))
    require(file, option, source, "there is no such file", "correct the path")
    return path.resolve()


def read_rows(path: Path, option: str, heard: Heard, name: str | None = None) -> Iterator[Row]:
    """The rows of one file; ``heard`` is told how far it is. ``name`` is the file's in errors, if
    its own would not tell it from another.

    Raises ValueError for the first that cannot be read; ``option`` is the key that names the file.
    """
    name = name or path.name
    try:
        for index, share, row in READERS[path.suffix](path, option):
            where = f"row {index + 1} of {name}"
            if not isinstance(row, dict):
                rule = f"{where} is no object but {row!r:.40}"
                raise ValueError(f"{option} = {str(path)!r}: {rule}; write one object a line")
            if index % BATCH == 0:
                heard(f"{index:,} rows, {share:.0%} of {name}")
            yield Row(index, where, row)
    except OSError as error:
        rule = f"cannot be read ({one_line(error.strerror or error)})"
        raise ValueError(f"{option} = {str(path)!r}: {rule}; correct its permissions") from error


def _read_jsonl(path: Path, option: str) -> Read:
    """Blank lines hold nothing but count, so that row numbers are line numbers."""
    size, read = max(1, path.stat().st_size), 0
    with path.open("rb") as stream:
        lines = (part for line in stream for part in line.splitlines())
        for index, line in enumerate(lines):
            read += len(line) + 1
            if index == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield index, min(1.0, read / size), _parse(line, path, index, option)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, whose keys must differ: of two the last would win, without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _parse(line: bytes, path: Path, index: int, option: str) -> Any:
    where = f"{option} = {str(path)!r}: row {index + 1} of {path.name}"
    try:
        row = _DECODER.decode(line.decode("utf-8"))
        if b"\\ud" in line.lower():  # half of a pair can be written, but never sent or recorded
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        return row
    except UnicodeError as error:
        raise ValueError(f"{where} is not UTF-8 ({one_line(error)}); convert it") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({one_line(error)}); correct it") from error


def _read_parquet(path: Path, option: str) -> Read:
    import pyarrow  # here, because it takes longer to import than most files to read
    import pyarrow.parquet

    index, where = 0, f"{option} = {str(path)!r}:"
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names, total = file.schema_arrow.names, max(1, file.metadata.num_rows)
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"{where} has two columns {twice!r}; rename one of them")
            exact = {field.name: _exact(field.type) for field in file.schema_arrow}
            for batch in file.iter_batches(batch_size=BATCH):
                columns = [
                    map(exact[name], _values(column, f"{where} column {name!r}", index))
                    for name, column in zip(batch.schema.names, batch.columns, strict=True)
                ]
                for values in zip(*columns, strict=True):
                    yield index, index / total, dict(zip(names, values, strict=True))
                    index += 1
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's word, not the format's
        raise ValueError(
            f"{where} is not readable as parquet ({one_line(error)}); write it again"
        ) from error


def _values(column: Any, where: str, first: int) -> list[Any]:
    """A column's values; ``first`` is the row of the first."""
    try:
        values: list[Any] = _plain(column).to_pylist()
        return values
    except UnicodeDecodeError as error:  # parquet stores bytes and only says that they are text
        bad = next(i for i in range(len(column)) if not _readable(column[i]))
        rule = f"is not UTF-8 in row {first + bad + 1} ({one_line(error)})"
        raise ValueError(f"{where} {rule}; convert it") from error
    except (ValueError, OverflowError) as error:  # times finer or farther than Python knows
        rule = f"holds what cannot be read ({one_line(error)})"
        raise ValueError(f"{where} {rule}; store it as text") from error


def _plain(column: Any) -> Any:
    """Times as text: Python has none finer than a microsecond."""
    import pyarrow.types as types

    kind = column.type
    fine = types.is_temporal(kind) and getattr(kind, "unit", None) == "ns"
    return column.cast("string") if fine and not types.is_duration(kind) else column


def _readable(value: Any) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _exact(kind: Any) -> Callable[[Any], Any]:
    """What makes a column's values what was meant: 0.1 in single precision is 0.1, not
    0.10000000149011612."""
    import pyarrow.types as types

    if types.is_float32(kind) or types.is_float16(kind):
        narrow = np.float32 if types.is_float32(kind) else np.float16
        return lambda value: None if value is None else float(str(narrow(value)))
    if types.is_struct(kind):
        inner = {field.name: _exact(field.type) for field in kind}
        return lambda value: value and {name: inner[name](value[name]) for name in value}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        each = _exact(kind.value_type)
        return each if each is _same else lambda value: value and [each(one) for one in value]
    return _same


def _same(value: Any) -> Any:
    return value


READERS: dict[str, Callable[[Path, str], Read]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
