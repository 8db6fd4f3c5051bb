"""A managed SGLang server ends with its trainer, however that ends."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.servers import is_alive, managed

REPO = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.engine

TRAINER = """
import sys, time
from pathlib import Path
import psutil
from tests.servers import managed

with managed(*map(Path, sys.argv[1:])):
    print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    time.sleep(600)
"""


def test_stop_leaves_no_process(model, tmp_path):
    before = set(psutil.Process().children(recursive=True))
    with managed(model, tmp_path):
        tree = set(psutil.Process().children(recursive=True)) - before
        assert len(tree) >= 3  # launcher, scheduler, detokenizer
    assert not any(map(is_alive, tree))


@pytest.mark.slow
def test_a_killed_trainer_leaves_no_server(model, tmp_path):
    command = [sys.executable, "-c", TRAINER, str(model), str(tmp_path)]
    trainer = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
    tree = [psutil.Process(int(pid)) for pid in trainer.stdout.readline().split()]
    assert len(tree) >= 3
    trainer.send_signal(signal.SIGKILL)
    trainer.communicate()
    _, alive = psutil.wait_procs(tree, timeout=15)
    assert not any(map(is_alive, alive))
