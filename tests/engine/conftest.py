from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.models import make_hf_model


@pytest.fixture(scope="session")
def paths(model, tmp_path_factory) -> dict[str, Path]:
    """Two checkpoints of one architecture and different weights; the shared server is of A."""
    b = make_hf_model(tmp_path_factory.mktemp("model_b"), seed=1, layers=2, vocab=100)
    return {"A": model, "B": b}


@pytest.fixture(scope="session")
def models(paths):
    return {name: AutoModelForCausalLM.from_pretrained(path) for name, path in paths.items()}
