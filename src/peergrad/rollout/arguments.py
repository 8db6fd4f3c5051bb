"""Ask SGLang's parser: ``python -m peergrad.rollout.arguments OPTION...``.

A process of its own, because importing SGLang takes seconds and changes the process that does it.
Exit status 0 if the options are fine or SGLang cannot be imported, REFUSED_STATUS if they are not;
the last line of the output then says why, and after a semicolon what to do.
"""

import argparse
import difflib
import sys
from typing import NoReturn

REFUSED_STATUS = 3


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _refuse(message, "see 'sglang serve --help'")


def main(arguments: list[str]) -> int:
    """The exit status. ``arguments``: options of the server, but for those that peergrad sets."""
    try:
        from sglang.srt.server_args import ServerArgs
    except ImportError:
        return 0
    parser = _Parser(allow_abbrev=False)  # the server's own allows it; then a typo is an option
    ServerArgs.add_cli_args(parser)
    _, unknown = parser.parse_known_args(["--model-path", "model", *arguments])
    if unknown:
        name = unknown[0].partition("=")[0]
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0].removeprefix('--')}?" if near else "remove it"
        _refuse(f"SGLang has no option {name.removeprefix('--')}", hint)
    return 0


def _refuse(rule: str, remedy: str) -> NoReturn:
    print(" ".join(f"{rule.replace(';', ',').rstrip('.')}; {remedy}".split()), flush=True)
    raise SystemExit(REFUSED_STATUS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
