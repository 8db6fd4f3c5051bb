"""Print the objective that a configuration means: formula, passes, every knob and its effect.

python tools/explain.py algo=areal rollout.max_staleness=2
python tools/explain.py experiment=gsm8k_qwen3_0p6b algo.kl.coef=0.01
"""

import sys

from peergrad.algo.explain import explain
from peergrad.algo.knobs import refuse
from peergrad.running.compose import chosen_keys, compose_config

UNSET = ("model.path", "data.source")  # mandatory in a run, without a say in its objective


def main(overrides: list[str]) -> int:
    given = {override.partition("=")[0] for override in overrides}
    overrides = [*(f"{key}=unset" for key in UNSET if key not in given), *overrides]
    try:
        config, _ = compose_config(overrides)
        print(explain(config), end="")
        refuse(config, chosen_keys(overrides))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
