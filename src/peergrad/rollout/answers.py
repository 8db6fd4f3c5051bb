"""What a server answered to /generate, and whether a trainer may learn from it.

An answer that does not add up is refused, not repaired: what is wrong with one is wrong with the
server, and a trainer takes every number of it for true.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from peergrad.data import Rollout
from peergrad.rollout.errors import ServerError, quote
from peergrad.rollout.versions import number

LOWEST, HIGHEST = -1e4, 1e-3
"""Logprobs between which a sampled token's lies. float32 draws nothing below e^-104, and an engine
that divides by a small temperature is still far from the first; the second is rounding."""
RESERVED = 2
"""Tokens that SGLang keeps free at the end of its context: it draws so many less of an answer that
would fill it."""
INT32 = 2**31
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
    max_new_tokens: int | None = None
    vocab_size: int | None = None

    def version(self, spelt: object, url: str) -> int:
        return number(spelt, url, self.identity, self.newest, self.oldest)


def parse_rollout(answer: Any, *, url: str = "the server", asked: Asked | None = None) -> Rollout:
    """One sample of a /generate answer of the server ``url``.

    Raises ServerError if it does not add up, or is not what was ``asked`` for.
    """
    asked = asked or Asked()
    with _form(url):
        meta = answer["meta_info"]
        logprobs, ids = _columns(meta["output_token_logprobs"])
        if ids != answer["output_ids"]:
            raise ServerError(
                f"{url}: returned {len(answer['output_ids'])} tokens but logprobs of {len(ids)} "
                "or of others; every token needs the logprob that it was drawn with",
                url=url,
            )
        spans = [
            (asked.version(span["version"], url), int(span["start"]), int(span["end"]))
            for span in meta["weight_versions"]
        ]
        reason = meta["finish_reason"]
        rollout = Rollout(
            tokens=_token_ids(ids, url, asked.vocab_size),
            logprobs=_logprobs(logprobs, url),
            versions=_covering(spans, len(ids), url),
            finish=reason["type"],
            text=answer.get("text") or "",
        )
    if rollout.finish != "abort":  # that is drawn again
        _check_end(rollout, reason.get("matched"), url, asked.max_new_tokens)
    return rollout


def parse_scores(
    answer: Any, length: int, *, url: str = "the server", asked: Asked | None = None
) -> np.ndarray:
    """Logprobs of all input tokens but the first, [length - 1] float32; errors as for
    ``parse_rollout``."""
    asked = asked or Asked()
    with _form(url):
        meta = answer["meta_info"]
        scored = meta["input_token_logprobs"]
        if len(scored) != length:
            raise ServerError(
                f"{url}: asked to score {length} tokens, the server scored {len(scored)}", url=url
            )
        if asked.identity is not None:
            asked.version(meta["weight_version"], url)
        return _logprobs(_columns(scored[1:])[0], url)


def _columns(scored: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Logprobs and token ids of triples (logprob, token id, text or None)."""
    if set(map(len, scored)) - {3}:
        raise ValueError("every token needs a logprob, an id and a text or null")
    flat = list(chain.from_iterable(scored))
    return flat[0::3], flat[1::3]


def _token_ids(ids: list[Any], url: str, vocab_size: int | None) -> np.ndarray:
    """[R] int32. TypeError for what is no whole number."""
    found = np.array(ids) if ids else np.zeros(0, np.int64)
    if found.dtype.kind != "i":
        raise TypeError("token ids must be whole numbers")
    limit = vocab_size or INT32
    wrong = found[(found < 0) | (found >= limit)]
    if wrong.size:
        raise ServerError(
            f"{url}: answered with token id {wrong[0]}, while the model's are 0 to {limit - 1}: it "
            "serves another model, or its kernels are broken; start it with the run's model",
            url=url,
        )
    return found.astype(np.int32)


def _logprobs(values: list[Any], url: str) -> np.ndarray:
    """[R] float32. ValueError or TypeError for what is neither number nor null."""
    found = np.array(values, np.float64)  # null becomes NaN
    wrong = np.flatnonzero(~((found >= LOWEST) & (found <= HIGHEST)))
    if wrong.size:
        at = int(wrong[0])
        said = "null" if values[at] is None else values[at]
        raise ServerError(
            f"{url}: answered with logprob {said} for token {at + 1} of {len(values)}, which is no "
            "log probability: its weights or its kernels are broken; see its log, or lower "
            "optim.lr and resume from an earlier checkpoint",
            url=url,
        )
    return found.astype(np.float32)


def _covering(
    spans: list[tuple[int, int, int]], length: int, url: str
) -> tuple[tuple[int, int, int], ...]:
    """``spans`` (version, start, end), if they cover the answer's tokens one after the other."""
    if not length:
        return ()
    bounds = [0, *(end for _, _, end in spans)]
    if [start for _, start, _ in spans] != bounds[:-1] or bounds[-1] != length:
        raise ServerError(
            f"{url}: weight versions {spans} do not cover the answer's {length} tokens; use a "
            "released SGLang of 0.5.21 or later",
            url=url,
        )
    return tuple(spans)


def _check_end(rollout: Rollout, matched: object, url: str, most: int | None) -> None:
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
                f"without the stop token {stops[0]} that ended it, but with {rollout.tokens[-1]}; "
                "use the SGLang that peergrad pins"
            )
    if rule:
        raise ServerError(f"{url}: answered {rule}", url=url)


@contextmanager
def _form(url: str) -> Iterator[None]:
    """Turn what a malformed answer makes of its reader into one line."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ServerError(
            f"{url}: answered /generate in another form than SGLang's ({quote(repr(error))}); "
            f"{NEEDED}",
            url=url,
        ) from error
