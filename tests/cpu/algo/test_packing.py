"""Packing: every scored token once, predicted from the position before it, whatever the
division."""

import itertools
from dataclasses import replace
from enum import Enum

import numpy as np
import pytest
import torch

from peergrad.algo.division import divide
from peergrad.algo.packing import MicroBatch, pack
from peergrad.algo.samples import Sample, make_samples, weigh
from peergrad.config import Aggregation, AlgoConfig
from peergrad.data import Group, Prompt, Rollout
from tests.samples import context, new_sample, random_samples


def test_one_sample_as_documented() -> None:
    batch = pack([new_sample([5, 3], [7, 1])])
    assert batch.tokens.tolist() == [5, 3, 7]  # 1 predicts nothing
    assert batch.rows.tolist() == [1, 2]  # 3 predicts 7, 7 predicts 1
    assert batch.targets.tolist() == [7, 1]
    assert batch.cu_seqlens.tolist() == [0, 3]
    assert batch.families == ((3,),) and batch.max_seqlen == 3


def test_two_samples_and_padding() -> None:
    """Of the second only the tokens of weight other than 0 are scored."""
    first = new_sample([5, 3], [7, 1], 0.25)
    second = new_sample([8], [2, 4, 9], [0.5, 0.0, -1.0])
    batch = pack([first, second], multiple=12)
    assert batch.tokens.tolist() == [5, 3, 7, 8, 2, 4, 0, 0, 0, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert batch.cu_seqlens.tolist() == [0, 3, 6, 12]
    assert batch.families == ((3,), (3,), (6,)) and batch.max_seqlen == 6
    assert batch.rows.tolist() == [1, 2, 3, 5]
    assert batch.targets.tolist() == [7, 1, 2, 9]
    assert batch.sequence.tolist() == [0, 0, 1, 1]
    assert batch.sequences == 2  # the padding is none
    assert batch.advantage.tolist() == [70, 10, 20, 90]
    assert batch.weight.tolist() == [0.25, 0.25, 0.5, -1.0]
    expected = torch.tensor([-0.7, -0.1, -0.2, -0.9])
    torch.testing.assert_close(batch.logp_engine, expected, rtol=0, atol=0)
    for name in ("tokens", "positions", "rows", "targets", "sequence"):
        assert getattr(batch, name).dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    for name in ("advantage", "weight", "logp_engine"):
        assert getattr(batch, name).dtype == torch.float32


@pytest.mark.parametrize("field", ["logp_old", "logp_ref", "proximal"])
def test_what_is_known_of_every_sample_is_packed_where_scored(field: str) -> None:
    samples = [new_sample([5], [7, 1], [0.0, 1.0]), new_sample([8], [2])]
    values = [np.array([-1, -2], np.float32), np.array([-3], np.float32)]
    filled = [replace(s, **{field: v}) for s, v in zip(samples, values, strict=True)]
    assert getattr(pack(filled), field).tolist() == [-2, -3]
    others = {"logp_old", "logp_ref", "proximal"} - {field}
    assert all(getattr(pack(filled), other) is None for other in others)
    assert getattr(pack([filled[0], samples[1]]), field) is None  # not of every one


def test_a_token_without_weight_may_be_unknown() -> None:
    """Policies score the tokens that have a weight; the others are NaN, and must not matter."""
    sample = new_sample([5], [7, 1, 2], [0.5, 0.0, 0.5])
    unknown = np.array([-1, np.nan, -3], np.float32)
    batch = pack([replace(sample, logp_old=unknown, logp_engine=unknown, advantage=unknown)])
    for name in ("logp_old", "logp_engine", "advantage"):
        assert getattr(batch, name).tolist() == [-1, -3]


@pytest.mark.parametrize("multiple", [1, 4])
def test_no_samples_are_a_row_of_padding(multiple: int) -> None:
    batch = pack([], multiple=multiple)
    assert batch.tokens.tolist() == [0] * multiple
    assert batch.cu_seqlens.tolist() == [0, multiple]
    assert batch.sequences == batch.targets.numel() == batch.weight.numel() == 0
    assert batch.logp_ref is not None and batch.logp_ref.numel() == 0


def test_an_answer_without_tokens_is_a_sequence_without_scores() -> None:
    batch = pack([new_sample([5, 3], []), new_sample([8], [2])])
    assert batch.tokens.tolist() == [8]
    assert batch.rows.tolist() == [0] and batch.sequence.tolist() == [1]
    assert batch.sequences == 2


def test_what_nothing_scored_is_predicted_from_takes_no_room() -> None:
    """All behind the last scored token, and that token itself: no computation, no budget."""
    cut = new_sample([5, 3], [7, 1, 6, 4], [0.5, 0.5, 0.0, 0.0])
    batch = pack([cut, new_sample([8], [2], 0.0)])
    assert batch.tokens.tolist() == [5, 3, 7] and batch.targets.tolist() == [7, 1]
    assert batch.families == ((3,),) and batch.cu_seqlens.tolist() == [0, 3]
    assert divide([cut, cut], ranks=1, budget=6).bins == [[[0, 1]]]
    assert divide([cut, cut], ranks=1, budget=5).bins == [[[0], [1]]]


def test_answers_that_share_a_prompt_as_documented() -> None:
    batch = pack([new_sample([5, 3], [7, 1]), new_sample([5, 3], [2, 4])], share=True)
    assert batch.tokens.tolist() == [5, 3, 7, 2]
    assert batch.positions.tolist() == [0, 1, 2, 2]  # both answers continue position 1
    assert batch.rows.tolist() == [1, 2, 1, 3]  # 3 predicts 7 and 2, 7 predicts 1, 2 predicts 4
    assert batch.targets.tolist() == [7, 1, 2, 4]
    assert batch.sequence.tolist() == [0, 0, 1, 1] and batch.sequences == 2
    assert batch.families == ((2, 1, 1),) and batch.cu_seqlens.tolist() == [0, 4]
    assert batch.max_seqlen == 3  # positions, not tokens


def test_two_shared_prompts_beside_a_sequence_and_padding() -> None:
    """Families where the first of their samples is; scores in the order of the samples. Of the
    second answer to (8, 9) nothing but its first token is scored, which the prompt predicts."""
    samples = [
        new_sample([8, 9], [2, 3, 4]),
        new_sample([6], [5, 7]),
        new_sample([8, 9], [1, 11], [0.5, 0.0]),
        new_sample([6], [10, 12, 13], [0.0, 0.0, 0.25]),
        new_sample([8, 9], [14, 15]),
        new_sample([8], [16]),
    ]
    batch = pack(samples, share=True, multiple=7)
    assert batch.tokens.tolist() == [8, 9, 2, 3, 14, 6, 5, 10, 12, 8, 0, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3, 2, 0, 1, 1, 2, 0, 0, 1, 2, 3]
    assert batch.families == ((2, 2, 1), (1, 1, 2), (1,), (4,))
    assert batch.cu_seqlens.tolist() == [0, 5, 9, 10, 14]
    assert batch.targets.tolist() == [2, 3, 4, 5, 7, 1, 13, 14, 15, 16]
    assert batch.rows.tolist() == [1, 2, 3, 5, 6, 1, 8, 1, 4, 9]
    assert batch.sequence.tolist() == [0, 0, 0, 1, 1, 2, 3, 4, 4, 5]


def test_a_prompt_whose_only_longer_answer_needs_no_parting_is_a_plain_sequence() -> None:
    short, long = new_sample([8, 9], [1]), new_sample([8, 9], [2, 3, 4])
    for samples, rows in [([short, long], [1, 1, 2, 3]), ([long, short], [1, 2, 3, 1])]:
        batch = pack(samples, share=True)
        assert batch.families == ((4,),) and batch.tokens.tolist() == [8, 9, 2, 3]
        assert batch.rows.tolist() == rows
    batch = pack([short, short, new_sample([8, 9], [6], 0.0)], share=True)
    assert batch.tokens.tolist() == [8, 9] and batch.rows.tolist() == [1, 1]


def test_equal_answers_are_computed_once() -> None:
    """As far as they are needed: (7, 1) and (7, 2) are both predicted from 7."""
    answers = [[7, 1], [6, 1, 3], [7, 2], [6, 1, 4], [7, 1]]
    batch = pack([new_sample([5, 3], answer) for answer in answers], share=True)
    assert batch.tokens.tolist() == [5, 3, 7, 6, 1] and batch.families == ((2, 1, 2),)
    assert batch.rows.tolist() == [1, 2, 1, 3, 4, 1, 2, 1, 3, 4, 1, 2]
    assert batch.targets.tolist() == [7, 1, 6, 1, 3, 7, 2, 6, 1, 4, 7, 1]
    assert batch.sequence.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4]
    batch = pack([new_sample([5, 3], [7, 1])] * 3, share=True)
    assert batch.families == ((3,),) and batch.rows.tolist() == [1, 2] * 3
    batch = pack([new_sample([5, 3], [7, 1])] * 2)
    assert batch.families == ((3,), (3,)) and batch.rows.tolist() == [1, 2, 4, 5]


def seen(batch: MicroBatch) -> list[list[int]]:
    """What every packed token sees of the row, itself included: the tokens of its prompt, and those
    of its own answer before it."""
    found, tokens, start = [], batch.tokens.tolist(), 0
    for prompt, *answers in batch.families:
        lead, at = tokens[start : start + prompt], start + prompt
        found += [lead[: i + 1] for i in range(prompt)]
        for size in answers:
            found += [lead + tokens[at : at + i + 1] for i in range(size)]
            at += size
        start = at
    assert start == len(tokens)
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("multiple", [1, 2, 7, 16])
@pytest.mark.parametrize("share", [False, True])
def test_every_scored_token_is_predicted_from_what_comes_before(
    seed: int, multiple: int, share: bool
) -> None:
    samples, rng = random_samples(12, seed), np.random.default_rng(seed)
    again = [s.weight * (rng.random(s.weight.size) < 0.5) for s in samples[:5]]
    samples += [replace(s, weight=weight) for s, weight in zip(samples, again, strict=False)]
    samples = [samples[i] for i in rng.permutation(len(samples))]
    batch = pack(samples, share=share, multiple=multiple)
    before = seen(batch)
    assert [len(tokens) - 1 for tokens in before] == batch.positions.tolist()
    assert batch.max_seqlen == max(map(len, before))
    expected = [
        (s.tokens[: s.prompt_length + t].tolist(), int(s.tokens[s.prompt_length + t]), i)
        for i, s in enumerate(samples)
        for t in np.flatnonzero(s.weight)
    ]
    columns = (x.tolist() for x in (batch.rows, batch.targets, batch.sequence))
    found = [(before[row], target, i) for row, target, i in zip(*columns, strict=True)]
    assert found == expected and batch.sequences == len(samples)
    sizes = [sum(family) for family in batch.families]
    assert batch.cu_seqlens.diff().tolist() == sizes and batch.cu_seqlens[0] == 0
    # Nothing is computed twice: as many tokens as there are different contexts, but for padding.
    needed = [(s.tokens[: s.prompt_length].tolist(), context(s)) for s in samples if s.scored.size]
    if share:
        prompts = {tuple(prompt) for prompt, _ in needed}
        answers = {(tuple(prompt), tuple(whole)) for prompt, whole in needed}
        total = sum(map(len, prompts)) + sum(len(c) - len(p) for p, c in answers)
    else:
        total = sum(len(whole) for _, whole in needed)
    assert total <= batch.tokens.numel() < total + multiple
    assert batch.tokens.numel() % multiple == 0


@pytest.mark.parametrize("mode", Aggregation)
def test_any_division_of_the_work_gives_the_same_sum(mode: Enum) -> None:
    """sum of weight * x over all scored tokens, for any ranks and budget: the loss in short."""
    algo = AlgoConfig(aggregation=mode)
    samples = weigh(random_samples(24, seed=0, longest=20), algo, max_tokens=20)

    def total(batches: list[MicroBatch]) -> float:
        return sum(float((b.weight.double() * b.targets.double().sin()).sum()) for b in batches)

    expected = sum(
        float((s.weight.astype(float) * np.sin(s.tokens[s.prompt_length :].astype(float))).sum())
        for s in samples
    )
    assert abs(expected) > 0.003
    grid = itertools.product((1, 2, 3, 7), (8, 30, 1000), ((1, False), (4, True)))
    for ranks, budget, (multiple, share) in grid:
        divided = divide(samples, ranks=ranks, budget=budget, share=share).bins
        parts = [[samples[i] for i in part] for bins in divided for part in bins]
        batches = [pack(part, multiple=multiple, share=share) for part in parts]
        assert total(batches) == pytest.approx(expected, rel=1e-9)


def routed(prompt: list[int], answer: list[int], first: int, weight: float = 1.0) -> Sample:
    """A sample whose token at position t went to experts ``first + t`` and ``first + t + 1``."""
    rows = first + np.arange(len(prompt) + len(answer) - 1)
    experts = np.stack([rows, rows + 1], axis=-1)[:, None].repeat(2, axis=1).astype(np.uint8)
    return new_sample(prompt, answer, weight).having(experts=experts)


def test_members_are_the_tokens_of_every_sample_as_documented() -> None:
    samples = [routed([5, 3], [7, 1, 4], 0), routed([5, 3], [2, 9, 8], 0), routed([6], [1], 9, 0.0)]
    members = pack(samples, share=True, routed=True, multiple=8).members
    assert members is not None and members.experts is not None
    assert members.rows.tolist() == [0, 1, 2, 3, 0, 1, 4, 5]
    assert members.samples.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]  # the last one is not computed
    assert members.experts.dtype == torch.uint8 and members.experts.shape == (2, 8, 2)
    for layer in members.experts.tolist():
        assert layer[:6] == [[0, 1], [1, 2], [2, 3], [3, 4], [2, 3], [3, 4]]
        assert layer[6:] == [[0, 1]] * 2  # padding goes to some, and never to one twice
    assert pack(samples, share=True).members is None
    mixed = [samples[0], replace(samples[1], experts=None)]
    some = pack(mixed, routed=True).members
    assert some is not None and some.experts is None
    assert some.rows.tolist() == list(range(8))


def test_what_is_computed_once_has_the_experts_of_the_first() -> None:
    """Else passes that pack the samples in other orders would replay other ones."""

    def answer(tokens: list[int], first: int | None) -> Rollout:
        rows = np.arange(1 + len(tokens))[:, None, None] + np.array([0, 1])
        experts = None if first is None else (first + rows).astype(np.uint8)
        ids = np.array(tokens, np.int32)
        spans = ((0, 0, len(tokens)),)
        return Rollout(ids, -np.ones(len(tokens), np.float32), spans, "stop", "", experts=experts)

    prompt = Prompt("p", np.array([5, 3], np.int32), "", "")
    some = (answer([7, 1], 0), answer([2, 9], 50), answer([7, 1], 90))
    told = [sample.experts for sample in make_samples([Group("g", prompt, some)])]
    firsts = [None if x is None else x[:, 0, 0].tolist() for x in told]
    assert firsts == [[0, 1, 2], [0, 1, 52], [0, 1, 2]]
    mixed = make_samples([Group("g", prompt, (*some, answer([4], None)))])
    assert [sample.experts for sample in mixed] == [None] * 4
