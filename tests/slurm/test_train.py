"""Jobs of a real Slurm that are stopped, killed and cancelled, and go on as if nothing had been."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from peergrad.recording import write_groups
from peergrad.rollout.rollouts import recorded
from tests.e2e.run import MAIN, assert_same_weights, run_in_turn
from tests.e2e.test_replay import groups
from tests.slurm.cluster import Cluster, SlurmError
from tests.slurm.job import REPO, Job

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(1800)]

STEPS = 40
SERVED = (  # a model that knows nothing, and a reward that it can stumble upon
    "model.dtype=float32",
    "reward=function",
    "reward.function=tests.e2e.rewards:even",
    "rollout.batch_size=32",
    "rollout.group_size=4",
    "rollout.max_new_tokens=8",
    "optim.lr=1e-3",
    "algo.kl.coef=0",
    "run.steps=100",
    "evaluation.every=0",
    "checkpoint.every=1",
)
NewJob = Callable[..., Job]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def replayed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run on recorded groups: no server, and every bit is known."""
    recording = tmp_path_factory.mktemp("recording")
    for step in range(STEPS):
        write_groups(recorded(recording, step), groups(step))
    return [
        f"model.path={model}",
        "model.dtype=float32",
        f"rollout.replay={recording}",
        "rollout.group_size=4",
        "rollout.batch_size=32",
        "rollout.max_new_tokens=16",
        f"run.steps={STEPS}",
        "optim.lr=1e-3",
        "checkpoint.every=0",
    ]


@pytest.fixture
def new_job(cluster: Cluster, root: Path) -> Iterator[NewJob]:
    """Builds jobs, which end with the test."""
    jobs = []

    def build(name: str, *overrides: str) -> Job:
        jobs.append(Job(cluster, root, name, *overrides))
        return jobs[-1]

    yield build
    for number in (job.id for job in jobs if job.id):
        with suppress(SlurmError):  # it has ended
            cluster.slurm("scancel", "--full", "--signal=KILL", number)
        cluster.slurm("scancel", number)
    for job in jobs[:1]:  # or the next test would take them for its own
        job.wait_until_gone()


@pytest.mark.parametrize("script", sorted(p.name for p in (REPO / "slurm").glob("*.sbatch")))
def test_slurm_accepts_every_script(cluster: Cluster, script: str) -> None:
    cluster.slurm("sbatch", "--test-only", f"slurm/{script}", cwd=REPO)


def test_a_wrong_configuration_ends_the_job_at_once(new_job: NewJob, replayed: list[str]) -> None:
    job = new_job("wrong", *replayed, "rollout.batch_size=33")
    job.submit(nodes=1)
    job.wait_for("FAILED")
    assert job.facts()["ExitCode"] == "2:0" and job.facts()["Restarts"] == "0"
    assert job.printed.count("error: rollout.batch_size = 33: must be a positive multiple") == 1
    assert not job.path.exists()


def test_a_bad_node_is_left_out_if_there_are_spares(
    cluster: Cluster, new_job: NewJob, replayed: list[str]
) -> None:
    """Else the job ends, and says which it is and why."""
    with cluster.taken(1, 30_000):
        job = new_job("spared", *replayed, "run.steps=2")
        job.submit(nodes=2, NEED_NODES="1", NO_PREFLIGHT="")
        job.wait_for("COMPLETED")
        (attempt,) = job.attempts()
        assert (attempt["nodes"], attempt["status"]) == (cluster.name(2), 0)
        assert f"{cluster.name(1)}: port = 30000: is taken by " in job.printed
        job = new_job("unspared", *replayed)
        job.submit(nodes=2, NO_PREFLIGHT="")
        job.wait_for("FAILED")
    assert f"{cluster.name(1)}: port = 30000: is taken by " in job.printed and not job.attempts()


def preempt(cluster: Cluster) -> None:
    """A job that is more urgent and takes all nodes, for a second."""
    everywhere = ("--partition=urgent", f"--nodes={len(cluster.nodes)}", "--exclusive")
    cluster.slurm("sbatch", *everywhere, "--output=/dev/null", "--wrap=srun sleep 1")


def test_a_stopped_and_preempted_run_ends_as_if_nothing_had_been(
    cluster: Cluster, new_job: NewJob, replayed: list[str]
) -> None:
    """Two nodes, a tensor rank on each. Preempted while it is checked; USR1, as before the time
    limit; preempted while it trains. Each time it is requeued. The weights are those of a run that
    nothing disturbed."""
    job = new_job("stopped", *replayed, "parallel.tensor=2")
    job.submit(nodes=2, TRAIN_NODES="2", NO_PREFLIGHT="1")
    job.wait_until(lambda: job.processes("peergrad.main"), "the check")
    preempt(cluster)
    job.wait_until(lambda: job.step >= 2, "step 2")
    job.signal("USR1")
    whole = new_job("whole", *replayed, "parallel.tensor=2")
    run_in_turn(2, [MAIN, *whole.overrides])
    job.wait_until(lambda: job.attempts() and job.step > job.attempts()[0]["to_step"], "more steps")
    preempt(cluster)
    job.wait_for("COMPLETED")
    first, second, third = job.attempts()
    assert [(each["status"], each["why"]) for each in (first, second, third)] == [
        (75, "stopped and saved, for USR1"),
        (75, "stopped and saved, preempted"),
        (0, "finished"),
    ]
    assert 2 <= first["to_step"] == second["from_step"] < second["to_step"]
    assert second["to_step"] == third["from_step"] < STEPS == third["to_step"]
    assert (first["restart"], third["restart"], job.facts()["Restarts"]) == (1, 3, "3")
    assert (job.path / "slurm" / "latest").resolve().name == f"{job.id}.3"
    assert_same_weights(job.hf, whole.hf)


def test_restarts_that_lead_nowhere_are_bounded(new_job: NewJob, replayed: list[str]) -> None:
    """A trainer that is killed is tried once more, as MAX_RESTARTS says."""
    job = new_job("killed", *replayed)
    job.submit(nodes=1, MAX_RESTARTS="1")
    for attempt in (1, 2):
        job.wait_until(lambda: job.processes("peergrad.launch"), f"the start of attempt {attempt}")
        for launcher in job.processes("peergrad.launch"):
            launcher.kill()
        job.wait_until(lambda n=attempt: len(job.attempts()) == n, f"the end of attempt {attempt}")
    job.wait_for("FAILED")
    assert [line["status"] for line in job.attempts()] == [137, 137]
    assert "not tried again: 2 attempts in a row" in job.printed


@pytest.mark.engine
def test_a_cancelled_run_has_saved_and_leaves_nothing(
    cluster: Cluster, new_job: NewJob, model: Path
) -> None:
    """Tensor ranks on two nodes, a server on a third. scancel tells all of them to end; the trainer
    saves, for which it may need the server."""
    job = new_job("cancelled", f"model.path={model}", *SERVED, "parallel.tensor=2")
    job.submit(nodes=3, TRAIN_NODES="2")
    job.wait_until(lambda: job.step >= 2, "step 2")
    cluster.slurm("scancel", job.id)
    job.wait_for("CANCELLED")
    (attempt,) = job.attempts()
    assert attempt["status"] == 75 and attempt["to_step"] == job.step >= 2
    assert job.facts()["Restarts"] == "0"


def test_servers_that_end_end_the_job(new_job: NewJob, model: Path) -> None:
    """The trainer, which waits for them, is told; the log says what they had to say."""
    job = new_job("serverless", f"model.path={model}", *SERVED)
    job.submit(nodes=2, MAX_RESTARTS="0")
    job.wait_until(lambda: "for servers" in job.printed, "the trainer to wait")
    for server in job.processes("peergrad.serve"):
        server.kill()
    job.wait_for("FAILED")
    (attempt,) = job.attempts()
    assert attempt["why"] == "the step servers ended"
    assert "Killed" in job.printed.partition("servers.log ends with:")[2]


@pytest.mark.engine
def test_a_run_outlives_a_serving_node_and_the_first_one(
    cluster: Cluster, new_job: NewJob, model: Path
) -> None:
    """The power of one serving node fails: the run goes on with the other. That of the node that
    trains and runs the script fails: another node has the job requeued, and it goes on there."""
    job = new_job("outlives", f"model.path={model}", *SERVED, "rollout.servers.lost_after=5")
    job.submit("run.steps=100000", nodes=3, TRAIN_NODES="1")
    job.wait_until((job.checkpoints / "latest").exists, "a checkpoint")
    trains, serves, lost = job.nodes
    assert job.servers() == [2.0] * job.step
    down = []
    try:
        down.append(lost)
        cluster.crash(lost)
        job.wait_until(lambda: job.servers()[-1] == 1.0, "a step with one server")
        assert "; the run goes on with the other servers, now 1" in job.printed
        job.wait_until(lambda: job.nodes == [trains, serves], "Slurm to notice")
        cluster.boot(down.pop())
        cluster.wait_idle(lost)
        down.append(trains)
        cluster.crash(trains)
        job.wait_until(lambda: job.facts()["Restarts"] == "1", "to be requeued")
        job.wait_until(lambda: len(job.attempts()) == 1, "another attempt")
        assert trains not in job.nodes and serves in job.nodes
        (first,) = job.attempts()
        assert first["status"] is None and first["to_step"] >= 1
    finally:
        for node in down:
            cluster.boot(node)
            cluster.wait_idle(node)
