"""What shows only between nodes: differences, clocks, who is at fault in an all-reduce."""

from dataclasses import replace

import pytest

from peergrad.preflight.collective import STAGES
from peergrad.preflight.compare import differences, failure, offset, ring, skew, untested, whole
from peergrad.preflight.report import Answer, Job, Outcome, Report


def report(rank: int, **facts: str) -> Report:
    return Report(
        rank=rank,
        host=f"gpu0{rank}",
        address=f"10.0.0.{rank}",
        ports=(21_000 + rank, 22_000 + rank),
        gpus=8,
        seen=100.0,
        said=104.0,
        facts={"torch": "2.12.0", "sglang": "0.5.23", **facts},
    )


def test_the_node_that_differs_from_most_is_named() -> None:
    found = differences([report(0, torch="2.11.0"), report(1), report(2), report(3, driver="535")])
    assert list(found) == [0, 3]
    assert found[0] == [
        "torch = '2.11.0': 3 of 4 nodes have '2.12.0'; have all nodes use one environment and one "
        "model, on a shared disk"
    ]
    assert found[3][0].startswith("driver = '535': 3 of 4 nodes have 'none'; ")


def test_of_two_the_first_is_right() -> None:
    assert list(differences([report(1, torch="2.11.0"), report(0)])) == [1]


@pytest.mark.parametrize("ahead", [-300.0, -6.5, -4.0, 0.0, 4.0, 6.5, 300.0])
def test_clocks(ahead: float) -> None:
    """The node saw the order 0.5 s after it was written, at 1000 of the first node's clock; its
    report was written at 1004 and read at 1004.9."""
    told = replace(report(1), seen=1000.5 + ahead, said=1004 + ahead)
    low, high = offset(told, 1000.0, 1004.9)
    assert low <= ahead <= high and high - low == pytest.approx(1.4)
    line = skew(told, 1000.0, 1004.9)
    assert (line is None) == (abs(ahead) < 5)
    if ahead == 300:
        assert line == (
            "clock = 'ahead': is off by 299.8 s (+- 0.7 s) from the first node's; see chronyc "
            "tracking there; start chronyd or ntpd"
        )


def test_a_clock_that_may_be_right_is_not_blamed() -> None:
    """A report that was read 20 s after it was written tells less."""
    told = replace(report(1), seen=1001 - 6.5, said=1004 - 6.5)
    assert skew(told, 1000.0, 1024.0) is not None  # 5.5 s behind at least
    assert skew(replace(told, seen=1001.0), 1000.0, 1024.0) is None


NODES = [report(rank) for rank in range(4)]
DONE = STAGES[-1]


def answers(jobs: tuple[Job, ...], broken: set[str], rate: float = 10.0) -> dict[str, Answer]:
    """What four nodes answer if every job with a host of ``broken`` hangs."""

    def outcome(job: Job, host: str) -> Outcome:
        if broken.isdisjoint(job.hosts):
            return Outcome(job.name, DONE, rate)
        return Outcome(job.name, STAGES[1 if host in broken else 2])

    return {
        host: Answer(tuple(outcome(job, host) for job in jobs if host in job.hosts))
        for host in (node.host for node in NODES)
    }


def test_every_node_is_in_two_pairs_with_ports_of_their_own() -> None:
    pairs = ring(NODES)
    assert [job.hosts for job in pairs] == [
        ("gpu00", "gpu01"),
        ("gpu01", "gpu02"),
        ("gpu02", "gpu03"),
        ("gpu03", "gpu00"),
    ]
    assert [(job.address, job.port) for job in pairs][3] == ("10.0.0.3", 22_003)
    assert len({job.port for job in (*pairs, whole(NODES))}) == 5
    assert [job.hosts for job in ring(NODES[:2])] == [("gpu00", "gpu01")]
    assert ring(NODES[:1]) == ()


def test_the_node_between_two_failed_pairs_is_at_fault_and_not_its_neighbours() -> None:
    pairs = ring(NODES)
    found = untested(pairs, answers(pairs, {"gpu02"}), 0.0)
    assert list(found) == ["gpu02"]
    assert found["gpu02"][0] == "gpu01 and gpu02: gpu02 came no further than loading torch in time"
    assert untested(pairs, answers(pairs, set()), 10.0) == {}
    assert len(untested(pairs, answers(pairs, set()), 10.1)) == 4


def test_a_failed_all_reduce_names_who_came_least_far() -> None:
    job = whole(NODES)
    assert failure(job, answers((job,), set()), 0.0) is None
    said = failure(job, answers((job,), {"gpu01", "gpu03"}), 0.0)
    assert said == "gpu01, gpu03 came no further than loading torch in time"
    said = failure(job, answers((job,), set()), 40.0)
    assert said == "10.00 GB/s, at least 40 are asked for"
    found = answers((job,), set())
    del found["gpu02"]
    assert failure(job, found, 0.0) == "gpu02 said nothing of it"


def test_who_failed_by_itself_is_told_from_those_that_notice_and_those_that_wait() -> None:
    job = whole(NODES)
    found = answers((job,), {node.host for node in NODES})
    found["gpu00"] = Answer((Outcome(job.name, STAGES[2], error="Connection closed by peer"),))
    found["gpu02"] = Answer((Outcome(job.name, STAGES[3], error="no interface ib9"),))
    assert failure(job, found, 0.0) == "gpu02 failed after meeting the others (no interface ib9)"
