"""A managed SGLang server ends with its trainer, however that ends."""

import signal
import subprocess
import sys

import psutil
import pytest

pytestmark = pytest.mark.engine

TRAINER = """
import sys, time
from pathlib import Path
import psutil
from peergrad.config import Dtype, ServersConfig
from peergrad.rollout.servers import ManagedServers

model, logs = sys.argv[1:]
config = ServersConfig(start_timeout=240.0)
with ManagedServers(config, model_path=model, dtype=Dtype.float32, log_dir=Path(logs)):
    print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    time.sleep(600)
"""


def test_stop_leaves_no_process(start):
    before = set(psutil.Process().children(recursive=True))
    with start():
        tree = set(psutil.Process().children(recursive=True)) - before
        assert len(tree) >= 3  # launcher, scheduler, detokenizer
    assert not any(process.is_running() for process in tree)


def test_a_killed_trainer_leaves_no_server(paths, tmp_path):
    command = [sys.executable, "-c", TRAINER, str(paths["A"]), str(tmp_path)]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    tree = [psutil.Process(int(pid)) for pid in trainer.stdout.readline().split()]
    assert len(tree) >= 3
    trainer.send_signal(signal.SIGKILL)
    trainer.communicate()
    _, alive = psutil.wait_procs(tree, timeout=15)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)
