"""What a server answered to /generate, and whether a trainer may learn from it.

An answer that does not add up is refused, not repaired: what is wrong with one is wrong with the
server, and a trainer takes every number of it for true.
"""

from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import msgspec
import numpy as np

from peergrad.data import Rollout
from peergrad.rollout.engine import Routes
from peergrad.rollout.errors import ServerError, quote
from peergrad.rollout.versions import number

LOWEST, HIGHEST = -1e4, 1e-3
"""Logprobs between which a sampled token's lies. float32 draws nothing below e^-104, and an engine
that divides by a small temperature is still far from the first; the second is rounding."""
RESERVED = 2
"""Tokens that SGLang keeps free at the end of its context: it draws so many less of an answer that
would fill it."""
INT32 = 2**31
Scored = list[list[float | None]]
"""Lists of logprob, token id, ... and a null: SGLang's triples, or many of them in one list."""
NEEDED = "use SGLang 0.5.21 or later, and name the workers themselves, not a router"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What an answer is held against. None: not known, so not checked.

    Example:
        ``Asked(identity="runs/a-1f3a", oldest=4, newest=5, max_new_tokens=512, vocab_size=151936)``
    """

    identity: str | None = None  # the run whose weights it must be drawn with
    oldest: int | None = None  # the version that all servers held when it was asked for
    newest: int | None = None  # the last version that the servers were given
    prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    vocab_size: int | None = None
    routes: Routes | None = None  # of the experts of every token

    def version(self, spelt: object, url: str) -> int:
        return number(spelt, url, self.identity, self.newest, self.oldest)


class _Reason(msgspec.Struct):
    type: Literal["stop", "length", "abort"]
    matched: int | str | list[int] | None = None


class _Span(msgspec.Struct):
    version: int | str
    start: int
    end: int


class _Meta(msgspec.Struct):
    finish_reason: _Reason | None = None
    output_token_logprobs: Scored = []
    input_token_logprobs: Scored = []
    weight_versions: list[_Span] = []
    weight_version: int | str = ""
    prompt_tokens: int | None = None
    routed_experts: str | None = None


class Answer(msgspec.Struct):
    """One sample of /generate, as far as it is read: the text is not (``rollout/text.py``)."""

    meta_info: _Meta
    output_ids: list[int] = []


_DECODER = msgspec.json.Decoder(Answer | list[Answer])


def read_answers(body: bytes, url: str) -> list[Answer]:
    """The samples of the body of an answer to /generate.

    Raises ServerError for another form than SGLang's, msgspec.DecodeError for what is no JSON.
    """
    with _form(url):
        # One list for all tokens: one for each would be half of the work. Inside a text, which is
        # not read, this does no harm.
        found = _DECODER.decode(body.replace(b",null],[", b","))
    return found if isinstance(found, list) else [found]


def parse_rollout(
    answer: Any, *, url: str = "the server", asked: Asked | None = None
) -> Rollout | None:
    """One sample, an ``Answer`` or JSON of its form, of the server ``url``; without its text. None
    if it was aborted, whatever there is of it.

    Raises ServerError if it does not add up, or is not what was ``asked`` for.
    """
    asked = asked or Asked()
    with _form(url):
        answer = msgspec.convert(answer, Answer)
        meta = answer.meta_info
        if meta.finish_reason is None:
            raise ValueError("an answer needs a reason why it ended")
        if meta.finish_reason.type == "abort":
            return None
        _check_prompt(meta.prompt_tokens, url, asked.prompt_tokens)
        logprobs, ids = _columns(meta.output_token_logprobs)
        tokens = np.array(answer.output_ids, np.int64)
        if not np.array_equal(ids, tokens):
            raise ServerError(
                f"{url}: returned {tokens.size} tokens but logprobs of {ids.size} "
                "or of others; every token needs the logprob that it was drawn with",
                url=url,
            )
        spans = [
            (asked.version(span.version, url), span.start, span.end)
            for span in meta.weight_versions
        ]
        rollout = Rollout(
            tokens=_token_ids(tokens, url, asked.vocab_size),
            logprobs=_logprobs(logprobs, url),
            versions=_covering(spans, tokens.size, url),
            finish=meta.finish_reason.type,
            text="",
            experts=_experts(meta.routed_experts, asked, tokens.size, url),
        )
    _check_end(rollout, meta.finish_reason.matched, url, asked.max_new_tokens)
    return rollout


def parse_scores(
    answer: Any, length: int, *, url: str = "the server", asked: Asked | None = None
) -> np.ndarray:
    """Logprobs of all input tokens but the first, [length - 1] float32; errors as for
    ``parse_rollout``."""
    asked = asked or Asked()
    with _form(url):
        meta = msgspec.convert(answer, Answer).meta_info
        logprobs, _ = _columns(meta.input_token_logprobs)
        if logprobs.size != length:
            raise ServerError(
                f"{url}: asked to score {length} tokens, the server scored {logprobs.size}",
                url=url,
            )
        if asked.identity is not None:
            asked.version(meta.weight_version, url)
        return _logprobs(logprobs[1:], url)


def parse_routes(answer: Any, *, url: str, asked: Asked) -> np.ndarray | None:
    """The experts of all input tokens but the last, ``[length - 1, layers, K]``; errors as for
    ``parse_rollout``."""
    with _form(url):
        meta = msgspec.convert(answer, Answer).meta_info
        return _experts(meta.routed_experts, asked, 0, url)


def _check_prompt(answered: int | None, url: str, asked: int | None) -> None:
    if None not in (answered, asked) and answered != asked:
        raise ServerError(
            f"{url}: answered a prompt of {answered} tokens, asked with one of {asked}: it cuts or "
            "extends prompts; start it without --allow-auto-truncate, and with a --context-length "
            "that holds prompt and answer",
            url=url,
        )


def _columns(scored: Scored) -> tuple[np.ndarray, np.ndarray]:
    """Logprobs and token ids, [R] float64 each. A null among them becomes NaN."""
    if any(len(some) % 2 == 0 or some[-1] is not None for some in scored):
        raise ValueError("every token needs a logprob, an id and null")
    pairs = np.array(list(chain.from_iterable(some[:-1] for some in scored)), np.float64)
    return pairs[0::2], pairs[1::2]


def _token_ids(ids: np.ndarray, url: str, vocab_size: int | None) -> np.ndarray:
    """[R] int32."""
    limit = vocab_size or INT32
    wrong = ids[(ids < 0) | (ids >= limit)]
    if wrong.size:
        raise ServerError(
            f"{url}: answered with token id {wrong[0]}, while the model's are 0 to {limit - 1}: it "
            "serves another model, or its kernels are broken; start it with the run's model",
            url=url,
        )
    return ids.astype(np.int32)


def _logprobs(values: np.ndarray, url: str) -> np.ndarray:
    """[R] float32."""
    wrong = np.flatnonzero(~((values >= LOWEST) & (values <= HIGHEST)))
    if wrong.size:
        at = int(wrong[0])
        said = "null" if np.isnan(values[at]) else values[at]
        raise ServerError(
            f"{url}: answered with logprob {said} for token {at + 1} of {values.size}, which is no "
            "log probability: its weights or its kernels are broken; see its log, or lower "
            "optim.lr and resume from an earlier checkpoint",
            url=url,
        )
    return values.astype(np.float32)


def _experts(said: str | None, asked: Asked, tokens: int, url: str) -> np.ndarray | None:
    """``[P + R - 1, layers, K]`` from SGLang's int32 in base64; None where they are not asked
    for, or not said and not required."""
    routes, rule = asked.routes, ""
    if routes is None or (said is None and not routes.required):
        return None
    if said is None:
        rule = "without the experts of its tokens, which moe.replay=on needs"
    else:
        found = np.frombuffer(b64decode(said, validate=True), "<i4")
        rows = (asked.prompt_tokens or 0) + tokens - 1
        shape = (rows, routes.layers, routes.chosen)
        if found.size != rows * routes.layers * routes.chosen:
            rule = f"with {found.size} experts in place of {' x '.join(map(str, shape))}"
        elif found.size and not 0 <= found.min() <= found.max() < routes.experts:
            rule = f"with an expert that is none of {routes.experts}"
        elif (np.diff(np.sort(found.reshape(shape), axis=2)) == 0).any():
            rule = "with an expert that a token went to twice"
    if rule:
        raise ServerError(
            f"{url}: answered {rule}; start it with --enable-return-routed-experts and the run's "
            "model, or set moe.replay=off",
            url=url,
        )
    return found.reshape(shape).astype(np.uint8 if routes.experts <= 256 else np.int16)


def _covering(
    spans: list[tuple[int, int, int]], length: int, url: str
) -> tuple[tuple[int, int, int], ...]:
    """``spans`` (version, start, end), if they cover the answer's tokens one after the other."""
    if not length:
        return ()
    bounds = [0, *(end for _, _, end in spans)]
    whole = [start for _, start, _ in spans] == bounds[:-1] and bounds[-1] == length
    if not whole or any(start >= end for _, start, end in spans):
        raise ServerError(
            f"{url}: weight versions {spans} do not cover the answer's {length} tokens; use a "
            "released SGLang of 0.5.21 or later",
            url=url,
        )
    return tuple(spans)


def _check_end(
    rollout: Rollout, matched: int | str | list[int] | None, url: str, most: int | None
) -> None:
    """Raise ServerError unless the answer ends where and why it says.

    ``matched``: the stop token, or one of several. A server's own end token may be none of those
    that were asked for, and counts as well.
    """
    length = len(rollout.tokens)
    rule = ""
    if most is not None and length > most:
        rule = f"with {length} tokens, asked for {most} at most; use the SGLang that peergrad pins"
    elif not length:
        rule = f"without a token (finish {rollout.finish!r}); use the SGLang that peergrad pins"
    elif rollout.finish == "length" and most is not None and length < most - RESERVED:
        rule = (
            f"with {length} tokens cut off, asked for {most}: it has too little room; lower "
            "rollout.max_new_tokens, or start it with a larger --max-total-tokens or "
            "--context-length"
        )
    elif isinstance(matched, str):  # SGLang says "NaN happened" so; we send no strings to stop at
        rule = (
            f"up to {matched!r} instead of a stop token; see its log, and start it without "
            "--preferred-sampling-params"
        )
    elif rollout.finish == "stop" and matched is not None:
        stops = matched if isinstance(matched, list) else [matched]
        if int(rollout.tokens[-1]) not in stops:
            rule = (
                f"without the stop token {matched} that ended it, but with {rollout.tokens[-1]}; "
                "use the SGLang that peergrad pins"
            )
    if rule:
        raise ServerError(f"{url}: answered {rule}", url=url)


@contextmanager
def _form(url: str) -> Iterator[None]:
    """Turn what a malformed answer makes of its reader into one line."""
    try:
        yield
    except (ValueError, OverflowError, RecursionError) as error:
        decoding = isinstance(error, msgspec.DecodeError)
        if decoding and not isinstance(error, msgspec.ValidationError):
            raise  # not even JSON: the caller knows what it is
        raise ServerError(
            f"{url}: answered /generate in another form than SGLang's ({quote(repr(error))}); "
            f"{NEEDED}",
            url=url,
        ) from error
