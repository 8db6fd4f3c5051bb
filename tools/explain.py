"""Print the objective that a configuration means: formula, passes, every knob and its effect.

python tools/explain.py algo=areal rollout.max_staleness=2
python tools/explain.py experiment=gsm8k_qwen3_0p6b algo.kl.coef=0.01
"""

import sys

from peergrad.algo.explain import explain
from peergrad.algo.knobs import refuse
from peergrad.running.commandline import parse
from peergrad.running.compose import chosen_keys, compose_config


def main(arguments: list[str]) -> int:
    try:
        overrides = parse(arguments).overrides
        config, _ = compose_config(overrides, allow_missing=True)
        print(explain(config), end="")
        refuse(config, chosen_keys(overrides))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
