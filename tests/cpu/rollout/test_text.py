"""The text of an answer is that of its tokens."""

import asyncio

import numpy as np
import pytest

from peergrad.data import Rollout
from peergrad.inputs import answer_decoder
from peergrad.rollout.engine import Sampling
from peergrad.rollout.text import THREAD_TOKENS, Decoding
from tests.models import make_tokenizer

TOKENIZER = make_tokenizer()
PAD, EOS = TOKENIZER.convert_tokens_to_ids(["<pad>", "<eos>"])


class Given:
    """An engine that answers these tokens, with the text that SGLang would make of them."""

    def __init__(self, tokens: list[int], finish: str) -> None:
        ids = np.array(tokens, np.int32)
        text = TOKENIZER.decode(tokens, skip_special_tokens=True)
        self.rollout = Rollout(ids, ids * np.float32(-1), ((0, 0, len(ids)),), finish, text)

    async def generate(
        self, prompt_tokens: np.ndarray, sampling: Sampling, *, request_id: str
    ) -> list[Rollout]:
        return [self.rollout] * sampling.n


def ids(text: str) -> list[int]:
    return TOKENIZER.convert_tokens_to_ids(list(text))


@pytest.mark.parametrize(
    ("tokens", "finish", "text"),
    [
        ([*ids("L"), PAD, *ids("Us"), EOS], "stop", "L<pad>Us"),
        ([*ids("42"), EOS], "stop", "42"),
        (ids("42!"), "stop", "42!"),  # ended by a token that the user named: it stays
        ([*ids("4"), EOS, *ids("2")], "length", "4<eos>2"),
        ([*ids("4"), EOS], "length", "4<eos>"),  # cut off before it could end
        ([EOS], "stop", ""),
        ([], "stop", ""),
        ([*ids("4"), 90, *ids("2"), EOS], "stop", "4\ufffd2"),  # no token of the tokenizer's
        ([99, EOS], "stop", "\ufffd"),
        (ids("a  , b ."), "stop", "a  , b ."),  # nothing is tidied up
    ],
)
def test_text(tokens: list[int], finish: str, text: str) -> None:
    engine = Decoding(Given(tokens, finish), answer_decoder(TOKENIZER), [EOS])
    sampling = Sampling(n=2, max_new_tokens=9)
    rollouts = asyncio.run(engine.generate([5], sampling, request_id="0/p"))
    assert [rollout.text for rollout in rollouts] == [text] * 2
    assert rollouts[0].tokens.tolist() == tokens


def test_long_groups_are_decoded_beside_and_alike() -> None:
    engine = Decoding(Given([*ids("42" * 9), EOS], "stop"), answer_decoder(TOKENIZER), [EOS])
    sampling = Sampling(n=THREAD_TOKENS // 18 + 1, max_new_tokens=19)
    rollouts = asyncio.run(engine.generate([5], sampling, request_id="0/p"))
    assert {rollout.text for rollout in rollouts} == {"42" * 9}
