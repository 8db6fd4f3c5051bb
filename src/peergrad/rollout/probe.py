"""What external servers are, found out before anything is loaded or changed.

Every question is one that a server answers without generating: its model, its limits, its version
of SGLang, and whose weights it carries. No torch here, and a few seconds in all.
"""

import json
import logging
import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

from peergrad.config import Config, ServerMode, require
from peergrad.config.rollout import HARMFUL, ONE, flag, host_and_port
from peergrad.rollout.arrival import NotThereYet, Waiting, gather
from peergrad.rollout.claim import refuse_foreign
from peergrad.rollout.errors import ServerError, may_come, quote, reason
from peergrad.rollout.form import (
    BLOCKS_QUESTION,
    CHECKSUM,
    check_form,
    names_of_blocks,
    tensor_names,
)
from peergrad.rollout.reply import Reply
from peergrad.running.environment import NCCL, forced_by, settings

T = TypeVar("T")
log = logging.getLogger(__name__)

KEY = "rollout.servers.urls"
SECONDS = 5.0  # per question
LOADING = (502, 503, 504)  # of a server that is not ready, or of a proxy before one
NEEDED_VERSION = "0.5.21"  # the first with begin_weight_update
# Refused by every server before it schedules anything; the refusal tells the vocabulary's size. A
# token id out of range among the inputs would end the server.
VOCABULARY_QUESTION = {
    "input_ids": [0],
    "sampling_params": {"max_new_tokens": 0, "logit_bias": {"-1": 0.0}},
}


@dataclass(frozen=True)
class ServerFacts:
    """One server. None: it does not tell.

    Example:
        ``ServerFacts(url="http://node7:30000", sglang="0.5.23", weight_version="default",
        model_path="/models/qwen", model_type="qwen3", architectures=("Qwen3ForCausalLM",),
        vocab_size=151936, layers=28, dtype="bfloat16", context=40960, tensor=1,
        warnings=("computes in bfloat16, model.dtype = float32",))``
    """

    url: str
    sglang: str
    weight_version: str
    model_path: str | None
    model_type: str | None
    architectures: tuple[str, ...]
    vocab_size: int | None
    layers: int | None
    dtype: str | None
    context: int | None  # tokens of prompt and answer
    tensor: int  # ranks: tensor-parallel size
    warnings: tuple[str, ...] = ()  # what may be meant, and is worth saying


def probe(
    config: Config, identity: str | None = None, *, waiting: Waiting | None = None
) -> list[ServerFacts]:
    """Ask every external server what it is; [] if the run has none. Changes nothing.

    ``identity``: that of this run; None if it has none yet. ``waiting``: what says that there is
    something to wait for, as ``Screen.waiting`` does; with None nobody is waited for. Raises
    ValueError with one line for the first server that this run cannot use, or for those that are
    not there. Warnings go to the log, too.
    """
    servers = config.rollout.servers
    if servers.mode is not ServerMode.external or config.rollout.replay is not None:
        return []
    model = json.loads((Path(config.model.path) / "config.json").read_text())
    seconds = 0.0 if waiting is None else servers.wait

    def examine(url: str) -> tuple[_Answers, ServerFacts]:
        answer = _ask(url, starting=seconds > 0)
        version = str(answer.model["weight_version"])
        _check_kind(answer)
        tensors, blocks = answer.tensors, answer.blocks
        check_form(url, answer.info, servers, tensors=tensors, blocks=blocks)
        refuse_foreign(url, version, identity, takeover=servers.takeover)
        facts = _facts(answer, config)
        _check_model(facts, config, model)
        _check_context(facts, answer.info, config)
        return answer, facts

    found = gather(examine, servers.urls, seconds=seconds, waiting=waiting)
    _refuse_twins([answer for answer, _ in found])
    for answer, facts in found:
        for text in facts.warnings:
            log.warning("%s: %s", answer.url, text)
    return [facts for _, facts in found]


@dataclass(frozen=True)
class _Answers:
    url: str
    model: dict[str, Any]  # /model_info
    info: dict[str, Any]  # /server_info
    context: int | None  # /v1/models
    vocab_size: int | None
    tensors: set[str] | None  # names of those that it holds
    blocks: set[str] | None  # of those, the matrices in FP8 blocks
    updatable: bool  # there is a /begin_weight_update


def _ask(url: str, *, starting: bool) -> _Answers:
    """All questions to one server. ValueError if it is none, or none of ours; NotThereYet if it may
    still become one. ``starting``: ask for that, too, which may take a second."""
    with httpx.Client(timeout=SECONDS, trust_env=False) as http:

        def ask(question: Mapping[str, Any]) -> dict[str, Any]:
            answer: dict[str, Any] = http.post(f"{url}/weights_checker", json=question).json()
            return answer

        # SGLang answers other questions while it warms up. One that is paused gives no answer.
        if starting and _optional(lambda: http.get(f"{url}/health").status_code) == 503:
            raise _not_yet(url, "is still starting", "see its log")
        model = _get(http, url, "/model_info")
        info = _get(http, url, "/server_info")
        # A route that exists for POST alone answers 405; one that is not there 404.
        updatable = _optional(lambda: http.get(f"{url}/begin_weight_update").status_code) != 404
        return _Answers(
            url,
            model,
            info,
            _optional(lambda: _context(http, url)),
            _optional(lambda: _vocabulary(http, url)),
            _optional(lambda: tensor_names(ask(CHECKSUM))) if updatable else None,
            _optional(lambda: names_of_blocks(ask(BLOCKS_QUESTION))) if updatable else None,
            updatable,
        )


def _get(http: httpx.Client, url: str, path: str) -> dict[str, Any]:
    try:
        response = http.get(url + path)
    except httpx.RequestError as error:
        late = isinstance(error, httpx.ReadTimeout)
        rule = f"no answer within {SECONDS:g} s" if late else f"cannot be reached ({reason(error)})"
        remedy = "start the server, or correct the address"
        not_yet = _not_yet(url, rule, remedy, reason(error))
        raise (not_yet if may_come(error) else ValueError(str(not_yet))) from error
    require(
        response.status_code not in (401, 403),
        KEY,
        url,
        f"asks for a key ({response.status_code})",
        "start the server without --api-key: peergrad sends none",
    )
    if response.status_code == 404:
        old = _optional(lambda: http.get(f"{url}/get_server_info").json()["version"])
        what = f"SGLang {old}, too old" if old else f"no SGLang server of {NEEDED_VERSION} or later"
        rule = f"has no {path}, so it is {what}"
        remedy = f"name SGLang workers of {NEEDED_VERSION} or later, not a router"
        require(False, KEY, url, rule, remedy)
    try:
        answer = Reply(url, path, response.status_code, response.content).checked().json()
    except ServerError as error:
        rule = f"is no SGLang server, or not well ({quote(str(error))})"
        not_yet = _not_yet(url, rule, "see its log", f"answers {response.status_code}")
        loading = response.status_code in LOADING
        raise (not_yet if loading else ValueError(str(not_yet))) from error
    require(
        isinstance(answer, dict) and (path != "/model_info" or "weight_version" in answer),
        KEY,
        url,
        f"answers {path} otherwise than SGLang",
        f"name servers of SGLang {NEEDED_VERSION} or later",
    )
    found: dict[str, Any] = answer
    return found


def _not_yet(url: str, rule: str, remedy: str, why: str = "") -> NotThereYet:
    return NotThereYet(f"{KEY} = {url!r}: {rule}; {remedy}", url, why or rule)


def _optional(question: Callable[[], T]) -> T | None:
    """What a paused or older server may leave unanswered."""
    try:
        return question()
    except (httpx.RequestError, LookupError, TypeError, ValueError):
        return None


def _context(http: httpx.Client, url: str) -> int:
    return int(http.get(f"{url}/v1/models").json()["data"][0]["max_model_len"])


def _vocabulary(http: httpx.Client, url: str) -> int | None:
    response = http.post(f"{url}/generate", json=VOCABULARY_QUESTION)
    found = re.search(r"logit_bias.*\[0, (\d+)\]", response.text)
    return int(found[1]) + 1 if response.status_code == 400 and found else None


def _layers(names: Iterable[str]) -> int | None:
    found = [re.search(r"\.layers\.(\d+)\.", name) for name in names]
    return max((int(match[1]) + 1 for match in found if match), default=None)


def _facts(answer: _Answers, config: Config) -> ServerFacts:
    info, model = answer.info, answer.model
    dtype, wanted = info.get("dtype"), config.model.dtype.name
    warnings = []
    if dtype in ("float32", "float16", "bfloat16") and dtype != wanted:
        warnings.append(f"computes in {dtype}, model.dtype = {wanted}: logprobs will differ more")
    if info.get("quantization") or answer.blocks:
        kind = info.get("quantization") or "fp8"
        warnings.append(f"quantizes weights ({kind}): logprobs will differ more")
    if (unknown := _check_nccl(answer, config)) is not None:
        warnings.append(unknown)
    return ServerFacts(
        url=answer.url,
        sglang=str(info.get("version", "unknown")),
        weight_version=str(model["weight_version"]),
        model_path=model.get("model_path"),
        model_type=model.get("model_type"),
        architectures=tuple(model.get("architectures") or ()),
        vocab_size=answer.vocab_size,
        layers=_layers(answer.tensors or ()),
        dtype=dtype,
        context=answer.context,
        tensor=int(info.get("tp_size", 1)),
        warnings=tuple(warnings),
    )


def _check_kind(answer: _Answers) -> None:
    info, url = answer.info, answer.url
    version = info.get("version", "unknown")
    require(
        answer.updatable,
        KEY,
        url,
        f"SGLang {version} has no begin_weight_update",
        f"start it with SGLang {NEEDED_VERSION} or later",
    )
    for option, why in HARMFUL.items():
        value = info.get(option.replace("-", "_"))
        require(not value, KEY, url, why, f"start it without --{option}")
    for name, (why, remedy) in ONE.items():
        size = info.get(name, 1)
        require(size == 1, KEY, url, f"has {name} = {size}, {why}", remedy)


def _check_nccl(answer: _Answers, config: Config) -> str | None:
    """What cannot be known of NCCL's variables there; ValueError if they are not the trainer's. A
    server tells its options, not its environment."""
    options = {flag(name): value for name, value in answer.info.items()}
    unknown = []
    for name in NCCL if options.get("device") == "cuda" else ():
        ours = os.environ.get(name, settings(config)[name])
        option = forced_by(name, options)
        rule = f"has --{option}, with which SGLang sets {name}=1, and this run has {ours}"
        remedy = f"set {name}=1 for all ranks: NCCL needs one value on both sides"
        require(option is None or ours == "1", KEY, answer.url, rule, remedy)
        if option is None and ours != "0":
            unknown.append(f"{name}={ours}")
    if not unknown:
        return None
    return f"must have been started with {' '.join(unknown)}, as this run: it does not tell"


def _check_model(facts: ServerFacts, config: Config, model: Mapping[str, Any]) -> None:
    ours = {
        "model_type": model.get("model_type"),
        "architectures": tuple(model.get("architectures") or ()),
        "vocab_size": model.get("vocab_size"),
        "num_hidden_layers": model.get("num_hidden_layers"),
    }
    theirs = {
        "model_type": facts.model_type,
        "architectures": facts.architectures,
        "vocab_size": facts.vocab_size,
        "num_hidden_layers": facts.layers,
    }
    for name, value in ours.items():
        other = theirs[name]
        require(
            not value or not other or value == other,
            KEY,
            facts.url,
            f"serves another model ({facts.model_path}) than model.path = {config.model.path!r}: "
            f"{name} {_plain(other)}, not {_plain(value)}",
            "start it with the run's model, or correct model.path",
        )


def _plain(value: object) -> object:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else value


def _check_context(facts: ServerFacts, info: Mapping[str, Any], config: Config) -> None:
    prompt, answer = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    limits = [
        size for size in (facts.context, info.get("max_total_num_tokens")) if isinstance(size, int)
    ]
    shortest = min(limits, default=prompt + answer)
    require(
        prompt + answer <= shortest,
        KEY,
        facts.url,
        f"has room for {shortest} tokens, but data.max_prompt_tokens + rollout.max_new_tokens = "
        f"{prompt} + {answer}",
        "lower one of the two, or start it with a larger --context-length or --max-total-tokens",
    )


def _refuse_twins(answers: Sequence[_Answers]) -> None:
    """Two names of one server: it would join the weight sync twice, and hang."""
    seen: dict[object, str] = {}
    for answer in answers:
        for mark in _marks(answer):
            other = seen.setdefault(mark, answer.url)
            require(
                other == answer.url,
                KEY,
                answer.url,
                f"is the same server as {other}",
                "name every server once",
            )


def _marks(answer: _Answers) -> list[object]:
    """What no two servers share: where its name leads, and how long its start took."""
    try:
        found = socket.getaddrinfo(*host_and_port(answer.url), type=socket.SOCK_STREAM)
    except OSError:
        found = []
    marks: list[object] = [("address", *info[4][:2]) for info in found]
    start = answer.info.get("startup_time")
    if isinstance(start, dict) and start.get("tokenizer_e2e"):
        marks.append(("start", answer.info.get("port"), json.dumps(start, sort_keys=True)))
    return marks
