"""Rollouts and groups, and their way to disk and back."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peergrad.data import Group, Prompt, Rollout
from peergrad.recording import read_groups, write_groups

# A form feed, a line separator and a carriage return: line breaks to some, none to JSON lines.
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
