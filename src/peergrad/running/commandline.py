"""The command line: overrides and flags in any order, and a true answer to what is neither."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from peergrad.running.hints import ANYWHERE, distance, remedy
from peergrad.running.keys import groups, is_free, keys
from peergrad.running.quoting import argument

HELP = """\
usage: python -m peergrad.main [group=option ...] [key=value ...] [flag ...]

Trains a language model with GRPO: Megatron-core learns from SGLang's rollouts.
Several processes: python -m peergrad.launch --nproc-per-node 4 ...

flags
  --cfg         print the whole configuration and stop
  --check       say what is wrong with it, if anything, or what would run, and
                stop; with --cfg print it if nothing is
  --objective   print the objective as a formula with every knob, and stop
  -h, --help    print this and stop

examples
  python -m peergrad.main experiment=quickstart_cpu run.name=first
  python -m peergrad.main --cfg algo=dapo optim.lr=2e-6
  python -m peergrad.main --check model.path=/models/qwen3-0.6b data=jsonl \\
      data.source=prompts.jsonl reward=function reward.function=mine:score

--cfg lists every key with its value; what each means: src/peergrad/config/
Texts with spaces, commas or braces: 'data.system="Think, then answer."'
"""

DASHES = "-\u2013\u2014\u2212"
FLAGS = ("--cfg", "--check", "--objective")
_FOLDERS = (
    "there is one configuration, conf/config.yaml; put your own run into "
    "conf/experiment/<name>.yaml and say experiment=<name>"
)
_PRINTS = "is not needed; --cfg prints the whole configuration, with every reference resolved"
_ONE = "a start runs one configuration; start the program once for each, in a loop of the shell"
_TORCHRUN = "belongs to torchrun; put it before -m peergrad.main"
FOREIGN = {  # flags of Hydra's own programs, and of the launcher
    **dict.fromkeys(("-m", "--multirun"), _ONE),
    **dict.fromkeys(("-cd", "--config-dir", "-cn", "--config-name"), _FOLDERS),
    **dict.fromkeys(("-cp", "--config-path"), _FOLDERS),
    **dict.fromkeys(("-c", "-p", "--package", "-i", "--info", "--resolve"), _PRINTS),
    **dict.fromkeys(("-r", "--run"), "is not needed; the program runs anyway"),
    "--hydra-help": "there is none; see --help",
    **dict.fromkeys(
        ("--nproc-per-node", "--nproc_per_node", "--nnodes", "--standalone"), _TORCHRUN
    ),
    **dict.fromkeys(("--node-rank", "--node_rank", "--master-addr", "--master-port"), _TORCHRUN),
    **dict.fromkeys(("--rdzv-endpoint", "--rdzv-backend", "--rdzv-id"), _TORCHRUN),
}


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Example:
        ``Options(overrides=("run.steps=3", "algo=dapo"), check=True)``
    """

    overrides: tuple[str, ...] = ()
    cfg: bool = False
    check: bool = False
    objective: bool = False


def parse(arguments: Sequence[str]) -> Options:
    """Tell overrides from flags, in any mixture.

    Raises ValueError with one line for anything else, and SystemExit(0) after ``--help``, which is
    printed. Whether an override can be right is not asked here (``compose_config``).
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print(HELP, end="")
        raise SystemExit(0)
    overrides, flags = [], set()
    for place, text in enumerate(arguments):
        following = arguments[place + 1 :]
        if text in FLAGS:
            flags.add(text)
            _check_alone(text, following)
        elif text.startswith(tuple(DASHES)):
            raise ValueError(_no_flag(text, following))
        elif _is_override(text, following):
            overrides.append(text)
        else:
            raise ValueError(_stray(arguments, place))
    chosen = {flag.lstrip("-"): True for flag in flags}
    return Options(overrides=tuple(overrides), **chosen)


def read_valued(
    arguments: Sequence[str], valued: Sequence[str], text: str
) -> tuple[dict[str, str], Options]:
    """The command line of a program beside ``peergrad.main``: its own options, ``valued``, each
    with its value, and what it shares with that, overrides and ``--check``. ``text``: its help.

    Raises as ``parse`` does.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print(text, end="")
        raise SystemExit(0)
    values: dict[str, str] = {}
    others, words = [], iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in valued:
            others.append(_shared(word, valued))
            continue
        value = value if equals else next(words, "")
        if not value or value.startswith("--"):
            raise ValueError(f"{name}: has no value; write {name} <value>, see --help")
        values[name] = value
    return values, parse(others)


def _shared(word: str, valued: Sequence[str]) -> str:
    """``word`` unless it is an option of ``peergrad.main`` alone, or one of ``valued`` misspelt."""
    name = word.partition("=")[0]
    if name in FLAGS and name != "--check":
        raise ValueError(f"{name}: is an option of peergrad.main; ask that, or see --help")
    near = [known for known in valued if name[:1] == "-" and distance(name, known) <= 2]
    if near:
        raise ValueError(f"{name}: there is no such option; did you mean {near[0]}?")
    return word


def _is_override(text: str, following: Sequence[str]) -> bool:
    key, equals, value = text.partition("=")
    split = not value and bool(following) and _is_word(following[0])  # "model.path= /a"
    return text.startswith("~") or bool(key.strip() and equals and not split)


def _is_word(text: str) -> bool:
    """Whether an argument can only be a part of something that was not quoted."""
    dashed = text.startswith(("~", *DASHES))
    return not dashed and ("=" not in text or not text.partition("=")[0].strip())


def _check_alone(flag: str, following: Sequence[str]) -> None:
    if following and following[0] in ("job", "hydra", "all", "true", "false"):
        raise ValueError(f"{flag}: takes no value; leave out {following[0]}")


def _no_flag(text: str, following: Sequence[str]) -> str:
    """The line for something with a dash that is no flag of ours."""
    flag, equals, value = text.partition("=")
    if flag[0] != "-":  # pasted from a text that was typeset
        flag = f"--{flag.lstrip(DASHES)}"
    if flag in FLAGS:
        wrong = "takes no value; leave it out" if equals else f"has another dash; write {flag}"
        return f"{text}: {wrong}"
    if flag in FOREIGN:
        return f"{flag}: {FOREIGN[flag]}"
    if flag.startswith("--hydra."):
        return f"{flag}: Hydra's own settings have no effect here; see --help"
    name = flag.lstrip("-")
    if not equals and following and "=" not in following[0] and following[0][:1] != "-":
        value = following[0]
    for key in (name, name.replace("-", "_")):
        if key in keys() or key in groups() or is_free(key):
            return f"{flag}: is written without dashes; write {written(key, value)}"
    near = [known for known in (*FLAGS, "--help") if distance(flag, known) <= 2]
    if near:
        return f"{flag}: there is no such option; did you mean {near[0]}?"
    hint = remedy(name, value) if len(name) > 1 else ANYWHERE
    hint = "see --help" if hint == ANYWHERE else hint
    return f"{flag}: there is no such option; {hint}"


def written(key: str, value: str) -> str:
    """An override as it is typed into a shell."""
    if not value:
        return f"{key}=<value>"
    plainly = f"{key}={value}"
    bare = value.isascii() and all(c.isalnum() or c in "._/:-+[]" for c in value)
    return shlex.quote(plainly) if bare else argument(key, value) or f"'{key}=\"...\"'"


def _stray(arguments: Sequence[str], place: int) -> str:
    """The line for words that stand alone: a text without quotes, spaces beside a =, a key without
    a value."""
    words = [arguments[place]]
    for text in arguments[place + 1 :]:
        if not _is_word(text):
            break
        words.append(text)
    key, equals, value = " ".join(words).partition("=")
    key = key.strip()
    if equals and key and " " not in key:
        right = written(key, value.strip())
        return f"{' '.join(words)}: has spaces beside its =; write {right}"
    before = arguments[place - 1] if place else ""
    if "=" in before and before[:1] not in ("-", "~") and not _is_key(words):
        name, _, start = before.partition("=")
        right = written(name, f"{start} {' '.join(words)}".strip())
        return f"{words[0]!r}: stands alone; if it belongs to {name}, write {right}"
    if _is_key(words):
        return f"{words[0]}: has no value; write {written(words[0], ' '.join(words[1:]))}"
    homes = [f"{group}={words[0]}" for group, some in groups().items() if words[0] in some]
    near = [flag for flag in FLAGS if flag == f"--{words[0]}"] + homes[:2]
    hint = f"did you mean {' or '.join(near)}?" if near else "see --help"
    return f"{words[0]!r}: is neither key=value nor an option; {hint}"


def _is_key(words: Sequence[str]) -> bool:
    """Whether a key begins the words, and not a sentence."""
    first = words[0]
    known = is_free(first) or first in keys() or first in groups()
    return known and ("." in first or len(words) < 3)
