"""One override at a time: quotes, sweeps, types, and what of Hydra has no meaning here."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from peergrad.running.overrides import read_overrides
from peergrad.running.quoting import argument, quoted

TEXTS = [
    r"Put it in \boxed{}",
    "Hello, world",
    "a=b",
    "# heading",
    "@me (now)",
    "say \"yes\" or 'no' {",
    "it's {",
    '"half',
    "'half",
    "ends with \\",
    'back\\"slash {\\\\"',
    "$x ${y} \\${z} {}",
    "${",
    "a: b, c; d & e | f < g > !",
    "naïve 数学 é",
    "~/x `ls` *?",
    " blanks around {} ",
    "[a",
    "null,true",
    "choice(a,b) {",
]


def refusal(override: str) -> str:
    with pytest.raises(ValueError) as caught:
        read_overrides([override])
    message = str(caught.value)
    assert "\n" not in message
    return message


def value_of(override: str) -> object:
    """As Hydra and OmegaConf read it."""
    parsed = OverridesParser.create().parse_override(override)
    return OmegaConf.create({"value": parsed.value()}).value


@pytest.mark.parametrize("text", TEXTS)
def test_the_printed_argument_means_what_was_typed(text: str) -> None:
    assert value_of(f"k={quoted(text)}") == text
    (word,) = shlex.split(argument("data.system", text))
    assert read_overrides([word]) == [word]
    assert value_of(word) == text


@pytest.mark.parametrize("text", [text for text in TEXTS if text not in ("ends with \\",)])
def test_a_text_without_quotes_is_answered_with_them(text: str) -> None:
    try:
        taken = read_overrides([f"data.system={text}"])
    except ValueError as error:
        written = str(error).partition("write ")[2] or str(error).partition("as one text: ")[2]
        assert written == argument("data.system", text)
    else:
        assert value_of(taken[0]) == text.strip()


def test_a_text_of_several_lines_and_one_with_a_reference() -> None:
    assert refusal("data.system=a\nb{") == (
        "data.system = 'a\\nb{': needs quotes; put them inside the shell's: 'data.system=\"...\"'"
    )
    assert refusal("run.name=${run.root} {").endswith("write 'run.name=\"${run.root} {\"'")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            r"data.system=Put it in \boxed{}",
            r"data.system = 'Put it in \\boxed{}': needs quotes; "
            r"""write 'data.system="Put it in \boxed{}"'""",
        ),
        (
            "optim.lr=1e-6,2e-6",
            "optim.lr = 1e-6,2e-6: a start runs one configuration; for one each: for v in 1e-6 "
            "2e-6; do python -m peergrad.main ... optim.lr=$v run.name=run$((++i)); done",
        ),
        (
            "algo=dapo,gspo",
            "algo = dapo,gspo: a start runs one configuration; for one each: for v in dapo gspo; "
            "do python -m peergrad.main ... algo=$v run.name=run$((++i)); done",
        ),
        (
            "run.seed=range(1,4)",
            "run.seed = range(1,4): a start runs one configuration; for one each: for v in 1 2 3; "
            "do python -m peergrad.main ... run.seed=$v run.name=run$((++i)); done",
        ),
        (
            "algo=choice(dapo,r1)",
            "algo = choice(dapo,r1): a start runs one configuration; for one each: for v in dapo "
            "r1; do python -m peergrad.main ... algo=$v run.name=run$((++i)); done",
        ),
        (
            "experiment=glob(*)",
            "experiment = glob(*): a start runs one configuration; for one each: for v in ...; do "
            "python -m peergrad.main ... experiment=$v run.name=run$((++i)); done",
        ),
        (
            "run.name=a,b",
            "run.name = a,b: a start runs one configuration; for one each: for v in a b; do "
            "python -m peergrad.main ... run.name=$v; done; as one text: 'run.name=\"a,b\"'",
        ),
        (
            "data.system=Hello, world",
            "data.system = 'Hello, world': a text with a comma needs quotes; "
            "write 'data.system=\"Hello, world\"'",
        ),
        ("run.steps=1,000", "run.steps = 1,000: has commas; write run.steps=1000"),
        (
            "rollout.servers.urls=http://a:1,http://b:1",
            "rollout.servers.urls = http://a:1,http://b:1: is a list; "
            "write 'rollout.servers.urls=[http://a:1,http://b:1]'",
        ),
        (
            "hydra.run.dir=x",
            "hydra.run.dir: Hydra's own settings have no effect here; run.root and run.name say "
            "where a run is kept, logger.* what it writes",
        ),
        (
            "~run.steps",
            "~run.steps: nothing can be taken away; leave run.steps out for its default",
        ),
        ("algo@x=dapo", "algo@x: every group has one place here; write algo=dapo"),
        ("algo=[dapo,gspo]", "algo = [dapo,gspo]: takes one option; choose one of them"),
        ("run.=3", "'run.': is no key; write key=value, as in run.steps=100"),
        (" run.name=x", "' run.name': has a space beside its =; write run.name=x"),
        ("algo.epochs", "'algo.epochs': has no value; write key=value, as in run.steps=100"),
    ],
)
def test_lines(override: str, message: str) -> None:
    assert refusal(override) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.steps=1.5", "run.steps = 1.5: must be a whole number; write it as in run.steps=100"),
        ("run.steps=1e3", "run.steps = 1000.0: must be a whole number; write run.steps=1000"),
        ("run.steps=x", "run.steps = 'x': must be a whole number; write it as in run.steps=100"),
        ("run.steps=true", "run.steps = true: must be a whole number; "
         "write it as in run.steps=100"),
        ("run.steps=null", "run.steps = null: must be a whole number; "
         "write it as in run.steps=100"),
        ("parallel.data=x", "parallel.data = 'x': must be a whole number, or null; "
         "write it as in parallel.data=null"),
        ("optim.lr=true", "optim.lr = true: must be a number; write it as in optim.lr=1e-06"),
        ("optim.lr=#3", "optim.lr = '#3': must be a number; write it as in optim.lr=1e-06"),
        ("data.chat=2", "data.chat = 2: must be true or false; write it as in data.chat=false"),
        ("data.chat=maybe", "data.chat = 'maybe': must be true or false; "
         "write it as in data.chat=false"),
        ("model.dtype=1", "model.dtype = 1: must be one of float32, bfloat16; "
         "write it as in model.dtype=bfloat16"),
        ("run.name=null", "run.name = null: must be text; "
         "for this very text write 'run.name=\"null\"'"),
        ("run.name={a:1}", "run.name = {a:1}: must be text; "
         "for this very text write 'run.name=\"{a:1}\"'"),
        ("run=3", "run = 3: is a section; set the keys in it, as in run.name=<value>"),
        ("rollout.servers.args=3", "rollout.servers.args = 3: must be names and values; "
         "write it as in 'rollout.servers.args={name: value}'"),
        ("rollout.servers.urls=http://a", "rollout.servers.urls = 'http://a': "
         "must be a list of texts; write 'rollout.servers.urls=[http://a]'"),
        ("rollout.servers.urls=[a", "rollout.servers.urls = '[a': "
         "must be a list of texts; write 'rollout.servers.urls=[a]'"),
        ("rollout.stop_token_ids=[a]", "rollout.stop_token_ids = [a]: "
         "must be a list of whole numbers; write it as in 'rollout.stop_token_ids=[1,2]'"),
        ("rollout.stop_token_ids=3", "rollout.stop_token_ids = 3: "
         "must be a list of whole numbers; write 'rollout.stop_token_ids=[3]'"),
        ("algo={kl: {coef: x}}", "algo.kl.coef = 'x': must be a number; "
         "write it as in algo.kl.coef=0.04"),
    ],
)  # fmt: skip
def test_wrong_types(override: str, message: str) -> None:
    assert refusal(override) == message


@pytest.mark.parametrize(
    "override",
    [
        "data.chat=yes", "data.chat=1", "run.steps='3'", "run.steps=1_000", "optim.lr=1",
        "parallel.data=null", "model.path=C:\\x", "run.name=", "run.name=${run.root}",
        "rollout.servers.args={a: {b: [1]}}", "rollout.servers.args.mem-fraction-static=.8",
        "parallel.megatron.recompute_granularity=full", "~rollout.servers.args.a", "~experiment",
        "algo={kl: {coef: 0}}", "experiment=null", "experiment=[quickstart_cpu]",
        "algo.differences=[]", "model.reference=null",
    ],
)  # fmt: skip
def test_what_is_right_is_left_alone(override: str) -> None:
    assert read_overrides([override]) == [override]
