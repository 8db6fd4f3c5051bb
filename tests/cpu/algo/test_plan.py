"""Which passes a configuration needs."""

import pytest

from peergrad.algo.plan import Old, Plan, make_plan
from peergrad.running.compose import compose_config

ONE = ["algo=dr_grpo"]  # no KL, one optimizer step, no correction
KL = "algo.kl.coef=0.1"
REWARD = [KL, "algo.kl.place=reward"]
KEPT, SEVERAL, STALE = "algo.denominator=kept", "algo.minibatches=2", "rollout.max_staleness=1"
DPPO, OPSM, M2PO = (f"algo.correction.{name}=0.2" for name in ("dppo", "opsm", "m2po"))
MIS, TIS = "algo.correction.kind=mis", "algo.correction.kind=tis"
ICEPOP = "algo.surrogate.kind=icepop"
ENGINE, RECOMPUTE, LOGLINEAR = (
    f"algo.old_policy={name}" for name in ("engine", "recompute", "loglinear")
)


@pytest.mark.parametrize(
    ("overrides", "old", "score_each", "reference"),
    [
        # one optimizer step: its own forward is the old policy
        ([], "current", False, False),
        ([RECOMPUTE], "current", False, False),
        ([KL], "current", False, True),
        ([TIS], "current", False, False),
        ([MIS], "current", False, False),
        ([KEPT], "current", False, False),  # nothing is dropped
        (["algo.shaping.overlong_filter=true", KEPT], "current", False, False),
        # several need the start of the step
        ([SEVERAL], "recompute", False, False),
        (["algo.epochs=2"], "recompute", False, False),
        ([SEVERAL, "algo.surrogate.kind=cispo"], "recompute", False, False),
        # and so does what is decided before the update
        (REWARD, "recompute", False, True),
        ([M2PO], "recompute", False, False),
        ([MIS, KEPT], "recompute", False, False),
        ([TIS, KEPT], "current", False, False),  # tis drops nothing
        # what the present policy drops, denominators ask before every update
        ([DPPO], "current", False, False),
        ([DPPO, KEPT], "recompute", True, False),
        ([OPSM, KEPT, SEVERAL], "recompute", True, False),
        ([OPSM, SEVERAL], "recompute", False, False),
        ([DPPO, KEPT, ENGINE], "engine", True, False),
        # the engine's logprobs
        ([ENGINE], "engine", False, False),
        ([ENGINE, SEVERAL, *REWARD], "engine", False, True),
        ([ICEPOP], "engine", False, False),
        ([ICEPOP, SEVERAL], "engine", False, False),
        # rollouts older than the weights: the engine's, unless something corrects them
        ([STALE], "engine", False, False),
        ([STALE, SEVERAL], "engine", False, False),
        ([STALE, DPPO], "engine", False, False),  # masks, but does not weigh by pi_old / pi_engine
        ([STALE, RECOMPUTE], "current", False, False),
        ([STALE, RECOMPUTE, SEVERAL], "recompute", False, False),
        ([STALE, MIS], "current", False, False),
        ([STALE, MIS, SEVERAL], "recompute", False, False),
        ([STALE, M2PO], "recompute", False, False),
        ([STALE, LOGLINEAR], "loglinear", False, False),
        ([STALE, LOGLINEAR, MIS, SEVERAL], "loglinear", False, False),
    ],
)
def test_plans(overrides: list[str], old: str, score_each: bool, reference: bool) -> None:
    config, _ = compose_config(["model.path=m", *ONE, *overrides])
    assert make_plan(config) == Plan(Old[old], score_each=score_each, reference=reference)


@pytest.mark.parametrize(
    ("preset", "old", "reference"),
    [
        *(("deepseekmath", "current", True), ("dr_grpo", "current", False)),
        *(("rloo", "current", False), ("areal", "current", False), ("roll", "current", True)),
        *(("r1", "recompute", True), ("dapo", "recompute", False), ("gspo", "recompute", False)),
        *(("cispo", "recompute", False), ("rlinf", "recompute", False)),
    ],
)
def test_plans_of_the_presets(preset: str, old: str, reference: bool) -> None:
    config, _ = compose_config(["model.path=m", f"algo={preset}"])
    assert make_plan(config) == Plan(Old[old], score_each=False, reference=reference)
