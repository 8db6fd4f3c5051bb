"""The command line: which node this is, and what is refused in one line."""

from pathlib import Path

import pytest

from peergrad.preflight import main
from peergrad.preflight.options import read_options, read_ports

SLURM = {
    "SLURM_JOB_ID": "12",
    "SLURM_RESTART_COUNT": "3",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURMD_NODENAME": "gpu02",
    "SLURM_GPUS_ON_NODE": "8",
}


def test_slurm_says_which_node_this_is() -> None:
    options = read_options(["--shared", "/s"], SLURM)
    assert (options.rank, options.nodes, options.host, options.gpus) == (1, 4, "gpu02", 8)
    assert options.folder == Path("/s/preflight-12.3") and options.need == 4
    assert options.config is None and options.deadline == 60 and options.reporting == 30


def test_a_batch_script_outside_of_a_step_is_one_node() -> None:
    """There SLURM_PROCID alone is set."""
    options = read_options(["--shared", "/s"], {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"})
    assert (options.rank, options.nodes) == (0, 1)


def test_without_slurm_words_or_the_environment_say_it() -> None:
    environment = {"RANK": "2", "WORLD_SIZE": "3"}
    options = read_options(["--shared", "/s"], environment)
    assert (options.rank, options.names) == (2, ("node 0", "node 1", "node 2"))
    assert options.folder == Path("/s/preflight-local") and options.gpus is None
    words = ["--shared", "/s", "--rank", "0", "--nodes", "2", "--id", "a", "--gpus", "0"]
    options = read_options(words, SLURM)
    assert (options.rank, options.nodes, options.gpus) == (0, 2, 0)
    assert options.folder == Path("/s/preflight-a")


def test_the_configuration_may_stand_anywhere(model: Path) -> None:
    words = [f"model.path={model}", "--shared", "/s", "run.name=b", "--need", "1", "run.root=/r"]
    options = read_options(words, {})
    assert options.config is not None and options.config.model.path == str(model)
    assert (options.config.run.root, options.config.run.name, options.need) == ("/r", "b", 1)


def test_ports() -> None:
    assert read_ports("29500,30000-30002,30001") == (29500, 30000, 30001, 30002)
    assert read_ports("") == ()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "--ports 1-x",
            "--ports = '1-x': '1-x' is neither a port nor a range of ports up to 65535",
        ),
        ("--ports 70000", "--ports = '70000': "),
        ("--ports 9-8", "--ports = '9-8': "),
        ("--need 3 --nodes 2", "--need = 3: must lie in [1, 2], the nodes; correct it"),
        ("--rank 2 --nodes 2", "--rank = 2: must lie below the number of nodes (2); "),
        ("--rank one", "--rank = 'one': must be a whole number; correct it"),
        ("--gpus -1", "--gpus = '-1': must be a whole number; correct it"),
        ("--deadline 1", "--deadline = '1': must be at least 5 seconds; use 60"),
        ("--min-disk-gb nan", "--min-disk-gb = 'nan': must be a number of at least 0; correct it"),
        ("--host a/b", "--host = 'a/b': is no name of a machine; "),
        ("modle.path=x", "modle.path"),
    ],
)
def test_wrong_words_are_one_line_and_touch_nothing(
    words: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = tmp_path / "shared"
    arguments = words.replace("--gpus -1", "--gpus=-1").split()
    assert main(["--shared", str(shared), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {line}") and err.count("\n") == 1, err
    assert not shared.exists()


def test_two_tasks_on_a_node_are_refused() -> None:
    with pytest.raises(ValueError, match="must be the number of nodes \\(4\\): one task checks"):
        read_options(["--shared", "/s"], {**SLURM, "SLURM_STEP_NUM_TASKS": "32"})
