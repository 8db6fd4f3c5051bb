"""What ``control_plane.py`` compares with: recordings as zstandard-compressed JSON lines, and the
engine's answers read by Python's own JSON reader, token by token."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from peergrad.data import Group, Prompt, Rollout
from peergrad.storage import flush


def write_lines(path: Path, groups: Sequence[Group]) -> None:
    with zstandard.open(path, "wt", encoding="utf-8") as out:
        for group in groups:
            out.write(json.dumps(_to_json(group), ensure_ascii=False) + "\n")
    flush(path)


def read_lines(path: Path) -> list[Group]:
    text = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes()).decode()
    return [_from_json(json.loads(line)) for line in text.split("\n")[:-1]]


def _to_json(group: Group) -> dict[str, Any]:
    prompt = group.prompt
    return {
        "id": group.id,
        "prompt": {
            "id": prompt.id,
            "tokens": prompt.tokens.tolist(),
            "text": prompt.text,
            "answer": prompt.answer,
            "extra": prompt.extra,
        },
        "rollouts": [
            {
                "tokens": r.tokens.tolist(),
                # float32 -> shortest decimal that reads back to the same float32
                "logprobs": [float(str(x)) for x in r.logprobs],
                "versions": r.versions,
                "finish": r.finish,
                "text": r.text,
                "reward": r.reward,
            }
            for r in group.rollouts
        ],
    }


def _from_json(record: dict[str, Any]) -> Group:
    prompt = record["prompt"]
    rollouts = tuple(
        Rollout(
            tokens=np.array(r["tokens"], np.int32),
            logprobs=np.array(r["logprobs"], np.float32),
            versions=tuple((v[0], v[1], v[2]) for v in r["versions"]),
            finish=r["finish"],
            text=r["text"],
            reward=r["reward"],
        )
        for r in record["rollouts"]
    )
    prompt = Prompt(**{**prompt, "tokens": np.array(prompt["tokens"], np.int32)})
    return Group(record["id"], prompt, rollouts)


def parse_one_by_one(content: bytes) -> list[Rollout]:
    """The rollouts in the body of an answer to /generate."""
    return [_parse(answer) for answer in json.loads(content)]


def _parse(answer: Any) -> Rollout:
    meta = answer["meta_info"]
    scored = meta["output_token_logprobs"]
    tokens = np.array([token for _, token, _ in scored], np.int32)
    if tokens.tolist() != answer["output_ids"]:
        raise ValueError("tokens and logprobs are not of each other")
    return Rollout(
        tokens=tokens,
        logprobs=np.array([float(logprob) for logprob, _, _ in scored], np.float32),
        versions=tuple(
            (int(span["version"]), int(span["start"]), int(span["end"]))
            for span in meta["weight_versions"]
        ),
        finish=meta["finish_reason"]["type"],
        text=answer.get("text") or "",
    )
