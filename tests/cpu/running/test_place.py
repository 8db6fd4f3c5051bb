"""Several processes that do not know of each other are refused."""

import pytest

from peergrad.running.place import Place, find_place, require_launcher

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


def test_places() -> None:
    assert find_place({}) == Place(0, 1)
    assert find_place({"WORLD_SIZE": "4"}) == Place(0, 4)  # a check of what four would do
    assert find_place(TORCHRUN) == Place(3, 8)
    assert find_place({**TORCHRUN, "SLURM_STEP_NUM_TASKS": "8"}) == Place(3, 8)
    assert find_place({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}) == Place(0, 1)


def test_a_run_of_several_needs_a_launcher() -> None:
    require_launcher(Place(0, 1), {})
    require_launcher(Place(3, 8), TORCHRUN)
    with pytest.raises(ValueError, match=r"^WORLD_SIZE = 4: is set, but RANK is not: .*; start "):
        require_launcher(Place(0, 4), {"WORLD_SIZE": "4"})


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS = '4': srun has started 4 processes"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE = '2': mpirun has started 2"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE = '2': mpiexec has started 2 processes that have no RANK"),
        ({"RANK": "0"}, "RANK = '0': is set, but WORLD_SIZE, MASTER_ADDR, MASTER_PORT not; "),
        ({**TORCHRUN, "RANK": "8"}, "RANK = 8: must lie below WORLD_SIZE (8); "),
        ({**TORCHRUN, "RANK": "-1"}, "RANK = '-1': must be a whole number; "),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two': must be a whole number; "),
    ],
)
def test_nonsense(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        find_place(environment)
    assert str(error.value).startswith(message) and "; " in str(error.value)
