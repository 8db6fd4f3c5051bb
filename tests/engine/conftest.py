import pytest
from transformers import AutoModelForCausalLM

from peergrad.config import Dtype, ServersConfig
from peergrad.rollout.servers import ManagedServers
from tests.models import make_hf_model

VOCAB = 100  # no multiple of 64: the server appends rows


@pytest.fixture(scope="session")
def paths(tmp_path_factory):
    """Two checkpoints of one architecture and different weights."""
    root = tmp_path_factory.mktemp("models")
    pytest.importorskip("sglang")
    return {
        name: make_hf_model(root / name, seed=seed, layers=2, vocab=VOCAB)
        for seed, name in enumerate("AB")
    }


@pytest.fixture(scope="session")
def models(paths):
    return {name: AutoModelForCausalLM.from_pretrained(path) for name, path in paths.items()}


@pytest.fixture(scope="session")
def start(paths, tmp_path_factory):
    """Builds a server of checkpoint A."""

    def build() -> ManagedServers:
        return ManagedServers(
            ServersConfig(start_timeout=240.0),
            model_path=str(paths["A"]),
            dtype=Dtype.float32,
            log_dir=tmp_path_factory.mktemp("logs"),
        )

    return build
