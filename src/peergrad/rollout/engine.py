"""What the rest of the package asks of a rollout engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from peergrad.data import Rollout


@dataclass(frozen=True, kw_only=True)
class Routes:
    """Which experts each token of a mixture of experts went to, to be told with the answer.

    Example:
        of Qwen3-30B-A3B: ``Routes(layers=48, chosen=8, experts=128, required=False)``
    """

    layers: int
    chosen: int  # of each token
    experts: int  # in each layer
    required: bool  # whether an answer without is an error


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn. Nothing is truncated: logprobs stay those of the full vocabulary.

    Example:
        ``Sampling(n=8, temperature=1.0, max_new_tokens=512, stop_token_ids=(1,))``
    """

    n: int  # answers per prompt
    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy
    stop_token_ids: tuple[int, ...] = ()
    routes: Routes | None = None  # None: they are not asked for


class Engine(Protocol):
    """Draws and scores token sequences. Calls may overlap; weights may change in between."""

    async def generate(
        self, prompt_tokens: Sequence[int] | np.ndarray, sampling: Sampling, *, request_id: str
    ) -> list[Rollout]:
        """``sampling.n`` finished rollouts of one prompt; none of them is aborted."""
        ...

    async def score(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Log probabilities of ``tokens[1:]`` at temperature 1, [T - 1] float32."""
        ...

    async def abort(self) -> None:
        """End every running request early; a waiting ``generate`` samples again."""
        ...

    async def aclose(self) -> None:
        """Release connections. Requests still waiting fail."""
        ...
