"""What a server holds the layers' matrices in, and whether it is what it is to be sent.

SGLang casts what it is sent to what it holds without a word, so bfloat16 numbers for FP8 codes
without new scales would be another model; and one that has made codes of a bfloat16 checkpoint by
itself cannot take new weights at all.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peergrad.config import Fp8Serving, ServersConfig, require
from peergrad.config.fp8 import FP8_BLOCK
from peergrad.config.rollout import Fp8Scales
from peergrad.rollout.errors import some_of
from peergrad.rollout.requests import Json

CHECKSUM = {"action": "checksum"}
BLOCKS_QUESTION = {**CHECKSUM, "skip_tensor_list": ["."]}
"""Leaves out every tensor but the matrices in FP8 blocks: SGLang puts these together with their
scales before it looks at what to leave out."""
MATRIX = re.compile(r".*\.((qkv|o|gate_up|down)_proj\.weight|experts\.w(13|2)_weight)")
"""The engine's names of those that FP8 servers hold as codes."""
HELD = {
    Fp8Serving.off: "no FP8",
    Fp8Serving.block: "matrices in FP8 blocks",
    Fp8Serving.flash_rl: "matrices in FP8 by flash_rl",
}
START = {
    Fp8Serving.off: "on the model itself",
    Fp8Serving.block: "on what python tools/quantize_fp8.py makes of the model",
    Fp8Serving.flash_rl: "with --quantization fp8 --load-format flash_rl",
}


def tensor_names(answer: Json) -> set[str]:
    """Those that an answer to /weights_checker tells a digest of, without draft models'."""
    names = {str(name) for rank in answer["ranks"] for name in rank["checksums"]}
    return {name for name in names if not name.startswith("draft")}


def names_of_blocks(answer: Json) -> set[str] | None:
    """Those in an answer to ``BLOCKS_QUESTION``; None of a SGLang that leaves nothing out."""
    names = tensor_names(answer)
    return None if any("embed_tokens" in name for name in names) else names


def check_form(
    url: str,
    info: Mapping[str, Any],
    servers: ServersConfig,
    *,
    tensors: set[str] | None,
    blocks: set[str] | None,
) -> None:
    """Raise ValueError unless the server at ``url`` holds what ``rollout.servers.fp8`` says.

    ``info``: /server_info. ``tensors``: the names of all that it holds, ``blocks`` of those in FP8
    blocks; None: it does not tell, and is taken at its word.
    """
    key, said = "rollout.servers.urls", info.get("quantization")
    flash = info.get("load_format") == "flash_rl"
    told = _model_config(str(info.get("model_path")))
    trusted = blocks is None and servers.fp8 is Fp8Serving.block
    trusted = trusted and (told is None or "quantization_config" in told)
    itself = said == "fp8" and not (flash or blocks or trusted)
    rule = "makes FP8 codes of a bfloat16 checkpoint by itself, which SGLang cannot update"
    ways = [f"{START[way]} (rollout.servers.fp8={way.name})" for way in list(Fp8Serving)[1:]]
    require(not itself, key, url, rule, f"start it {' or '.join(ways)}")
    held = Fp8Serving.flash_rl if flash else Fp8Serving.off
    if blocks or (trusted and not flash):
        held = Fp8Serving.block
    rule = f"holds {HELD[held]}, and is to be sent {HELD[servers.fp8]}"
    remedy = f"set rollout.servers.fp8={held.name}, or start it {START[servers.fp8]}"
    require(held is servers.fp8, key, url, rule, remedy)
    if held is not Fp8Serving.block:
        return
    if tensors is not None and blocks is not None:
        apart = {name for name in tensors if MATRIX.fullmatch(name)} ^ blocks
        rule = "holds others of its matrices in FP8 than it is to be sent: not alike are "
        require(not apart, key, url, rule + some_of(apart), f"start it {START[held]}")
    _check_scales(url, str(info.get("model_path")), told, servers.fp8_scales)


def _model_config(path: str) -> dict[str, Any] | None:
    """config.json of a server's model; None: it cannot be read here."""
    try:
        found = json.loads((Path(path) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _check_scales(url: str, path: str, told: dict[str, Any] | None, scales: Fp8Scales) -> None:
    """As far as the server's model folder can be read here."""
    try:
        found = (told or {})["quantization_config"]
        size, form = found["weight_block_size"], found.get("scale_fmt")
    except (LookupError, TypeError, AttributeError):
        return
    key, start = "rollout.servers.urls", f"start it {START[Fp8Serving.block]}"
    block = [FP8_BLOCK, FP8_BLOCK]
    require(size == block, key, url, f"has FP8 blocks of {size} in {path}, not {block}", start)
    theirs = Fp8Scales.power_of_two if form == "ue8m0" else Fp8Scales.float32
    rule = f"has scales of kind {theirs.name} in {path}, and is to be sent {scales.name}"
    remedy = f"set rollout.servers.fp8_scales={theirs.name}, or {start}"
    require(theirs is scales, key, url, rule, remedy)
