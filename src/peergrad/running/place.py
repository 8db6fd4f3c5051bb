"""Which of a run's processes this is, as its launcher says."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from peergrad.config import require

TASKS = {  # what a launcher that is not torchrun calls the number of its processes
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Rank of this process and number of all.

    Example:
        ``Place(rank=3, world=8)``
    """

    rank: int
    world: int

    @property
    def name(self) -> str:
        """For a message: which rank, where."""
        return f"rank {self.rank} on {socket.gethostname()}"


def find_place(environment: Mapping[str, str] = os.environ) -> Place:
    """What ``torchrun`` or a launcher like it has said; a run of one process without one.

    A ``WORLD_SIZE`` alone is a question (of ``--check``): what would so many processes do?
    Raises ValueError if several processes were started that do not know of each other, or if what
    is said makes no sense.
    """
    if "RANK" not in environment:
        for variable, launcher in TASKS.items():
            tasks = environment.get(variable, "1")
            require(
                tasks == "1",
                variable,
                tasks,
                f"{launcher} has started {tasks} processes that have no RANK: each would be a run "
                "of its own",
                f"have {launcher} start torchrun once per node, or set "
                f"{', '.join(TORCHRUN)} and LOCAL_RANK for each process",
            )
        return Place(0, _number(environment, "WORLD_SIZE", 1))
    missing = [name for name in TORCHRUN if name not in environment]
    require(
        not missing,
        "RANK",
        environment["RANK"],
        f"is set, but {', '.join(missing)} not",
        "start with torchrun, or unset RANK for a run of one process",
    )
    place = Place(_number(environment, "RANK", 0), _number(environment, "WORLD_SIZE", 1))
    require(
        0 <= place.rank < place.world,
        "RANK",
        place.rank,
        f"must lie below WORLD_SIZE ({place.world})",
        "start with torchrun",
    )
    return place


def require_launcher(place: Place, environment: Mapping[str, str] = os.environ) -> None:
    """ValueError if ``place`` has a ``WORLD_SIZE`` of several and no ``RANK``: only a check may ask
    what so many processes would do."""
    require(
        place.world == 1 or "RANK" in environment,
        "WORLD_SIZE",
        place.world,
        "is set, but RANK is not: this process would wait for others that nobody has started",
        "start with python -m peergrad.launch --nproc-per-node N, or unset it",
    )


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    require(text.isdecimal(), name, text, "must be a whole number", "start with torchrun")
    return int(text)
