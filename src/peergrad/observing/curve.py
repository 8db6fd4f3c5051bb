"""The learning curve of a run as a picture."""

from pathlib import Path

from peergrad.observing.metrics import read_metrics


def draw_curve(metrics: Path, picture: Path) -> None:
    """Plot training reward, held-out pass@1 and the logprob gap from ``metrics`` into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(metrics)
    figure, (reward, gap) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 6), height_ratios=(2, 1))
    for kind, key, label, style in (
        ("train", "reward/mean", "training reward", "-"),
        ("eval", "pass@1", "held-out pass@1", "o-"),
    ):
        points = [(r["step"], r[key]) for r in rows if r["kind"] == kind and r.get(key) is not None]
        if points:
            reward.plot(*zip(*points, strict=True), style, label=label)
            reward.legend(loc="lower right")
    rewards = [r["reward/mean"] for r in rows if r.get("reward/mean") is not None]
    if all(0 <= r <= 1 for r in rewards):
        reward.set_ylim(-0.02, 1.02)
    reward.grid(alpha=0.3)
    points = [(r["step"], r["logprob_gap/max"]) for r in rows if r.get("logprob_gap/max")]
    if points:
        gap.semilogy(*zip(*points, strict=True), color="tab:red")
    gap.set_ylabel("max |logp gap|")
    gap.set_xlabel("step")
    gap.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
