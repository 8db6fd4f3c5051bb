"""The numbers of a step as text: a table that fits the screen without cutting a number, a line."""

from collections.abc import Sequence

from peergrad.observing.metrics import Row

COLUMNS = {  # heading -> (metric, format); the first ones stay longest on a narrow screen
    "reward": ("reward/mean", ".3f"),
    "length": ("response/length", ".1f"),
    "flat": ("reward/flat_groups", ".0%"),
    "KL": ("policy/kl", ".4f"),
    "gap": ("logprob_gap/max", ".1e"),
    "grad": ("optim/grad_norm", ".2f"),
    "s/step": ("time/step", ".1f"),
    "failed": ("reward/failed", ".0%"),
    "entropy": ("policy/entropy", ".3f"),
    "lr": ("optim/lr", ".1e"),
    "cut": ("response/truncated", ".0%"),
    "tok/s": ("tokens/per_second", ".0f"),
}
PHASES = ("rollout", "reference", "old_logprobs", "update", "sync")


def cells(row: Row) -> dict[str, str]:
    """Heading -> formatted number, ``-`` where the row has none."""
    return {
        heading: format(row[metric], form) if metric in row else "-"
        for heading, (metric, form) in COLUMNS.items()
    }


def fit(rows: Sequence[dict[str, str]], width: int) -> list[str]:
    """``rows`` (heading -> text, all with the same headings, in order of importance) as lines of at
    most ``width`` columns: whole columns are left out at the end, numbers are never cut. The first
    column always stays."""
    shown: list[tuple[str, int]] = []
    used = -1
    for heading in rows[0]:
        wide = max(len(heading), *(len(row[heading]) for row in rows))
        if shown and used + 1 + wide > width:
            continue
        shown.append((heading, wide))
        used += 1 + wide
    head = {heading: heading for heading, _ in shown}
    return [" ".join(row[heading].rjust(wide) for heading, wide in shown) for row in (head, *rows)]


def phases(row: Row) -> str:
    """``rollout 5.0, update 1.4, sync 1.5``: seconds of the phases that took a tenth or more."""
    taken = [(phase, row.get(f"time/{phase}", 0.0)) for phase in PHASES]
    return ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in taken if seconds >= 0.05)


def duration(seconds: float) -> str:
    """``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def summary(kind: str, step: int, row: Row) -> str | None:
    """What a row that is no training step says in one line; None if nothing."""
    seconds = row.get(f"time/{kind}", 0.0)
    if kind == "eval":
        numbers = (f"{key} {value:.3f}" for key, value in row.items() if "/" not in key)
        return f"evaluation after step {step}: {'  '.join(numbers)}  ({seconds:.1f} s)"
    if kind == "checkpoint":
        whole = row.get("checkpoint/seconds", seconds)
        return f"checkpoint after step {step} ({whole:.1f} s, training waited {seconds:.1f} s)"
    return None
