"""What ``slurm/train.sbatch`` would run, as it says itself."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
AWKWARD = [
    "experiment=quickstart_cpu",
    'data.system="Think, then answer."',
    "rollout.servers.args={mem-fraction-static: 0.8, chat-template: 'a b'}",
    "run.name=it's $HOME `x` \\ *",
    "model.path=",
]


def dry_run(
    *words: str, script: str = "train", **variables: str
) -> subprocess.CompletedProcess[str]:
    ours = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    return subprocess.run(
        ["bash", f"slurm/{script}.sbatch", *words],
        cwd=REPO,
        env={**ours, "PYTHON": "python", "SITE": "/dev/null/none", **variables},
        capture_output=True,
        text=True,
    )


def steps(said: str) -> dict[str, list[str]]:
    """The words of each node's command."""
    lines = (line.partition(": ") for line in said.splitlines())
    return {node: shlex.split(command) for node, _, command in lines}


def test_overrides_reach_every_node_as_they_were_written() -> None:
    done = dry_run("--dry-run", *AWKWARD, NODES="2")
    assert (done.returncode, done.stderr) == (0, "")
    for words in steps(done.stdout).values():
        first = words.index(AWKWARD[0])
        assert words[first : first + len(AWKWARD)] == AWKWARD


def test_the_first_nodes_train_and_the_others_serve() -> None:
    sizes = {"NODES": "3", "TRAIN_NODES": "2", "RANKS_PER_NODE": "4", "SERVERS_PER_NODE": "2"}
    done = dry_run("model.path=m", DRY_RUN="1", **sizes)
    urls = "rollout.servers.urls=[http://node3:30000,http://node3:30001]"
    found = steps(done.stdout)
    assert [words[0] for words in found.values()] == [
        "PET_NODE_RANK=0",
        "PET_NODE_RANK=1",
        "python",
    ]
    for node in ("node1", "node2"):
        assert {"--nnodes=2", "--nproc-per-node=4", "--master-addr=node1"} < set(found[node])
        assert {"rollout.servers.mode=external", urls} < set(found[node])
    assert found["node3"][1:3] == ["-m", "peergrad.serve"]
    assert found["node3"][-2:] == ["model.path=m", "rollout.servers.count=2"]


def test_one_node_alone_trains_and_manages_its_servers() -> None:
    found = steps(dry_run("--dry-run", "model.path=m").stdout)
    assert list(found) == ["node1"] and found["node1"][-1] == "model.path=m"


def test_what_is_peculiar_to_a_site_is_read_from_a_file(tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    site.write_text(
        'CONTAINER=(--container-image="a b.sqsh" --no-container-mount-home)\nPYTHON=py\n'
    )
    found = steps(dry_run("--dry-run", SITE=str(site)).stdout)
    assert found["container"] == ["--container-image=a b.sqsh", "--no-container-mount-home"]
    assert found["node1"][1:4] == ["py", "-m", "peergrad.launch"]


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"DRY_RUN": ""}, "error: this is no Slurm job: "),
        ({"TRAIN_NODES": "3"}, "error: TRAIN_NODES = 3: must lie in [1, 2], "),
        ({"GRACE": "5m"}, "error: GRACE = 5m: must be a whole number"),
    ],
)
def test_what_does_not_fit_is_one_line(variables: dict[str, str], line: str) -> None:
    done = dry_run("model.path=m", **{"DRY_RUN": "1", "NODES": "2", **variables})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1


def test_a_sweep_takes_its_words_from_a_line(tmp_path: Path) -> None:
    """Of each member of the array its own; after them those of the command line."""
    file = tmp_path / "runs.txt"
    file.write_text(f"run.name=low\n{shlex.join(AWKWARD)} optim.lr=4e-6\n")
    sweep = {"script": "sweep", "DRY_RUN": "1"}
    done = dry_run(str(file), "experiment=mine", SLURM_ARRAY_TASK_ID="2", **sweep)
    words = steps(done.stdout)["node1"]
    assert words[-len(AWKWARD) - 2 :] == [*AWKWARD, "optim.lr=4e-6", "experiment=mine"]
    done = dry_run(str(file), SLURM_ARRAY_TASK_ID="3", **sweep)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {file}: has no line 3; ")


def test_an_evaluation_has_a_server_on_every_gpu_of_its_node() -> None:
    """Unless it is told otherwise; more nodes than one are refused."""
    found = steps(dry_run("--dry-run", *AWKWARD, script="eval", SERVERS_PER_NODE="4").stdout)
    module = ["python", "-m", "peergrad.evaluate"]
    assert found == {"node1": [*module, "rollout.servers.count=4", *AWKWARD]}
    done = dry_run("--dry-run", *AWKWARD, script="eval", NODES="2")
    assert done.returncode == 2 and done.stderr.startswith("error: sbatch --nodes = 2: ")
