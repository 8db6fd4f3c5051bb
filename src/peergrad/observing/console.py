"""Live progress for a person: a table in a terminal, one line a step in a log file."""

from collections import deque

from rich.console import Console
from rich.live import Live
from rich.table import Table

from peergrad.observing.metrics import Row

COLUMNS = {  # heading -> (metric, format)
    "reward": ("reward/mean", ".3f"),
    "length": ("response/length", ".1f"),
    "KL": ("policy/kl", ".4f"),
    "entropy": ("policy/entropy", ".3f"),
    "gap": ("logprob_gap/max", ".1e"),
    "grad": ("optim/grad_norm", ".2f"),
    "tok/s": ("tokens/per_second", ".0f"),
    "rollout s": ("time/rollout", ".2f"),
    "train s": ("time/update", ".2f"),
    "sync s": ("time/sync", ".2f"),
    "step s": ("time/step", ".2f"),
}
SHOWN = 12


class ConsoleSink:
    """Shows the last steps; evaluations appear as lines of their own."""

    def __init__(self, steps: int) -> None:
        self._console = Console()
        self._steps = steps
        self._rows: deque[tuple[str, ...]] = deque(maxlen=SHOWN)
        self._live = (
            Live(console=self._console, refresh_per_second=4) if self._console.is_terminal else None
        )
        if self._live:
            self._live.start()

    def write(self, kind: str, step: int, row: Row) -> None:
        if kind == "eval":
            numbers = "  ".join(f"{key} {value:.3f}" for key, value in row.items())
            self._console.print(
                f"evaluation after step {step}: {numbers}", highlight=False, soft_wrap=True
            )
            return
        cells = [format(row[key], form) if key in row else "-" for key, form in COLUMNS.values()]
        if self._live:
            self._rows.append((f"{step}/{self._steps}", *cells))
            self._live.update(self._table())
        else:
            text = "  ".join(f"{name} {cell}" for name, cell in zip(COLUMNS, cells, strict=True))
            self._console.print(
                f"step {step}/{self._steps}  {text}", highlight=False, soft_wrap=True
            )

    def _table(self) -> Table:
        table = Table("step", *COLUMNS, box=None, pad_edge=False)
        for row in self._rows:
            table.add_row(*row)
        return table

    def close(self) -> None:
        if self._live:
            self._live.stop()
