"""The cause of a server's end, in logs of servers that ended so (SGLang 0.5.23), shortened."""

import pytest

from peergrad.rollout.server_log import cause

SERVING = """\
[2026-11-30 08:57:38] INFO:     Application startup complete.
"""
FREEZE_FAILED = """\
[2026-11-30 08:57:49] post-warmup freeze_gc failed
Traceback (most recent call last):
  File "urllib3/connectionpool.py", line 540, in _make_request
    response = conn.getresponse()
TimeoutError: timed out

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "requests/adapters.py", line 742, in send
    raise ReadTimeout(e, request=request)
requests.exceptions.ReadTimeout: HTTPConnectionPool(host='127.0.0.1', port=30988): Read timed out.
[2026-11-30 08:57:49] The server is fired up and ready to roll!
"""
IN_USE = f"""\
{SERVING}\
[2026-11-30 08:57:38] ERROR:    [Errno 98] error while attempting to bind on address \
('127.0.0.1', 30988): address already in use
[2026-11-30 08:57:38] INFO:     Waiting for application shutdown.
{FREEZE_FAILED}\
[2026-11-30 08:57:49] kill_process_tree called: parent_pid=19276, include_parent=False, pid=19276
"""
# The bar of the weights ends without a line break; another worker fails because the first did.
SHAPE = """\
[2026-11-30 08:57:30 TP0] Load weight begin. avail mem=17.45 GB
Multi-thread loading shards:   0% Completed | 0/1 [00:00<?, ?it/s]\
[2026-11-30 08:57:31 TP0] Scheduler hit an exception: Traceback (most recent call last):
  File "sglang/srt/managers/scheduler.py", line 6346, in run_scheduler_process
    scheduler = Scheduler(server_args, port_args)
  File "sglang/srt/layers/vocab_parallel_embedding.py", line 436, in weight_loader
    assert loaded_weight.shape[output_dim] == (
AssertionError: self.org_vocab_size=64 loaded_weight.shape[output_dim]=3

[2026-11-30 08:57:31 TP1] Scheduler hit an exception: Traceback (most recent call last):
  File "torch/distributed/distributed_c10d.py", line 2800, in all_reduce
    work.wait()
RuntimeError: Connection closed by peer [127.0.0.1]:23817

[2026-11-30 08:57:31] Received sigquit from a child process. It usually means the child failed.
[2026-11-30 08:57:31] kill_process_tree called: parent_pid=19278, include_parent=True, pid=19278
Multi-thread loading shards:   0% Completed | 0/1 [00:00<?, ?it/s]
"""
KILLED = f"""\
{SERVING}{FREEZE_FAILED}\
[2026-11-30 08:57:41] INFO:     127.0.0.1:49900 - "GET /health HTTP/1.1" 200 OK
[2026-11-30 08:57:43] Subprocess scheduler_0 (pid=19293) crashed with exit code -9. \
Triggering SIGQUIT for cleanup...
[2026-11-30 08:57:43] Received sigquit from a child process. It usually means the child failed.
[2026-11-30 08:57:43] kill_process_tree called: parent_pid=19279, include_parent=True, pid=19279
"""
FAULT = """\
[2026-11-30 08:57:44] INFO:     127.0.0.1:54562 - "GET /health HTTP/1.1" 200 OK
Fatal Python error: Segmentation fault

Thread 0x00007fad9f7e66c0 (most recent call first):
  File "sglang/srt/utils/watchdog.py", line 147 in _watchdog_once
[2026-11-30 08:57:48] Subprocess scheduler_0 (pid=19433) crashed with exit code -11. \
Triggering SIGQUIT for cleanup...
"""
NO_MODEL = """\
[2026-11-30 08:57:26] \x1b[1;33m'--disable-cuda-graph' is deprecated.\x1b[0m
[2026-11-30 08:57:26] kill_process_tree called: parent_pid=19277, include_parent=False, pid=19277
Traceback (most recent call last):
  File "sglang/launch_server.py", line 84, in <module>
    run_server(server_args)
ValueError: Unrecognized model in /models/x. Should have a `model_type` key in its config.json.
"""
USAGE = """\
usage: sglang serve [-h] --model-path MODEL_PATH
                    [--reasoning-parser {auto,deepseek-r1}]
sglang serve: error: unrecognized arguments: --max-total-tokns 9
"""
# No traceback of SGLang's own: its worker ended before it could catch any.
UNCAUGHT = """\
[2026-11-30 08:57:26] Init parallel begin.
Process Process-1:
Traceback (most recent call last):
  File "multiprocessing/process.py", line 314, in _bootstrap
    self.run()
ModuleNotFoundError: No module named 'sgl_kernel'
[2026-11-30 08:57:28] Subprocess scheduler_0 (pid=19433) crashed with exit code 1. \
Triggering SIGQUIT for cleanup...
"""


@pytest.mark.parametrize(
    ("log", "line"),
    [
        (
            IN_USE,
            "ERROR: [Errno 98] error while attempting to bind on address ('127.0.0.1', 30988): "
            "address already in use",
        ),
        (SHAPE, "AssertionError: self.org_vocab_size=64 loaded_weight.shape[output_dim]=3"),
        (
            KILLED,
            "Subprocess scheduler_0 (pid=19293) crashed with exit code -9. Triggering SIGQUIT for "
            "cleanup...",
        ),
        (FAULT, "Fatal Python error: Segmentation fault"),
        (
            NO_MODEL,
            "ValueError: Unrecognized model in /models/x. Should have a `model_type` key in its "
            "config.json.",
        ),
        (USAGE, "sglang serve: error: unrecognized arguments: --max-total-tokns 9"),
        (UNCAUGHT, "ModuleNotFoundError: No module named 'sgl_kernel'"),
        (
            UNCAUGHT.replace("ModuleNotFoundError", "SystemExit"),
            "Subprocess scheduler_0 (pid=19433) crashed with exit code 1. Triggering SIGQUIT for "
            "cleanup...",
        ),
        (SERVING + FREEZE_FAILED, None),  # it went on, until somebody killed it
        ("torch.OutOfMemoryError: no memory\n", "torch.OutOfMemoryError: no memory"),
        ("Error rate 3\nno Error: here\nall fine\n", None),
        ("", None),
    ],
    ids=[
        *("port in use", "a worker's exception", "a worker killed", "a worker's fault"),
        *("model", "arguments", "uncaught", "a worker ended", "killed", "bare", "fine", "empty"),
    ],
)
def test_the_line_of_a_log_that_tells(tmp_path, log, line):
    (tmp_path / "log").write_text(log)
    assert cause(tmp_path / "log") == line


def test_a_log_that_is_not_there_tells_nothing(tmp_path):
    assert cause(tmp_path / "none") is None


def test_of_a_long_log_the_end_counts(tmp_path):
    filler = '[2026-11-30 08:57:38] INFO:     127.0.0.1:1 - "POST /generate HTTP/1.1" 200 OK\n'
    (tmp_path / "log").write_text(USAGE + filler * 10_000 + KILLED)
    assert str(cause(tmp_path / "log")).startswith("Subprocess scheduler_0 (pid=19293) crashed")
