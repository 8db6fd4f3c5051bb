"""Emulated nodes are as separate as those of a real cluster."""

import pytest

from tests.slurm.cluster import SUBNET, Cluster

pytestmark = pytest.mark.slurm


def test_nodes_are_machines_of_their_own(cluster: Cluster) -> None:
    """Names, addresses, processes and /tmp; what is shared is shared."""
    folder = cluster.folder / "machines"
    folder.mkdir()
    script = (
        f"touch /tmp/of-$(hostname) {folder}/$(hostname); sleep 1; "
        "echo $(hostname) $(hostname -I) $(getent hosts gpu02 | cut -d' ' -f1) $(ls /tmp/of-*)"
    )
    said = cluster.slurm("srun", "-N2", "--export=ALL", "bash", "-c", script).splitlines()
    assert sorted(said) == [f"gpu0{i} {SUBNET}.{i} {SUBNET}.2 /tmp/of-gpu0{i}" for i in (1, 2)]
    assert {path.name for path in folder.iterdir()} == {"gpu01", "gpu02"}
