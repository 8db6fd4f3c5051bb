import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_not

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of four nodes, all idle; whoever takes one down boots it again. What is left of it
    at the end of the session is an error."""
    if reason := why_not():
        pytest.skip(reason)
    folder, everything = tmp_path_factory.mktemp("slurm"), tmp_path_factory.getbasetemp()
    shared = [everything, REPO, Path(sys.prefix).resolve()]
    with Cluster(folder, nodes=4, shared=shared) as emulated:
        yield emulated
    assert not emulated.left_behind()
