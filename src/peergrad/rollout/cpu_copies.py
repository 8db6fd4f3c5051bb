"""Equal prompts of one step of a CPU server, computed once.

The answers of a group are as many requests with one prompt. SGLang shares what an earlier step has
left in the prefix cache; prompts that it takes in together it computes one by one. Here only the
first of equal ones passes through the layers. Its keys and values are written for the others too,
and its hidden states are theirs: the very numbers that they would have had.

Letters: R requests, T tokens of the step, U of them that are computed.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Copies:
    """Which requests of a step are computed, and where all others find what they have in common.

    Example:
        Of the prompts (5, 9), (7) and (5, 9): ``Copies(requests=[0, 1], rows=[0, 1, 2],
        source=[0, 1, 2, 0, 1])``.
    """

    requests: np.ndarray  # int64: the first of each kind
    rows: torch.Tensor  # int64 [U]: their tokens among those of the step
    source: torch.Tensor  # int64 [T]: for every token of the step, the computed one that it equals


def find_copies(tokens: np.ndarray, prefix: np.ndarray, fresh: np.ndarray) -> Copies | None:
    """None if all requests differ. One with something in the cache is no copy, whatever is new.

    ``tokens``: int [T], the new ones of all requests, one request after another; ``prefix``,
    ``fresh``: int64 [R], how many tokens of each are in the cache and how many are new.
    """
    ends = np.cumsum(fresh)
    begins = ends - fresh
    known: dict[bytes, int] = {}
    first = np.arange(len(fresh))
    for request in np.flatnonzero(prefix == 0).tolist():
        prompt = tokens[begins[request] : ends[request]].tobytes()
        first[request] = known.setdefault(prompt, request)
    computed = first == np.arange(len(fresh))
    if computed.all():
        return None
    places = np.cumsum(np.where(computed, fresh, 0)) - fresh  # of those that are computed
    within = np.arange(ends[-1]) - np.repeat(begins, fresh)
    return Copies(
        requests=np.flatnonzero(computed),
        rows=torch.from_numpy(np.flatnonzero(np.repeat(computed, fresh))),
        source=torch.from_numpy(np.repeat(places[first], fresh) + within),
    )
