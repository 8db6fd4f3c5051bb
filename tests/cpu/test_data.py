"""Rollouts and groups, and their way to disk and back."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peergrad.data import Group, Prompt, Rollout
from peergrad.recording import SCHEMA, _offsets, read_groups, write_groups

# A form feed, a line separator and a carriage return: line breaks to some.
TEXT = 'a "quoted" \\ line\nnext\r\x0c\u2028\x85 ü 漢 😀\0'


def new_rollout(logprobs: np.ndarray, reward: float = 1.0) -> Rollout:
    size = logprobs.size
    tokens = (2**31 - 1 - np.arange(size)).astype(np.int32)
    versions = tuple(span for span in ((3, 0, min(1, size)), (4, 1, size)) if span[1] < span[2])
    return Rollout(tokens, logprobs, versions, "length", TEXT, reward)


def new_group(*logprobs: np.ndarray) -> Group:
    extra = {"level": 3, "tags": ["a", None], "nested": {"x": 0.1}}
    prompt = Prompt("train-0", np.array([5, 0, 151935], np.int32), TEXT, "ß", extra)
    return Group("3/train-0", prompt, tuple(map(new_rollout, logprobs)))


def assert_same(a: Group, b: Group) -> None:
    assert (a.id, a.prompt.id, a.prompt.text, a.prompt.answer, a.prompt.extra) == (
        b.id, b.prompt.id, b.prompt.text, b.prompt.answer, b.prompt.extra,
    )  # fmt: skip
    assert len(a.rollouts) == len(b.rollouts)
    arrays = [(a.prompt.tokens, b.prompt.tokens)]
    for x, y in zip(a.rollouts, b.rollouts, strict=True):
        assert (x.versions, x.finish, x.text, x.reward) == (y.versions, y.finish, y.text, y.reward)
        arrays += [(x.tokens, y.tokens), (x.logprobs, y.logprobs)]
    for x, y in arrays:
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes()


def test_groups_survive_the_file_bit_by_bit(tmp_path: Path) -> None:
    info = np.finfo(np.float32)
    edges = np.array(
        [0.0, -0.0, -0.1, -1 / 3, info.smallest_subnormal, -info.tiny, info.min, -np.inf],
        np.float32,
    )
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    groups = [
        new_group(edges, bits[np.isfinite(bits)]),
        new_group(np.zeros(0, np.float32), np.array([-0.5], np.float32)),
    ]
    path = tmp_path / "deep" / "rollouts.parquet"
    write_groups(path, groups)
    found = read_groups(path)
    assert len(found) == 2
    for group, back in zip(groups, found, strict=True):
        assert_same(group, back)


def test_rewards_keep_all_digits(tmp_path: Path) -> None:
    group = new_group(np.zeros(2, np.float32))
    rollouts = tuple(replace(group.rollouts[0], reward=r) for r in (0.1 + 0.2, -1e-300, 1.0))
    write_groups(tmp_path / "a", [replace(group, rollouts=rollouts)])
    rewards = read_groups(tmp_path / "a")[0].rewards
    assert rewards.dtype == np.float64
    assert rewards.tolist() == [0.1 + 0.2, -1e-300, 1.0]


def test_the_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.parquet"

    def groups() -> Iterator[Group]:
        yield new_group(np.zeros(2, np.float32))
        assert not path.exists()
        raise RuntimeError("engine lost")

    with pytest.raises(RuntimeError, match="engine lost"):
        write_groups(path, groups())
    assert not path.exists()
    write_groups(path, [new_group(np.zeros(2, np.float32))])  # what is left does not matter
    assert len(read_groups(path)) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_groups(tmp_path / "none")


def test_a_rollout_has_one_logprob_per_token() -> None:
    tokens = np.zeros(3, np.int32)
    with pytest.raises(ValueError, match=r"got \(3,\) tokens and \(2,\) logprobs"):
        Rollout(tokens, np.zeros(2, np.float32), (), "stop", "")
    with pytest.raises(ValueError, match="one logprob per token"):
        Rollout(tokens[None], np.zeros((1, 3), np.float32), (), "stop", "")


def test_a_rollout_ends_for_a_known_reason() -> None:
    with pytest.raises(ValueError, match=r"finish must be one of .*'abort'.*, got 'eos'"):
        Rollout(np.zeros(1, np.int32), np.zeros(1, np.float32), (), "eos", "")


def test_other_programs_find_plain_columns(tmp_path: Path) -> None:
    """One row a rollout, numbers and lists of numbers, text as text."""
    path = tmp_path / "x.parquet"
    group = new_group(np.array([-0.5, -0.25], np.float32), np.array([-1.0], np.float32))
    write_groups(path, [group, replace(group, id="4/train-0")], step=7)
    rows = pq.read_table(path).to_pylist()
    named = [(row["group_id"], row["rollout"], row["step"]) for row in rows]
    assert named == [(name, i, 7) for name in ("3/train-0", "4/train-0") for i in (0, 1)]
    assert json.loads(rows[0].pop("prompt_extra")) == group.prompt.extra
    assert rows[0] == {
        "step": 7,
        "group_id": "3/train-0",
        "rollout": 0,
        "prompt_id": "train-0",
        "prompt_tokens": [5, 0, 151935],
        "prompt_text": TEXT,
        "prompt_answer": "ß",
        "tokens": [2**31 - 1, 2**31 - 2],
        "logprobs": [-0.5, -0.25],
        "versions": [{"version": 3, "start": 0, "end": 1}, {"version": 4, "start": 1, "end": 2}],
        "finish": "length",
        "text": TEXT,
        "reward": 1.0,
        "experts": [],
        "experts_per_token": 0,
    }
    with pq.ParquetFile(path) as file:
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"


def test_groups_of_other_sizes_and_equal_names_stay_apart(tmp_path: Path) -> None:
    one, two = np.array([-1.0], np.float32), np.array([-2.0, -3.0], np.float32)
    groups = [new_group(one), new_group(two, one, two), new_group(one)]
    write_groups(tmp_path / "x", [*groups, new_group()])
    found = read_groups(tmp_path / "x")
    assert [len(group.rollouts) for group in found] == [1, 3, 1]
    for group, back in zip(groups, found, strict=True):
        assert_same(group, back)


@pytest.mark.parametrize("most", [255, 256])
def test_experts_are_kept(tmp_path: Path, most: int) -> None:
    """Of 3 tokens of prompt and 2 of an answer 4 went to experts; another answer says none."""
    two = np.array([-2.0, -3.0], np.float32)
    group = new_group(two, two)
    experts = np.arange(24).reshape(4, 3, 2) * most // 23
    kind = np.uint8 if most < 256 else np.int16
    told = replace(group.rollouts[0], experts=experts.astype(kind))
    write_groups(tmp_path / "x", [replace(group, rollouts=(told, group.rollouts[1]))])
    (found,) = read_groups(tmp_path / "x")
    first, second = (rollout.experts for rollout in found.rollouts)
    assert first is not None and first.dtype == kind and second is None
    np.testing.assert_array_equal(first, experts)
    older = pq.read_table(tmp_path / "x").drop_columns(["experts", "experts_per_token"])
    pq.write_table(older, tmp_path / "x")
    assert [r.experts for r in read_groups(tmp_path / "x")[0].rollouts] == [None, None]


def test_no_groups_are_none(tmp_path: Path) -> None:
    write_groups(tmp_path / "x", [])
    assert read_groups(tmp_path / "x") == []


def test_a_long_step_is_written_in_parts_of_whole_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt has 3 tokens, once for each rollout: groups of 10, 16 and 4 tokens."""
    monkeypatch.setattr("peergrad.recording.PART", 20)
    two, five = np.array([-2.0, -3.0], np.float32), -np.ones(5, np.float32)
    groups = [new_group(two, two), new_group(five, five), new_group(two[:1])]
    path = tmp_path / "x"
    write_groups(path, groups)
    with pq.ParquetFile(path) as file:
        rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert rows == [4, 1]
    for group, back in zip(groups, read_groups(path), strict=True):
        assert_same(group, back)


def test_more_than_a_list_can_count_is_an_error_not_another_file() -> None:
    with pytest.raises(pa.ArrowInvalid, match="2147483648"):
        _offsets([2**30, 2**30])


def test_what_was_read_is_the_trainer_s_to_write_to(tmp_path: Path) -> None:
    """As what came over the pipe is: torch warns of arrays that are not."""
    write_groups(tmp_path / "x", [new_group(np.array([-1.0], np.float32))])
    (group,) = read_groups(tmp_path / "x")
    arrays = [group.prompt.tokens, group.rollouts[0].tokens, group.rollouts[0].logprobs]
    assert all(array.flags.writeable for array in arrays)


def test_half_a_character_does_not_stop_a_run(tmp_path: Path) -> None:
    group = new_group(np.array([-1.0], np.float32))
    rollout = replace(group.rollouts[0], text="a\ud83d😀")
    write_groups(tmp_path / "x", [replace(group, rollouts=(rollout,))])
    assert read_groups(tmp_path / "x")[0].rollouts[0].text == "a?😀"


def test_no_flipped_bit_is_taken_for_data(tmp_path: Path) -> None:
    """Wherever it is, also in the headers: the file is refused, or reads as it was."""
    path, rng = tmp_path / "x", np.random.default_rng(0)
    groups = [new_group(*(-rng.random(5, np.float32) for _ in range(3))) for _ in range(3)]
    write_groups(path, groups)
    whole, refused = path.read_bytes(), 0
    for at in rng.choice(len(whole), 400, replace=False):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        try:
            found = read_groups(path)
        except ValueError as error:
            assert "\n" not in str(error) and str(error).startswith(f"rollouts = '{path}': is dam")
            refused += 1
        else:
            for group, back in zip(groups, found, strict=True):
                assert_same(group, back)
    assert refused > 200


def altered(path: Path, **columns: list[object]) -> str:
    """What is said of a recording of two groups of two with other contents."""
    one = np.array([-1.0, -2.0], np.float32)
    write_groups(path, [new_group(one, one), new_group(one, one)])
    table = pq.read_table(path)
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, SCHEMA.field(name), pa.array(values, SCHEMA.field(name).type))
    pq.write_table(table, path)
    with pytest.raises(ValueError, match=r"is damaged \(ValueError: ") as error:
        read_groups(path)
    return str(error.value)


def test_rows_that_do_not_add_up_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert "rows 0 to 4 are not one group" in altered(path, rollout=[0, 1, 1, 2])
    assert "rows 0 to 2 are not one group" in altered(path, group_id=["a", "b", "c", "c"])
    assert "its first row is not the first" in altered(path, rollout=[1, 2, 0, 1])
    assert "one logprob per token" in altered(path, logprobs=[[-1.0]] * 4)
    spans = [[{"version": 0, "start": 0, "end": 1}]] * 4
    assert "the versions of row 0 do not cover" in altered(path, versions=spans)
    assert "cannot reshape array" in altered(path, experts=[[1, 2]] * 4, experts_per_token=[2] * 4)
    assert "finish must be one of" in altered(path, finish=["eos"] * 4)
    assert "it has negative token ids" in altered(path, tokens=[[-1, 2]] * 4)
    assert "it has negative token ids" in altered(path, prompt_tokens=[[3], [-1], [], []])
    pq.write_table(pa.table({"prompt": ["1+2="]}), path)
    with pytest.raises(ValueError, match="its columns are not those of a recording"):
        read_groups(path)
