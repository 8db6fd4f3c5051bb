"""The first node's part, and the program: collect, compare, try together, say what came of it."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Thread

from peergrad.preflight.compare import (
    differences,
    failure,
    offset,
    rate,
    ring,
    skew,
    untested,
    whole,
)
from peergrad.preflight.exchange import Exchange, until
from peergrad.preflight.node import Node
from peergrad.preflight.options import Options, read_options
from peergrad.preflight.report import Answer, Job, Order, Report, problem
from peergrad.running.ending import FAILED, FINISHED, WRONG, one_line, write_traceback
from peergrad.storage import StorageError, replace_text

SOME = 3
"""Exit status: some nodes are bad, but as many are good as are needed. Above the others, since a
launcher of several processes reports the highest."""
MARGIN_SECONDS = 2.0
TOGETHER = "all-reduce"
FABRIC = "see ibstat, NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, and firewalls; leave that node out"


@dataclass
class Lead:
    """The first node's part beside that of a node.

    Example:
        ``Lead(options, exchange, end=time.monotonic() + 60).run()``
    """

    options: Options
    exchange: Exchange
    end: float  # of time.monotonic
    wrong: dict[int, list[str]] = field(default_factory=dict)  # by rank
    reports: dict[int, Report] = field(default_factory=dict)
    _heard: dict[int, float] = field(default_factory=dict)
    _orders: int = 0
    _tested: str = ""

    def run(self) -> int:
        """The exit status, once everything is said; no node is left waiting."""
        begin = time.monotonic()
        asked = time.time()
        self.exchange.open()
        try:
            self._collect(begin + self.options.reporting)
            self._compare(asked)
            self._try_together()
        finally:
            self._order(Order(end=True))
        return self._say(time.monotonic() - begin, asked)

    def _collect(self, end: float) -> None:
        def ask() -> bool | None:
            self.reports = {
                rank: report
                for rank, report in self.exchange.reports().items()
                if rank < self.options.nodes
            }
            for rank in self.reports:
                self._heard.setdefault(rank, time.time())
            return True if len(self.reports) == self.options.nodes else None

        until(end, ask, self.exchange.refresh)

    def _compare(self, asked: float) -> None:
        """Fill ``wrong`` with everything but what nodes do together."""
        for rank in range(self.options.nodes):
            report = self.reports.get(rank)
            self.wrong[rank] = [self._silent()] if report is None else list(report.wrong)
        for rank, lines in differences(list(self.reports.values())).items():
            self.wrong[rank] += lines
        for rank, report in self.reports.items():
            fault = self.exchange.canary_of(report.host)
            if fault is not None:
                remedy = "mount one file system on all nodes"
                rule = f"its file {fault} on the first node"
                self.wrong[rank].append(problem("--shared", self._shared, rule, remedy))
            late = skew(report, asked, self._heard[rank])
            self.wrong[rank] += [late] if late else []

    @property
    def _shared(self) -> str:
        return str(self.options.folder.parent)

    def _silent(self) -> str:
        rule = f"said nothing in {self._shared} within {self.options.reporting:g} s"
        remedy = "see whether it runs, sees that folder and loads Python in time (--deadline)"
        return f"{rule}; {remedy}"

    def _good(self) -> list[Report]:
        return [self.reports[rank] for rank in sorted(self.reports) if not self.wrong[rank]]

    def _try_together(self) -> None:
        """An all-reduce of all good nodes; if it fails, of pairs, to tell who is at fault."""
        good = self._good()
        if not good or (len(good) == 1 and good[0].gpus < 2):
            return
        least, job = self.options.min_rate, whole(good)
        answers = self._do([job], (self._left() - MARGIN_SECONDS) / 2, patient=False)
        why = failure(job, answers, least)
        if why is None:
            self._tested = f", {TOGETHER} {rate(job, answers):.3g} GB/s"
            return
        pairs = ring(good)
        found = {good[0].host: [why]}
        if pairs:  # both of a node's run at once
            answers = self._do(pairs, self._left() - MARGIN_SECONDS)
            found = untested(pairs, answers, least / 2)
        remedy = FABRIC
        if not found:  # each pair works, all together do not: nobody is known to be good
            found = {report.host: [f"{job.name}: {why}"] for report in good}
            remedy = "every pair works; look at the switches between them, or raise --deadline"
        self._tested = f"; {TOGETHER} of {job.name} failed"
        for report in good:
            for text in found.get(report.host, [])[:1]:
                self.wrong[report.rank].append(f"{TOGETHER} failed: {text}; {remedy}")

    def _left(self) -> float:
        return max(1.0, self.end - time.monotonic())

    def _do(
        self, jobs: Sequence[Job], seconds: float, *, patient: bool = True
    ) -> Mapping[str, Answer]:
        """Have nodes do ``jobs``; the answers by host of those that came in time. Unless
        ``patient``, the first that has failed ends it, soon."""
        number = self._order(Order(tuple(jobs), seconds))
        hosts = {host for job in jobs for host in job.hosts}
        failed: list[float] = []  # when that was first heard

        def ask() -> dict[str, Answer] | None:
            found = self._answers(hosts, number)
            if any(outcome.error for answer in found.values() for outcome in answer.outcomes):
                failed.append(time.monotonic())
            lost = not patient and failed and time.monotonic() > failed[0] + MARGIN_SECONDS
            return found if lost or len(found) == len(hosts) else None

        end = time.monotonic() + seconds + MARGIN_SECONDS
        return until(end, ask, self.exchange.refresh) or self._answers(hosts, number)

    def _answers(self, hosts: set[str], number: int) -> dict[str, Answer]:
        heard = {host: self.exchange.hear(f"{host}.answer-{number}.json", Answer) for host in hosts}
        return {host: answer for host, answer in heard.items() if answer is not None}

    def _order(self, order: Order) -> int:
        self._orders += 1
        self.exchange.say(f"order-{self._orders}.json", order)
        return self._orders

    def _say(self, seconds: float, asked: float) -> int:
        """A line for each bad node, one for all, and the list of the good ones."""
        good, number = self._good(), self.options.nodes
        bad = [(self._name(rank), lines) for rank, lines in sorted(self.wrong.items()) if lines]
        self._list("good_nodes", [report.host for report in good])
        self._list("bad_nodes", [f"{name}: {line}" for name, lines in bad for line in lines])
        for name, lines in bad:
            more = f" (and {len(lines) - 1} more, see bad_nodes)" if lines[1:] else ""
            print(f"{name}: {lines[0]}{more}", file=sys.stderr)
        notes = self._tested
        gpus = {report.gpus for report in good}
        notes = f", {gpus.pop()} GPUs each{notes}" if gpus and gpus != {0} else notes
        if number > 1 and good:
            notes += f", clocks within {self._apart(good, asked):.1f} s"
        for text, nodes in self._unknown(good).items():
            notes += f"; not known: {text} ({nodes} nodes)"
        where = self.options.folder
        print(f"{len(good)} of {number} nodes are good{notes}; {seconds:.0f} s, reports in {where}")
        return (
            FINISHED if len(good) == number else SOME if len(good) >= self.options.need else FAILED
        )

    def _name(self, rank: int) -> str:
        return self.reports[rank].host if rank in self.reports else self.options.names[rank]

    def _list(self, name: str, lines: Sequence[str]) -> None:
        replace_text(self.options.folder / name, "".join(f"{line}\n" for line in lines))

    def _apart(self, good: Sequence[Report], asked: float) -> float:
        """The largest difference to the first node's clock that is possible, in seconds."""
        bounds = (offset(report, asked, self._heard[report.rank]) for report in good)
        return max(max(abs(low), abs(high)) for low, high in bounds)

    def _unknown(self, good: Sequence[Report]) -> dict[str, int]:
        found: dict[str, int] = {}
        for report in good:
            for text in report.unknown:
                found[text] = found.get(text, 0) + 1
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Check this node and, on the first one, all of them; the exit status."""
    try:
        options = read_options(sys.argv[1:] if arguments is None else arguments)
    except ValueError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return WRONG
    end = time.monotonic() + options.deadline
    node = Node(options, Exchange(options.folder, options.host), end)
    part, status = _start(node.run, options.host)
    if options.rank == 0:
        lead = Lead(options, Exchange(options.folder, options.host), end)
        part, status = _start(lead.run, options.host)
    while part.is_alive() and time.monotonic() < node.end + MARGIN_SECONDS:
        part.join(0.1)
    if part.is_alive():
        rule = f"has not ended within {options.deadline:g} s, while {node.doing}"
        print(f"{options.host}: {rule}; see to that, or raise --deadline", file=sys.stderr)
        status.append(FAILED)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status[0])  # not waiting for what hangs


def _start(part: Callable[[], int], host: str) -> tuple[Thread, list[int]]:
    """Run ``part`` beside this thread; its exit status comes into the list."""
    status: list[int] = []

    def run() -> None:
        try:
            status.append(part())
        except Exception as error:
            why = str(error)
            if not isinstance(error, StorageError):
                why = f"{one_line(error)} (log: {write_traceback(error)})"
            print(f"{host}: {why}", file=sys.stderr)
            status.append(FAILED)

    thread = Thread(target=run, daemon=True)
    thread.start()
    return thread, status
