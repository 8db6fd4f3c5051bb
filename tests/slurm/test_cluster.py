"""Emulated nodes are as separate as those of a real cluster."""

import pytest

from tests.slurm.cluster import SUBNET, Cluster

pytestmark = pytest.mark.slurm


def test_nodes_are_machines_of_their_own(cluster: Cluster) -> None:
    """Names, addresses, processes and /tmp; what is shared is shared."""
    folder = cluster.folder / "machines"
    folder.mkdir()
    one, two = map(cluster.name, (1, 2))
    script = (
        f"touch /tmp/of-$(hostname) {folder}/$(hostname); sleep 1; "
        f"echo $(hostname) $(hostname -I) $(getent hosts {two} | cut -d' ' -f1) $(ls /tmp/of-*)"
    )
    said = cluster.slurm("srun", "-N2", "--export=ALL", "bash", "-c", script).splitlines()
    assert sorted(said) == [
        f"{one} {SUBNET}.1 {SUBNET}.2 /tmp/of-{one}",
        f"{two} {SUBNET}.2 {SUBNET}.2 /tmp/of-{two}",
    ]
    assert {path.name for path in folder.iterdir()} == {one, two}
