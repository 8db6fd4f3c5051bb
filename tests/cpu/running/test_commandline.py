"""Flags and overrides in any order; a true answer to everything else."""

import shlex
import subprocess
import sys

import pytest

from peergrad.running.commandline import FLAGS, HELP, Options, parse


def refusal(*arguments: str) -> str:
    with pytest.raises(ValueError) as caught:
        parse(arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("", Options()),
        (
            "run.steps=3 --check algo=dapo",
            Options(overrides=("run.steps=3", "algo=dapo"), check=True),
        ),
        ("--cfg a=b --objective", Options(overrides=("a=b",), cfg=True, objective=True)),
        ("run.name= --cfg", Options(overrides=("run.name=",), cfg=True)),
        ("run.name= run.steps=3", Options(overrides=("run.name=", "run.steps=3"))),
        ("+a.b=c ~x ~y=1", Options(overrides=("+a.b=c", "~x", "~y=1"))),
        ("optim.lr=-1 'data.system=a b'", Options(overrides=("optim.lr=-1", "data.system=a b"))),
    ],
)
def test_parse(line: str, options: Options) -> None:
    assert parse(shlex.split(line)) == options


MIGRATED = "there is no such option; did you mean"
FOLDERS = (
    "there is one configuration, conf/config.yaml; put your own run into "
    "conf/experiment/<name>.yaml and say experiment=<name>"
)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--chek", "--chek: there is no such option; did you mean --check?"),
        ("--config", "--config: there is no such option; see --help"),
        ("-x", "-x: there is no such option; see --help"),
        ("--cfg job", "--cfg: takes no value; leave out job"),
        ("--cfg=job", "--cfg=job: takes no value; leave it out"),
        ("\u2014check", "\u2014check: has another dash; write --check"),
        ("-m", "-m: a start runs one configuration; start the program once for each, in a loop of "
         "the shell"),
        ("-cd x", f"-cd: {FOLDERS}"),
        ("--config-name=x", f"--config-name: {FOLDERS}"),
        ("--info", "--info: is not needed; --cfg prints the whole configuration, with every "
         "reference resolved"),
        ("--nproc-per-node 4", "--nproc-per-node: belongs to torchrun; put it before "
         "-m peergrad.main"),
        ("--model.path=x", "--model.path: is written without dashes; write model.path=x"),
        ("--algo dapo", "--algo: is written without dashes; write algo=dapo"),
        ("--data.system 'a {b}'", "--data.system: is written without dashes; "
         "write 'data.system=\"a {b}\"'"),
        ("--rollout-batch-size 32", f"--rollout-batch-size: {MIGRATED} rollout.batch_size "
         "(in rollouts, not prompts)?"),
        ("--kl-loss-type k1", f"--kl-loss-type: {MIGRATED} algo.kl.estimator=k1?"),
        ("--optim.learning_rate=1", f"--optim.learning_rate: {MIGRATED} optim.lr?"),
        ("--lambd 1", "--lambd: there is no such option; docs/migrating.md says what stands here "
         "for options of other trainers"),
        ("model.path = /a b", "model.path = /a b: has spaces beside its =; "
         "write 'model.path=\"/a b\"'"),
        ("model.path= /a", "model.path= /a: has spaces beside its =; write model.path=/a"),
        ("model.path =/a run.steps=3", "model.path =/a: has spaces beside its =; "
         "write model.path=/a"),
        ("model.path /a", "model.path: has no value; write model.path=/a"),
        ("run.steps=3 algo dapo", "algo: has no value; write algo=dapo"),
        ("algo.epochs", "algo.epochs: has no value; write algo.epochs=<value>"),
        (r"data.system=Put it in \\boxed{} run.steps=3", "'it': stands alone; if it belongs to "
         r"""data.system, write 'data.system="Put it in \boxed{}"'"""),
        ("dapo", "'dapo': is neither key=value nor an option; did you mean algo=dapo?"),
        ("check", "'check': is neither key=value nor an option; did you mean --check?"),
        ("train.yaml", "'train.yaml': is neither key=value nor an option; see --help"),
        ("=3", "'=3': is neither key=value nor an option; see --help"),
    ],
)  # fmt: skip
def test_lines(line: str, message: str) -> None:
    assert refusal(*shlex.split(line)) == message


def test_an_empty_argument() -> None:
    assert refusal("") == "'': is neither key=value nor an option; see --help"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["run.steps=3", flag])
    assert caught.value.code == 0
    assert capsys.readouterr().out == HELP
    assert all(len(line) <= 80 for line in HELP.splitlines())
    assert all(name in HELP for name in FLAGS)


def test_the_examples_of_the_help_parse() -> None:
    text = HELP.replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("  python -m peergrad.main")]
    assert len(lines) == 3
    for line in lines:
        assert parse(shlex.split(line)[3:]).overrides


def run(
    *arguments: str, program: tuple[str, ...] = ("-m", "peergrad.main")
) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, *program, *arguments], capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def test_the_program_shows_an_incomplete_configuration_and_says_nothing_else() -> None:
    code, out, err = run("--cfg", "data=gsm8k")
    assert (code, err) == (0, "")
    assert "  path: ???\n" in out and "  source: ???\n" in out
    assert out.startswith("run:\n")


def test_the_program_refuses_in_one_line() -> None:
    assert run("run.steps=0", "--cfg") == (
        2,
        "",
        "error: run.steps = 0: must be at least 1; raise it\n",
    )
    assert run("--chek") == (
        2,
        "",
        "error: --chek: there is no such option; did you mean --check?\n",
    )


def test_explain_needs_no_model() -> None:
    tool = ("tools/explain.py",)
    code, out, err = run("data=gsm8k", "algo=dapo", program=tool)
    assert (code, err) == (0, "") and out.startswith("DAPO")
    assert run("--objective", "data=gsm8k", "algo=dapo")[:2] == (0, out)
    assert run("algo=grpo", program=tool)[2].endswith("did you mean algo=deepseekmath?\n")


def test_the_command_line_is_light() -> None:
    code = (
        "import sys; from peergrad.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "main(['--cfg']); assert not {'torch', 'transformers', 'sglang'} & set(sys.modules)"
    )
    assert run(code, program=("-c",))[0] == 0
