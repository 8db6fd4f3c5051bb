"""What servers say of the weights that they hold, and what can be known of these before."""

from collections.abc import Sequence

import torch

from peergrad.config import Fp8Serving
from peergrad.config.rollout import ONE
from peergrad.rollout.control import Control
from peergrad.rollout.errors import ServerError
from peergrad.rollout.proof import Digests
from peergrad.rollout.requests import Json

NEEDED_INFO = ("tp_size", "pp_size", "device", "dtype", "quantization")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def server_infos(control: Control) -> list[Json]:
    """/server_info of every server, with ``NEEDED_INFO`` in it; ServerError for one whose ranks
    are not those that the weight sync counts."""
    infos = control.get("/server_info")
    for url, info in zip(control.urls, infos, strict=True):
        if missing := [name for name in NEEDED_INFO if name not in info]:
            raise ServerError(
                f"{url}: /server_info tells no {missing[0]}; use SGLang 0.5.21 or later, "
                "and name the workers themselves, not a router",
                url=url,
            )
        for name, (why, remedy) in ONE.items():
            if (size := info.get(name, 1)) != 1:
                raise ServerError(f"{url}: has {name} = {size}, {why}; {remedy}", url=url)
    return infos


def new_digests(infos: Sequence[Json], fp8: Fp8Serving) -> Digests | None:
    """What takes the digests that tensors must have on these servers; None if not even the names of
    the engine's tensors can be known.

    Of FP8 codes SGLang tells one digest for each matrix: that of codes times scales in bfloat16, as
    their GPU hashes it. With ``flash_rl`` it makes further tensors, and how many depends on the
    GPU.
    """
    if fp8 is Fp8Serving.block:
        return Digests(None)
    if fp8 is Fp8Serving.flash_rl or any(info["quantization"] for info in infos):
        return None
    known = all(i["device"] == "cpu" and i["tp_size"] == 1 for i in infos)
    dtypes = {info["dtype"] for info in infos}
    return Digests(DTYPES.get(dtypes.pop()) if known and len(dtypes) == 1 else None)


def checksums(control: Control) -> dict[str, list[dict[str, str]]]:
    """For each server the digests that each of its ranks holds, by the engine's names."""
    answers = control.post("/weights_checker", {"action": "checksum"})
    return {url: _of_ranks(url, a) for url, a in zip(control.urls, answers, strict=True)}


def _of_ranks(url: str, answer: Json) -> list[dict[str, str]]:
    try:
        return [dict(rank["checksums"]) for rank in answer["ranks"]]
    except (LookupError, TypeError, ValueError) as error:
        raise ServerError(
            f"{url}: answered /weights_checker in another form than SGLang's; use the SGLang that "
            "peergrad pins, or set rollout.proof=canary",
            url=url,
        ) from error
