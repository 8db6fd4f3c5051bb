"""Proof that the servers hold the weights that were sent.

A server answers 200 to a weight whose name it does not know and drops it, so success says little.
Two checks say more: the digest of every tensor that the engine holds, against the bytes that the
trainer sent; and a canary, a fixed token sequence that the engine scores, and the trainer as well.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from peergrad.data import Group, Prompt, Rollout
from peergrad.rollout.errors import some_of

CANARY_TOKENS = 64
VOCABULARY_MULTIPLE = 64  # the server appends rows of zeros up to a multiple of this
SCALES = ".weight_scale_inv"  # FP8: the engine has no digest of them apart from their matrix's
VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
FUSED = {  # projection -> the engine's matrix, position in it, number of parts
    "q_proj": ("qkv_proj", 0, 3),
    "k_proj": ("qkv_proj", 1, 3),
    "v_proj": ("qkv_proj", 2, 3),
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
}


@dataclass(frozen=True)
class Proof:
    """What is known after a weight sync.

    ``canary`` holds one rollout per server, all of the same tokens, with that server's logprobs at
    temperature 1; None if the proof is off.
    """

    version: int
    verified: int  # engine tensors found equal to what was sent, on every server
    unverified: int  # engine tensors whose digest cannot be known: sharded, FP8, experts, GPU
    canary: Group | None
    servers: int = 1  # that hold the weights
    seconds: Mapping[str, float] = field(default_factory=dict)  # of the parts of the sync


class Digests:
    """Digests that the engine's tensors must have, taken while the weights stream by.

    The digest is SGLang's for CPU tensors: 16 hex digits of the SHA-256 of the raw bytes. Parts of
    a fused matrix are hashed one after the other; one that comes too early is copied aside.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        """``dtype``: that of unsharded CPU servers; None if only names can be known, not values."""
        self.dtype = dtype
        self._digests: dict[str, str | None] = {}
        self._partial: dict[str, _Parts] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if _is_expert(name) or name.endswith(SCALES):
            return
        engine_name, index, count = _place(name)
        parts = self._partial.setdefault(engine_name, _Parts(count))
        known = tensor.dtype == self.dtype
        parts.add(index, tensor.detach() if known else None, pad=name.endswith(VOCABULARY))
        if parts.complete:
            self._digests[engine_name] = parts.digest()
            del self._partial[engine_name]

    def result(self) -> dict[str, str | None]:
        """Engine tensor name -> digest, None where only the name is known."""
        if self._partial:
            raise RuntimeError(
                f"the weights that were sent lack parts of {some_of(self._partial)}: all of "
                f"{sorted(FUSED)} must be among policy.weights(), for the engine fuses them"
            )
        return self._digests


class _Parts:
    """The running hash of one engine tensor."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._next = 0
        self._early: dict[int, torch.Tensor | None] = {}
        self._hash = hashlib.sha256()
        self._known = True

    def add(self, index: int, part: torch.Tensor | None, *, pad: bool) -> None:
        # A copy: the trainer may reuse the memory once we have returned.
        self._early[index] = part.clone() if part is not None and index > self._next else part
        while self._next in self._early:
            tensor = self._early.pop(self._next)
            self._next += 1
            self._known &= tensor is not None
            if tensor is not None:
                self._update(tensor, pad)

    def _update(self, tensor: torch.Tensor, pad: bool) -> None:
        raw = tensor.cpu().contiguous().view(-1).view(torch.uint8)
        self._hash.update(raw.numpy().data)
        if pad:
            rows = -len(tensor) % VOCABULARY_MULTIPLE
            self._hash.update(bytes(rows * raw.numel() // len(tensor)))

    @property
    def complete(self) -> bool:
        return self._next == self._count

    def digest(self) -> str | None:
        return self._hash.hexdigest()[:16] if self._known else None


def compare(
    expected: Mapping[str, str | None] | None, held: Mapping[str, Sequence[Mapping[str, str]]]
) -> tuple[int, int]:
    """Hold the engines' digests against each other and against what was sent.

    ``held``: for each server the digests of each of its ranks. ``expected`` is None if not even
    names can be known. Returns (verified, unverified) engine tensors; raises RuntimeError on a
    difference.
    """
    first, *others = held
    problems = [
        f"{url} holds other values than {first} of {some_of(names)}"
        for url in others
        if len(held[url]) == len(held[first]) and (names := _differing(held[first], held[url]))
    ]
    names = {name for ranks in held.values() for rank in ranks for name in rank}
    if expected is None:
        expected = dict.fromkeys(names)
    known = {name: digest for name, digest in expected.items() if digest is not None}
    for url, ranks in held.items():
        theirs = {name for rank in ranks for name in rank if not _is_expert(name)}
        for what, which in {
            "holds other values than were sent of": unequal(known, ranks),
            "has no tensor called": expected.keys() - theirs,
            "was never sent": theirs - expected.keys(),
        }.items():
            if which:
                problems.append(f"{url} {what} {some_of(which)}")
    if problems:
        raise RuntimeError(
            "the weights that the servers hold are not the ones that were sent: "
            + "; ".join(problems)
            + ". Generation stays paused. Compare the names and the order of parts of "
            "policy.weights() with the HF checkpoint's; if the engine stores this model in another "
            "form than was assumed, set rollout.proof=canary"
        )
    return len(known), len(names - known.keys())


def unequal(known: Mapping[str, str], ranks: Sequence[Mapping[str, str]]) -> set[str]:
    """The tensors of which the ranks of a server hold another digest than the one that is known."""
    return {n for rank in ranks for n in rank.keys() & known.keys() if rank[n] != known[n]}


def canary_tokens(vocab_size: int) -> np.ndarray:
    """A fixed token sequence, [CANARY_TOKENS] int32: enough to meet every weight matrix."""
    return np.random.default_rng(0).integers(vocab_size, size=CANARY_TOKENS, dtype=np.int32)


def canary_group(
    tokens: np.ndarray,
    scores: Sequence[np.ndarray],
    version: int,
    experts: Sequence[np.ndarray | None] | None = None,
) -> Group:
    """The servers' scores of the canary, [CANARY_TOKENS - 1] each, as a group of one rollout per
    server, with the experts that its tokens went to there."""
    spans = ((version, 0, len(tokens) - 1),)
    pairs = zip(scores, experts or [None] * len(scores), strict=True)
    rollouts = tuple(
        Rollout(tokens[1:], logprobs, spans, finish="length", text="", experts=chosen)
        for logprobs, chosen in pairs
    )
    return Group("canary", Prompt("canary", tokens[:1], text="", answer=""), rollouts)


def _place(name: str) -> tuple[str, int, int]:
    """Engine tensor that a checkpoint tensor goes into, its position there, number of parts."""
    head, _, leaf = name.rpartition(".")
    stem, _, module = head.rpartition(".")
    fused, index, count = FUSED.get(module, (module, 0, 1))
    return (f"{stem}.{fused}.{leaf}" if stem else name), index, count


def _is_expert(name: str) -> bool:
    """Routed experts, whose layout in the engine depends on its kernels; and draft models."""
    return ".experts." in name or name.startswith("draft")


def _differing(one: Sequence[Mapping[str, str]], other: Sequence[Mapping[str, str]]) -> set[str]:
    pairs = zip(one, other, strict=True)
    return {n for a, b in pairs for n in a.keys() | b.keys() if a.get(n) != b.get(n)}
