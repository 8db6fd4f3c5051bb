"""An evaluation as a user meets it before anything is started: what is refused, what is said."""

from pathlib import Path

import pytest

from peergrad.evaluate import Options, main, read
from tests.models import make_hf_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("run") / "hf", layers=1)


@pytest.fixture
def overrides(model: Path, tmp_path: Path) -> list[str]:
    return [f"model.path={model}", f"run.root={tmp_path / 'runs'}", "rollout.max_new_tokens=8"]


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("", Options()),
        ("a=1 --out x/y --check b=2", Options(Path("x/y"), True, ("a=1", "b=2"))),
        ("--out=x", Options(Path("x"))),
    ],
)
def test_reading(line: str, options: Options) -> None:
    assert read(line.split()) == options


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line that ``arguments`` are refused with, before anything is said."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err[7:].rstrip()


def test_what_cannot_be_evaluated(
    capsys: pytest.CaptureFixture[str], overrides: list[str], tmp_path: Path
) -> None:
    for more, line in {
        "data.held_out=null": "data.held_out = None: is what is evaluated on, and there is none; ",
        "data.held_out=/no/such.jsonl": "data.held_out = '/no/such.jsonl': ",
        "rollout.replay=x": "rollout.replay = 'x': has recorded answers to training prompts, ",
        "rollout.max_new_tokens=1": "rollout.max_new_tokens = 1: is too few for any answer of "
        "data.held_out: the shortest takes 3 ",
        "rollout.stop_token_ids=[128]": "rollout.stop_token_ids = [128]: ",
        "evaluation.samples=2": "evaluation.samples = 2: greedy answers are all the same; ",
        "rollout.servers.fp8=block": "rollout.servers.fp8 = 'block': has servers start without "
        "weights, which come from a trainer, and there is none; start servers on ",
        "--objective": "--objective: is an option of peergrad.main; ",
        "--uot=x": "--uot: there is no such option; did you mean --out?",
        f"--out={tmp_path}": f"--out = '{tmp_path}': is there already; name another folder",
        "--out=/proc/x": "--out = '/proc/x': cannot be written to ",
    }.items():
        assert refusal(capsys, *overrides, more).startswith(line)
    assert not (tmp_path / "runs").exists()


def test_what_is_no_model_for_a_server(
    capsys: pytest.CaptureFixture[str], overrides: list[str], model: Path, tmp_path: Path
) -> None:
    """A run's folder, and its checkpoints: what to do is said."""
    run = model.parent
    line = f"model.path = '{run}': is the folder of a run; set model.path={model}"
    assert refusal(capsys, *overrides, f"model.path={run}") == line
    (tmp_path / "meta.json").touch()
    for key in ("path", "weights"):
        said = refusal(capsys, *overrides, f"model.{key}={tmp_path}")
        assert said.startswith(f"model.{key} = '{tmp_path}': is a checkpoint for training, which ")
        assert said.endswith(f"python tools/megatron_to_hf.py --checkpoint {tmp_path} --out makes")


def test_one_process_is_enough(
    capsys: pytest.CaptureFixture[str], overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refusal(capsys, *overrides).startswith("WORLD_SIZE = 2: an evaluation is one process; ")


def test_what_only_a_trainer_has_is_not_asked_for(
    capsys: pytest.CaptureFixture[str], overrides: list[str], model: Path, tmp_path: Path
) -> None:
    more = ["data.source=/no/such.jsonl", "parallel.tensor=8", "rollout.batch_size=24"]
    sampling = ["evaluation.samples=4", "evaluation.temperature=0.6", "evaluation.prompts=20"]
    assert main([*overrides, *more, *sampling, "--check"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "answers        4 to each, temperature 0.6, of at most 8 tokens\n" in out
    assert "prompts        the first 20 of arithmetic: " in out
    assert "servers        1, started and stopped by the run\n" in out
    assert not (tmp_path / "runs").exists()
