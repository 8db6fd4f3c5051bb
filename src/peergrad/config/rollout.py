"""How answers are sampled, by which servers, and how weights reach them."""

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

from peergrad.config.rules import at_least, optional_positive, positive, require, seconds

ServerMode = Enum("ServerMode", ["managed", "external"])
Proof = Enum("Proof", ["auto", "canary", "off"])
OnGap = Enum("OnGap", ["warn", "stop"])
Fp8Serving = Enum("Fp8Serving", ["off", "block", "flash_rl"])
Fp8Scales = Enum("Fp8Scales", ["power_of_two", "float32"])

GREEDY = 1e-3
"""Temperature below which sampling is no sampling: logits divided by it overflow or, in the engine,
become an argmax."""


OURS = {
    **dict.fromkeys(("model", "model-path"), "set model.path"),
    **dict.fromkeys(("tp", "tp-size", "tensor-parallel-size"), "set rollout.servers.tensor"),
    "dtype": "set model.dtype",
    "quantization": "set rollout.servers.fp8",
    **dict.fromkeys(("host", "port", "weight-version"), "remove it"),
}
"""Options of SGLang that peergrad sets, with all their spellings, and how a user sets them. The
command line of a managed server may set these and nothing else over the user's head."""
HARMFUL = {
    "enable-deterministic-inference": "seeds all requests alike, so groups are copies",
    "is-embedding": "does not generate",
    "allow-auto-truncate": "answers what it has left of a prompt that is too long",
    "preferred-sampling-params": "may draw from another distribution than the trainer's",
}
"""Options of SGLang that would break training, and why, whoever starts the server."""
ONE = {
    "dp_size": (
        "with which SGLang takes no weight updates",
        "start one server for each replica",
    ),
    "pp_size": (
        "whose stages would all take the same places in weight updates, and wait for ever",
        "start it with --tp-size alone",
    ),
}
"""Sizes of a server, as it tells them, that must be 1, why, and what to do. Ranks that share
experts or contexts are among the ``tp_size`` that join."""
REFUSED = {
    **HARMFUL,
    **dict.fromkeys(
        ("dp", "dp-size", "data-parallel-size"), "cannot take weight updates in SGLang"
    ),
    **dict.fromkeys(
        ("pp", "pp-size", "pipeline-parallel-size"),
        "cannot take weight updates with SGLang's stages",
    ),
    **dict.fromkeys(("api-key", "admin-api-key"), "locks peergrad out, which sends no key"),
    "config": "reads further options, which nobody would check",
}
"""Options that a managed server must not have."""


@dataclass(kw_only=True)
class ServersConfig:
    mode: ServerMode = ServerMode.managed
    """``managed`` starts and stops SGLang servers beside rank 0; ``external`` uses ``urls``."""
    urls: list[str] = field(default_factory=list)
    """Base URLs of external servers (the workers themselves, not a router)."""
    wait: float = 0.0
    """Seconds that a run waits for external servers which are not there yet, as when
    ``peergrad.serve`` is started beside it; 0: one that is not there is an error at once. A check
    waits for nobody."""
    lost_after: float = 60.0
    """Seconds that a server may be out of reach before the run goes on without it, on those that
    are left. One that ends is gone at once where the run has started it."""
    takeover: bool = False
    """Take external servers that carry the weights of another run. Only if that run is dead: one
    that ends by itself, also by an error or Ctrl-C, leaves its servers free."""
    count: int = 1
    """Managed servers, or those of one ``peergrad.serve``."""
    tensor: int = 1
    """Tensor-parallel size of each server."""
    fp8: Fp8Serving = Fp8Serving.off
    """What servers hold the layers' matrices in: ``off``, model.dtype; ``block``, FP8 codes with a
    scale for each block of 128 x 128, which the trainer makes before it sends them; ``flash_rl``,
    FP8 codes with a scale for each row, which SGLang makes of what it is sent. On GPUs alone."""
    fp8_scales: Fp8Scales = Fp8Scales.power_of_two
    """Of ``fp8=block``: powers of two, as Transformer Engine has them by default, or any number."""
    start_timeout: float = 300.0
    """Seconds until a managed server must be healthy."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further ``sglang serve`` options: ``{mem-fraction-static: 0.8, enable-metrics: true}``."""

    def __post_init__(self) -> None:
        at_least("rollout.servers.count", self.count, 1)
        at_least("rollout.servers.tensor", self.tensor, 1)
        positive("rollout.servers.start_timeout", self.start_timeout, "use 300")
        seconds("rollout.servers.lost_after", self.lost_after, 60)
        external = self.mode is ServerMode.external
        require(
            bool(self.urls) == external,
            "rollout.servers.urls",
            self.urls,
            "is needed with mode=external and only there",
            "list the servers' base URLs, or set rollout.servers.mode=managed",
        )
        require(
            external or not self.takeover,
            "rollout.servers.takeover",
            self.takeover,
            "has no effect with mode=managed, whose servers are the run's own",
            "remove it",
        )
        require(
            external or not self.wait,
            "rollout.servers.wait",
            self.wait,
            "has no effect with mode=managed, whose servers the run starts itself",
            "remove it; how long they may take is rollout.servers.start_timeout",
        )
        if self.wait:
            seconds("rollout.servers.wait", self.wait, 600)
        self.urls = [_base_url(url) for url in self.urls]
        places = [host_and_port(url) for url in self.urls]
        for url, place in zip(self.urls, places, strict=True):
            require(
                places.count(place) == 1,
                "rollout.servers.urls",
                self.urls,
                f"names {url} {places.count(place)} times",
                "name every server once",
            )
        require(
            self.fp8 is Fp8Serving.block or self.fp8_scales is Fp8Scales.power_of_two,
            "rollout.servers.fp8_scales",
            self.fp8_scales.name,
            f"has no effect with rollout.servers.fp8={self.fp8.name}",
            "set that to block, or remove this",
        )
        _check_args(self.args)
        _check_form(self.args, self.fp8)


def _base_url(url: str) -> str:
    """``url`` without its trailing slash; ValueError unless it is scheme, host and perhaps port."""
    key = "rollout.servers.urls"
    sound = bool(url) and not re.search(r"\s", url)
    require(sound, key, url, "has spaces or is empty", "write http://host:port")
    require(
        "://" in url, key, url, "has no scheme", f"write http://{url} (https:// if it speaks TLS)"
    )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        rule = f"cannot be read as a URL ({error})"
        raise ValueError(f"{key} = {url!r}: {rule}; write http://host:port") from error
    scheme, place = parts.scheme, parts.netloc
    require(scheme in ("http", "https"), key, url, "must be http or https", f"write http://{place}")
    require(bool(parts.hostname), key, url, "names no host", "write http://host:port")
    rule = "has a user name; peergrad does not log in"
    require("@" not in place, key, place.rpartition("@")[2], rule, "remove it")
    require(port != 0, key, url, "port 0 is no server's", "write the port that it listens on")
    rest = parts.path.strip("/") or parts.query or parts.fragment
    require(not rest, key, url, "must be a base URL", f"write {scheme}://{place}")
    return f"{scheme}://{place}"


def host_and_port(url: str) -> tuple[str, int]:
    """Of a base URL: what two spellings of one address share."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def flag(key: str) -> str:
    """An option of ``rollout.servers.args`` as the command line spells it, without the dashes."""
    return key.removeprefix("--").replace("_", "-")


def _check_args(args: dict[str, Any]) -> None:
    flags = [flag(key) for key in args]
    for (key, value), name in zip(args.items(), flags, strict=True):
        key = f"rollout.servers.args.{key}"
        option = _meant(name)
        short = "" if option == name else f"is short for {option}, which "
        require(
            option not in OURS, key, value, f"{short}is peergrad's to set", OURS.get(option, "")
        )
        require(option not in REFUSED, key, value, short + REFUSED.get(option, ""), "remove it")
        require(
            flags.count(name) == 1,
            key,
            value,
            f"is there {flags.count(name)} times, spelt with dashes and underscores",
            "keep one",
        )


def _check_form(args: dict[str, Any], fp8: Fp8Serving) -> None:
    """What ``fp8`` says of the weights is not said otherwise."""
    if fp8 is Fp8Serving.off:
        return
    for key, value in args.items():
        rule, name = f"is peergrad's to set with rollout.servers.fp8={fp8.name}", flag(key)
        ours = name.startswith("load-f") and "load-format".startswith(name)
        require(not ours, f"rollout.servers.args.{key}", value, rule, "remove it")
        # Their scales would be random numbers: servers start without weights, and are sent none.
        rule = "needs scales of keys and values, which rollout.servers.fp8=block does not send"
        cache = fp8 is Fp8Serving.block and name.startswith("kv-cache-d") and value != "auto"
        require(not cache, f"rollout.servers.args.{key}", value, rule, "remove it")


def _meant(name: str) -> str:
    """The option that SGLang takes ``name`` for: its parser lets every one be cut short."""
    known = [*OURS, *REFUSED]
    return name if name in known else next((x for x in known if x.startswith(name)), name)


@dataclass(kw_only=True)
class RolloutConfig:
    batch_size: int = 512
    """Rollouts (not prompts) per step."""
    group_size: int = 8
    """Rollouts per prompt."""
    temperature: float = 1.0
    """Sampling temperature; the trainer divides its logits by the same number."""
    top_p: float = 1.0
    """Must be 1: the trainer cannot know the mass that nucleus sampling cuts off."""
    top_k: int = -1
    """Must be -1, for the same reason."""
    max_new_tokens: int = 1024
    """Longest answer, in tokens."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Further token ids that end an answer (the tokenizer's end token always does)."""
    max_staleness: int = 0
    """How many weight versions a rollout may lag: 0 is synchronous on-policy, 1 one step off."""
    max_concurrency: int = 256
    """Groups in flight at a time."""
    request_timeout: float = 600.0
    """Seconds one generation request may take."""
    retries: int = 5
    """Further attempts after a connection error or a 5xx answer."""
    bucket_mb: int = 512
    """Size of one weight-sync broadcast."""
    proof: Proof = Proof.auto
    """After each weight sync: ``auto`` compares the servers' tensor checksums as far as they can be
    known and scores a canary text on both sides; ``canary`` only the latter."""
    max_canary_gap: float | None = None
    """Largest allowed |logprob difference| on the canary text; default: warn above 1e-3 (float32)
    or 0.5 (bfloat16), never stop."""
    max_logprob_gap: float | None = None
    """Largest allowed mean ``|trainer logprob - engine logprob|`` of a step's tokens that were
    sampled with the present weights, or of the freshest if these are too few; default: warn above
    1e-3 (float32) or 0.1 (bfloat16, and tokens that are not of the present weights), and what 8-bit
    products change beside (``parallel.fp8_gap_every``)."""
    on_logprob_gap: OnGap = OnGap.stop
    """What exceeding ``max_logprob_gap`` does; the worst tokens are recorded either way."""
    dump: bool = True
    """Record every step's groups as Parquet under ``rollouts/``."""
    replay: str | None = None
    """Run folder whose recorded groups to train on, without an engine."""
    servers: ServersConfig = field(default_factory=ServersConfig)

    def __post_init__(self) -> None:
        require(
            self.group_size >= 2,
            "rollout.group_size",
            self.group_size,
            "must be at least 2 to compare peers",
            "use 8",
        )
        require(
            self.batch_size > 0 and self.batch_size % self.group_size == 0,
            "rollout.batch_size",
            self.batch_size,
            f"must be a positive multiple of rollout.group_size ({self.group_size})",
            f"use {max(1, round(self.batch_size / self.group_size)) * self.group_size}",
        )
        positive(
            "rollout.temperature",
            self.temperature,
            "use 1.0; greedy sampling belongs to evaluation.temperature",
        )
        require(
            self.temperature >= GREEDY,
            "rollout.temperature",
            self.temperature,
            f"is greedy sampling for the engine below {GREEDY:g}: all peers would be one answer",
            "use 1.0",
        )
        seconds("rollout.request_timeout", self.request_timeout, 600)
        if self.max_canary_gap is not None:
            positive("rollout.max_canary_gap", self.max_canary_gap, "use null for no limit")
        require(
            self.max_canary_gap is None or self.proof is not Proof.off,
            "rollout.max_canary_gap",
            self.max_canary_gap,
            "has no effect with rollout.proof=off: no canary text is scored",
            "set rollout.proof=canary, or remove it",
        )
        optional_positive("rollout.max_logprob_gap", self.max_logprob_gap, "use null for no limit")
        require(
            self.on_logprob_gap is OnGap.stop or self.max_logprob_gap is not None,
            "rollout.on_logprob_gap",
            self.on_logprob_gap.name,
            "has no effect without rollout.max_logprob_gap",
            "set that, or remove this",
        )
        for key, value, full in (("top_p", self.top_p, 1.0), ("top_k", self.top_k, -1)):
            require(
                value == full,
                f"rollout.{key}",
                value,
                "truncated sampling would bias every ratio by the mass it cuts off",
                f"set it to {full}",
            )
        at_least("rollout.max_staleness", self.max_staleness, 0)
        for name in ("max_new_tokens", "max_concurrency", "bucket_mb"):
            at_least(f"rollout.{name}", getattr(self, name), 1)
        at_least("rollout.retries", self.retries, 0)

    @property
    def prompts_per_step(self) -> int:
        return self.batch_size // self.group_size
