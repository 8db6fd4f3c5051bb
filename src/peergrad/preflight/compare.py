"""What only shows when the reports of several nodes lie side by side."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from peergrad.echo import LOST
from peergrad.preflight.collective import STAGES
from peergrad.preflight.report import Answer, Job, Outcome, Report, problem

SKEW_SECONDS = 5.0
"""Logs of several nodes can no longer be read together; certificates and file times go wrong."""


def differences(reports: Sequence[Report]) -> dict[int, list[str]]:
    """Rank -> what differs there from most nodes; of equally many, from the first node's."""
    found: dict[int, list[str]] = defaultdict(list)
    ordered = sorted(reports, key=lambda report: report.rank)
    for key in dict.fromkeys(key for report in ordered for key in report.facts or {}):
        told = {report.rank: (report.facts or {}).get(key, "none") for report in ordered}
        usual, number = Counter(told.values()).most_common(1)[0]  # the first of equals
        for rank, value in told.items():
            if value != usual:
                rule = f"{number} of {len(told)} nodes have {usual!r}"
                remedy = "have all nodes use one environment and one model, on a shared disk"
                found[rank].append(problem(key, value, rule, remedy))
    return found


def offset(report: Report, asked: float, heard: float) -> tuple[float, float]:
    """Bounds of how many seconds the clock of a node is ahead of the first one's: it saw the order
    after that was written (``asked``), and wrote its report before that was read (``heard``), both
    by the first node's clock."""
    return report.said - heard, report.seen - asked


def skew(report: Report, asked: float, heard: float) -> str | None:
    """What is wrong with its clock, if that is certain."""
    low, high = offset(report, asked, heard)
    if low <= SKEW_SECONDS and high >= -SKEW_SECONDS:
        return None
    middle, half = (low + high) / 2, abs(high - low) / 2
    rule = f"is off by {abs(middle):.1f} s (+- {half:.1f} s) from the first node's"
    ahead = "ahead" if middle > 0 else "behind"
    return problem("clock", ahead, rule, "see chronyc tracking there; start chronyd or ntpd")


def ring(reports: Sequence[Report]) -> tuple[Job, ...]:
    """All-reduces of two nodes each, every node with two others if there are so many."""
    hosts = [report.host for report in reports]
    number = len(hosts)
    pairs = [(i, (i + 1) % number) for i in range(number if number > 2 else number - 1)]
    return tuple(
        Job(f"{hosts[a]} and {hosts[b]}", (hosts[a], hosts[b]), reports[a].address, port)
        for a, b in pairs
        for port in reports[a].ports[1:2]
    )


def whole(reports: Sequence[Report]) -> Job:
    """The all-reduce of all."""
    hosts = tuple(report.host for report in reports)
    name = f"all {len(hosts)} nodes" if hosts[1:] else hosts[0]
    return Job(name, hosts, reports[0].address, reports[0].ports[0])


def failure(job: Job, answers: Mapping[str, Answer], least: float) -> str | None:
    """What came of ``job`` other than a sum in time at ``least`` GB/s, and on which nodes: those
    that failed by themselves, else those that came least far. None if all is well."""
    outcomes = _outcomes(job, answers)
    own = [host for host, o in outcomes.items() if o.error and not any(w in o.error for w in LOST)]
    if own:  # the others wait for these, or notice that they have gone
        first = outcomes[own[0]]
        return f"{', '.join(own)} failed after {first.stage} ({first.error})"
    silent = [host for host in job.hosts if host not in outcomes]
    if silent:
        return f"{', '.join(silent)} said nothing of it"
    stages = {host: STAGES.index(outcome.stage) for host, outcome in outcomes.items()}
    least_far = min(stages.values())
    if least_far < len(STAGES) - 1:
        last = [host for host, stage in stages.items() if stage == least_far]
        where = "all of them" if len(last) == len(stages) else ", ".join(last)
        return f"{where} came no further than {STAGES[least_far]} in time"
    rate = min(outcome.rate for outcome in outcomes.values())
    return None if rate >= least else f"{rate:.2f} GB/s, at least {least:g} are asked for"


def rate(job: Job, answers: Mapping[str, Answer]) -> float:
    """GB/s, of the slowest node."""
    return min(outcome.rate for outcome in _outcomes(job, answers).values())


def _outcomes(job: Job, answers: Mapping[str, Answer]) -> dict[str, Outcome]:
    """Of ``job``, by the hosts that have told."""
    return {
        host: outcome
        for host in job.hosts
        for outcome in (answers[host].outcomes if host in answers else ())
        if outcome.job == job.name
    }


def untested(
    jobs: Sequence[Job], answers: Mapping[str, Answer], least: float
) -> dict[str, list[str]]:
    """Host -> what came of its pairs, for hosts of which every pair has failed: a node beside a bad
    one has another pair to show that it works."""
    failures = {job.name: failure(job, answers, least) for job in jobs}
    found = {}
    for host in dict.fromkeys(host for job in jobs for host in job.hosts):
        mine = [job.name for job in jobs if host in job.hosts]
        if all(failures[name] for name in mine):
            found[host] = [f"{name}: {failures[name]}" for name in mine]
    return found
