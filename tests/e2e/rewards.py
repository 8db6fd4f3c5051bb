"""Rewards for runs of random models, which no right answer would ever reward."""

import os
import time
from pathlib import Path

from peergrad.data import Prompt, Rollout

HOLD = "PEERGRAD_TEST_HOLD"
"""Folder in which a file ``hold-train`` or ``hold-test`` makes rewards of that split wait."""


def even(prompt: Prompt, rollout: Rollout) -> float:
    """The share of even token ids: peers differ, so that every step has a gradient."""
    split = prompt.id.partition("-")[0]
    folder = Path(os.environ[HOLD]) if HOLD in os.environ else None
    if folder and (folder / f"hold-{split}").exists():
        (folder / f"held-{split}").touch()
        time.sleep(600)
    return float((rollout.tokens % 2 == 0).mean())


def first_fits(prompt: Prompt, rollout: Rollout) -> float:
    """1 if the first token's id is a multiple of four, else 0: right or wrong, as answers to sums
    are, and of four peers nearly always wrong in one group of three."""
    return float(rollout.tokens[0] % 4 == 0)
