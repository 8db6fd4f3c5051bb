"""Groups on disk: a Parquet file a step, one row a rollout, which pandas, polars and duckdb open.

float32 logprobs survive bit by bit. Rollouts of a group are consecutive rows; ``rollout`` counts
them from 0, so that groups may be of different sizes.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from peergrad.data import Group, Prompt, Rollout
from peergrad.storage import flush, partial_of, remove, writing


def _field(name: str, kind: Any) -> Any:
    return pa.field(name, kind, nullable=False)


def _list(kind: Any) -> Any:
    return pa.list_(_field("element", kind))


SPAN = pa.struct([_field(name, pa.int32()) for name in ("version", "start", "end")])
SCHEMA = pa.schema(
    [
        _field("step", pa.int64()),  # of training, counted from 1; 0: of none
        _field("group_id", pa.string()),
        _field("rollout", pa.int32()),  # in its group, from 0
        _field("prompt_id", pa.string()),
        _field("prompt_tokens", _list(pa.int32())),
        _field("prompt_text", pa.string()),
        _field("prompt_answer", pa.string()),
        _field("prompt_extra", pa.string()),  # JSON
        _field("tokens", _list(pa.int32())),
        _field("logprobs", _list(pa.float32())),
        _field("versions", _list(SPAN)),  # of the weights, half-open spans of the tokens
        _field("finish", pa.string()),
        _field("text", pa.string()),
        _field("reward", pa.float64()),
        _field("experts", _list(pa.int16())),  # of each token but the last, of each layer; or empty
        _field("experts_per_token", pa.int16()),  # in a layer
    ]
)
WITHOUT_EXPERTS = pa.schema(list(SCHEMA)[:-2])
"""Of an older peergrad."""
IDS = ("prompt_tokens", "tokens")
REPEATED = [
    *("step", "group_id", "prompt_id", "prompt_text", "prompt_answer", "prompt_extra", "finish"),
    *(f"versions.list.element.{name}" for name in ("version", "start")),
]
"""Columns whose values repeat; the others would only fill a dictionary in vain."""
FORMAT = {
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": REPEATED,
    "write_statistics": ["step", "rollout", "reward"],
    "write_page_checksum": True,
}
PART = 2**24
"""Tokens of a row group: so much is in memory twice, whatever a step has, and a list's offsets
have 31 bits."""
LONGEST = 2**31 // PART // 2
"""Entries of a list for each of these tokens."""


def write_groups(path: Path, groups: Iterable[Group], *, step: int = 0) -> None:
    """Record the groups of training step ``step``. Those without rollouts are left out.

    The file appears under its name only when it is complete and on the disk.
    """
    with writing("rollouts", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_of(path)
    try:
        with writing("rollouts", path):
            with pq.ParquetWriter(partial, SCHEMA, **FORMAT) as writer:
                for part in _parts(groups):
                    table = to_table(part, step=step)
                    writer.write_table(table, row_group_size=max(1, table.num_rows))
            flush(partial)
            partial.replace(path)
            flush(path.parent)
    except BaseException:
        with suppress(OSError):
            remove(partial)
        raise


def _parts(groups: Iterable[Group]) -> Iterator[list[Group]]:
    """The row groups of a file: whole groups, until they have ``PART`` tokens."""
    part: list[Group] = []
    size = 0
    for group in groups:
        part.append(group)
        for one in group.rollouts:
            experts = 0 if one.experts is None else one.experts.size
            size += max(group.prompt.tokens.size + one.tokens.size, experts // LONGEST)
        if size >= PART:
            yield part
            part, size = [], 0
    yield part


def to_table(groups: Sequence[Group], *, step: int = 0) -> Any:
    """The groups as an Arrow table of ``SCHEMA``; the tokens are never walked one by one."""
    rows = [(index, group, one) for group in groups for index, one in enumerate(group.rollouts)]
    rollouts = [one for _, _, one in rows]
    prompts = [group.prompt for _, group, _ in rows]
    spans = [span for one in rollouts for span in one.versions]
    version, start, end = np.array(spans, np.int32).reshape(-1, 3).T.copy()
    extra = {id(group): json.dumps(group.prompt.extra) for group in groups}
    columns = {
        "step": np.full(len(rows), step),
        "group_id": _strings([group.id for _, group, _ in rows]),
        "rollout": np.array([index for index, _, _ in rows], np.int32),
        "prompt_id": _strings([prompt.id for prompt in prompts]),
        "prompt_tokens": _lists([prompt.tokens for prompt in prompts], np.int32),
        "prompt_text": _strings([prompt.text for prompt in prompts]),
        "prompt_answer": _strings([prompt.answer for prompt in prompts]),
        "prompt_extra": [extra[id(group)] for _, group, _ in rows],
        "tokens": _lists([one.tokens for one in rollouts], np.int32),
        "logprobs": _lists([one.logprobs for one in rollouts], np.float32),
        "versions": pa.ListArray.from_arrays(
            _offsets([len(one.versions) for one in rollouts]),
            pa.StructArray.from_arrays([version, start, end], fields=list(SPAN)),
            type=_list(SPAN),
        ),
        "finish": _strings([one.finish for one in rollouts]),
        "text": _strings([one.text for one in rollouts]),
        "reward": np.array([one.reward for one in rollouts], np.float64),
        "experts": _lists([_flat(one.experts) for one in rollouts], np.int16),
        "experts_per_token": np.array(
            [0 if one.experts is None else one.experts.shape[2] for one in rollouts], np.int16
        ),
    }
    arrays = [pa.array(columns[column.name], column.type) for column in SCHEMA]
    return pa.table(arrays, schema=SCHEMA)


def _flat(experts: np.ndarray | None) -> np.ndarray:
    return np.zeros(0, np.int16) if experts is None else experts.astype(np.int16).ravel()


def _offsets(sizes: Sequence[int]) -> Any:
    return pa.array(np.cumsum([0, *sizes], dtype=np.int64), pa.int32())  # an error beyond 2^31


def _lists(arrays: Sequence[np.ndarray], dtype: type) -> Any:
    flat: np.ndarray = np.concatenate([np.zeros(0, dtype), *arrays], dtype=dtype)
    values = pa.array(flat)
    offsets = _offsets([array.size for array in arrays])
    return pa.ListArray.from_arrays(offsets, values, type=_list(values.type))


def _strings(texts: Sequence[str]) -> Any:
    """Half a surrogate pair, which no file format of text can hold, becomes a question mark."""
    try:
        return pa.array(texts, pa.string())
    except UnicodeEncodeError:
        whole = [text.encode(errors="replace").decode() for text in texts]
        return pa.array(whole, pa.string())


def read_groups(path: Path) -> list[Group]:
    """Read what ``write_groups`` wrote.

    Raises FileNotFoundError if there is no such file, ValueError if it is damaged.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if not any(map(file.schema_arrow.equals, (SCHEMA, WITHOUT_EXPERTS))):
                raise ValueError("its columns are not those of a recording")
            tables = map(file.read_row_group, range(file.num_row_groups))
            return [group for table in tables for group in _groups(table)]
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's; Arrow's own, of damage, have no number
        what = " ".join(str(error).split())
        raise ValueError(
            f"rollouts = {str(path)!r}: is damaged ({type(error).__name__}: {what}); "
            "use another recording"
        ) from error


def _groups(table: Any) -> Iterator[Group]:
    """The groups of a row group, which are whole."""
    table.validate(full=True)
    if any((pc.min(pc.list_flatten(table[name])).as_py() or 0) < 0 for name in IDS):
        raise ValueError("it has negative token ids")
    rows = _rows(table)
    starts = np.flatnonzero(rows["rollout"] == 0).tolist()
    for first, end in pairwise([*starts, table.num_rows]):
        same = all(name == rows["group_id"][first] for name in rows["group_id"][first:end])
        if not same or rows["rollout"][first:end].tolist() != list(range(end - first)):
            raise ValueError(f"rows {first} to {end} are not one group")
        prompt = Prompt(
            id=rows["prompt_id"][first],
            tokens=rows["prompt_tokens"][first],
            text=rows["prompt_text"][first],
            answer=rows["prompt_answer"][first],
            extra=json.loads(rows["prompt_extra"][first]),
        )
        rollouts = tuple(_rollout(rows, row) for row in range(first, end))
        yield Group(rows["group_id"][first], prompt, rollouts)
    if table.num_rows and starts[:1] != [0]:
        raise ValueError("its first row is not the first of a group")


def _rollout(rows: dict[str, Any], row: int) -> Rollout:
    rollout = Rollout(
        tokens=rows["tokens"][row],
        logprobs=rows["logprobs"][row],
        versions=tuple(map(tuple, rows["versions"][row].tolist())),
        finish=rows["finish"][row],
        text=rows["text"][row],
        reward=rows["reward"][row],
        experts=_experts(rows, row),
    )
    if rollout.token_versions.size != rollout.tokens.size:
        raise ValueError(f"the versions of row {row} do not cover its tokens")
    return rollout


def _experts(rows: dict[str, Any], row: int) -> np.ndarray | None:
    if "experts" not in rows or not (chosen := rows["experts_per_token"][row]):
        return None
    flat: np.ndarray = rows["experts"][row]
    tokens = rows["prompt_tokens"][row].size + rows["tokens"][row].size - 1
    small = flat.size == 0 or flat.max() < 256
    return flat.reshape(tokens, -1, chosen).astype(np.uint8 if small else np.int16)


def _rows(table: Any) -> dict[str, Any]:
    """By column, one entry a row: text, number, or an array of the row's own."""
    found: dict[str, Any] = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if pa.types.is_string(column.type):
            found[name] = column.to_pylist()
        elif not pa.types.is_list(column.type):
            found[name] = column.to_numpy() if name == "rollout" else column.to_pylist()
        else:
            values = column.flatten()
            if pa.types.is_struct(values.type):
                flat = np.stack([part.to_numpy() for part in values.flatten()], axis=1)
            else:
                flat = values.to_numpy().copy()  # Arrow's own cannot be written to: torch objects
            ends = (column.offsets.to_numpy() - column.offsets[0].as_py())[1:-1]
            found[name] = np.split(flat, ends) if len(column) else []
    return found
