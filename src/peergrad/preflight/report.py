"""What the nodes of a preflight say to each other, and the one form of what is wrong with one."""

from dataclasses import dataclass


def problem(key: str, value: object, rule: str, remedy: str) -> str:
    """One line about a node: ``key = value: rule; remedy``."""
    return f"{key} = {value!r}: {rule}; {remedy}"


@dataclass(frozen=True)
class Found:
    """What checks of one node have found.

    Example:
        ``Found(wrong=("ports = 30000: is taken by python (pid 71); ...",), unknown=(),
        facts={"torch": "2.12.0"})``
    """

    wrong: tuple[str, ...] = ()  # a line each
    unknown: tuple[str, ...] = ()  # what could not be asked here: neither good nor bad
    facts: dict[str, str] | None = None  # that must be the same on all nodes

    def __add__(self, other: "Found") -> "Found":
        facts = {**(self.facts or {}), **(other.facts or {})}
        return Found(self.wrong + other.wrong, self.unknown + other.unknown, facts)


@dataclass(frozen=True)
class Report:
    """A node's word on itself, ``<host>.json``.

    Example:
        ``Report(rank=1, host="gpu02", address="gpu02", ports=(21000, 21001), gpus=8,
        seen=1e9, said=1e9 + 4, wrong=(), unknown=(), facts={"torch": "2.12.0"})``
    """

    rank: int
    host: str
    address: str  # at which other nodes reach it
    ports: tuple[int, ...]  # free ones, for the collectives that this node is the first of
    gpus: int
    seen: float  # its clock when it saw the first order; seconds since 1970
    said: float  # its clock when it wrote this
    wrong: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    facts: dict[str, str] | None = None


@dataclass(frozen=True)
class Job:
    """An all-reduce over nodes.

    Example:
        ``Job("gpu01, gpu02", hosts=("gpu01", "gpu02"), address="gpu01", port=21000)``
    """

    name: str
    hosts: tuple[str, ...]
    address: str  # of the first
    port: int


@dataclass(frozen=True)
class Order:
    """What the first node asks of all others, ``order-<number>.json``; number 0 asks for reports.

    Example:
        ``Order(jobs=(Job(...),), seconds=20.0)``
    """

    jobs: tuple[Job, ...] = ()
    seconds: float = 0.0  # that all jobs of the order may take together
    end: bool = False
    first: str = ""  # the first node's name


@dataclass(frozen=True)
class Outcome:
    """How a job went on one node.

    Example:
        ``Outcome("gpu01, gpu02", stage="all sums", rate=21.5)``
    """

    job: str
    stage: str  # the last that all of the node's processes have reached (``collective.STAGES``)
    rate: float = 0.0  # GB/s
    error: str = ""  # none, too, if nothing more came


@dataclass(frozen=True)
class Answer:
    """A node's outcomes of one order, ``<host>.answer-<number>.json``."""

    outcomes: tuple[Outcome, ...] = ()
