"""What all tests share: one model, and one server of it that runs and tests take in turns."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.servers import SharedServer

# As `make` sets them, also for a bare `pytest`, and before anything starts threads: ranks and
# servers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# A shell that starts the tests in the background has them ignore Ctrl-C, and with them every run
# that is to be interrupted.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers with a vocabulary that is no multiple of any padding."""
    from tests.models import make_hf_model

    return make_hf_model(tmp_path_factory.mktemp("model"), layers=2, vocab=100)


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[SharedServer]":
    """A server that is there for the whole session: it holds whatever weights its last user sent.
    Whoever needs those of ``model`` sends them, as every run does when it starts."""
    from tests.servers import SharedServer

    with SharedServer(model, tmp_path_factory.mktemp("server")) as shared:
        yield shared
