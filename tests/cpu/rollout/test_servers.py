"""Managed servers with stand-ins for SGLang: start, failure, stop, command line."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from peergrad.config import Dtype, Fp8Serving, ServerMode, ServersConfig
from peergrad.rollout import servers as module
from peergrad.rollout.address import Address
from peergrad.rollout.cpu_server import use_threads
from peergrad.rollout.servers import ManagedServers
from tests.cpu.rollout import stand_in
from tests.waiting import PATIENCE_SECONDS, wait_until

REPO = Path(__file__).resolve().parents[3]

# Healthy at once, with a child process, as SGLang has; its log begins with its own number.
HEALTHY = """
import os, subprocess, sys
print(os.getpid(), flush=True)
from http.server import BaseHTTPRequestHandler, HTTPServer
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


both_ways = pytest.mark.parametrize("gpu", [False, True], ids=["forked", "launched"])


@pytest.fixture
def gpu():
    """Whether servers are started as beside a GPU, on whatever machine this is."""
    return False


@pytest.fixture
def managed(tmp_path, monkeypatch, gpu):
    """Builds servers that run a script of ours, given the port."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8 * gpu)
    monkeypatch.setattr(module, "_check_installed", lambda: None)
    monkeypatch.setattr(module, "GRACE_SECONDS", 1.0)
    monkeypatch.setattr(module, "CPU_SERVER", stand_in.__name__)
    monkeypatch.setattr(module, "GPU_SERVER", stand_in.__name__)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPO), str(REPO / "src")]))

    def build(script="", ranks=None, **config):
        config = ServersConfig(**{"start_timeout": PATIENCE_SECONDS, **config})
        built = ManagedServers(
            config, model_path="m", dtype=Dtype.float32, log_dir=tmp_path / "logs", ranks=ranks
        )
        if script:
            port = lambda index: built.urls[index].rpartition(":")[2]  # noqa: E731
            built.options = lambda index: [script, port(index)]
        return built

    return build


def children():
    return psutil.Process().children(recursive=True)


def number(servers, index):
    """The process of a HEALTHY server."""
    return int(servers.log(index).read_text().split()[0])


def has_ended(process):
    """Gone, or dead and waiting for its new parent to notice."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@both_ways
def test_servers_start_and_leave_nothing_behind(managed, tmp_path, gpu):
    before = set(children())
    servers = managed(HEALTHY, count=2)
    with servers:
        assert len(set(servers.urls)) == 2
        started = set(children()) - before
        assert len(started) == (4 if gpu else 5)  # the nursery
        pids = [number(servers, index) for index in range(2)]
        assert len({os.getsid(0), *map(os.getsid, pids)}) == 3
        assert {process.pid for process in started} > set(pids)
    wait_until(lambda: all(map(has_ended, started)))
    servers.stop()  # again
    assert servers.log(1) == tmp_path / "logs/server_1.log"


@both_ways
@pytest.mark.parametrize("count", [1, 2])
def test_a_server_that_dies_shows_its_last_words(managed, count):
    script = "print('x' * 9000); print('OSError: no such\\tmodel'); print('Hint'); exit(3)"
    with pytest.raises(RuntimeError) as error:
        managed(script, count=count).__enter__()
    found = re.fullmatch(
        r"rollout\.servers: server (\d) at http://127\.0\.0\.1:\d+ ended with exit code 3 "
        r"\(its log says 'OSError: no such model'\); see .*/logs/server_\1\.log",
        str(error.value),
    )
    assert found and int(found[1]) in range(count)  # whichever dies first


@both_ways
@pytest.mark.parametrize("count", [1, 2])
def test_a_server_that_is_killed_is_known_at_once(managed, count):
    last = count - 1
    with managed(HEALTHY, count=count) as servers:
        assert servers.ended() == servers.ended(wait=0.1) == {}
        os.kill(number(servers, last), signal.SIGKILL)
        wait_until(servers.ended)
        ((url, words),) = servers.ended().items()
        others = [psutil.Process(number(servers, index)) for index in range(last)]
        assert not any(map(has_ended, others))
    assert url == servers.urls[last]
    assert re.fullmatch(
        rf"rollout\.servers: server {last} at {servers.urls[last]} was ended by SIGKILL, perhaps "
        rf"for want of memory; see \S+server_{last}\.log",
        words,
    )
    assert servers.ended() == {}  # stopped, not dead


@pytest.mark.parametrize("own", [{}, {"OMP_NUM_THREADS": "3"}])
def test_forked_servers_have_their_environment(managed, monkeypatch, own):
    """What libraries read when they are loaded is the nursery's, the rest is each server's."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    told = "import os; print('loaded with', os.environ['OMP_NUM_THREADS'])"
    monkeypatch.setenv(stand_in.LOAD, told)
    names = ["OMP_NUM_THREADS", "SGLANG_CPU_OMP_THREADS_BIND"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6, 7})
    script = f"import os; print(*map(os.environ.get, {names}))\n{HEALTHY}"
    with managed(script, count=2, tensor=2) as servers:
        logs = [servers.log(index).read_text().splitlines() for index in range(2)]
    threads = own.get("OMP_NUM_THREADS", "1")
    assert logs[0][:2] == ["loaded with 1", f"{threads} 4|5"]
    assert logs[1][0] == f"{threads} 6|7"


def test_a_server_that_is_late_is_stopped(managed):
    before = set(children())
    servers = managed(
        "import time; print('loading', flush=True); time.sleep(600)", count=2, start_timeout=1.0
    )
    with pytest.raises(RuntimeError, match=r"servers\.start_timeout = 1: server 0.*server_0\.log"):
        servers.__enter__()
    assert set(children()) == before


def test_something_else_is_done_while_they_start(managed):
    before = set(children())
    servers = managed(HEALTHY)
    try:
        servers.start()
        assert len(set(children()) - before) >= 1 and not servers.ended()
        servers.ready()
    finally:
        servers.stop()
    assert set(children()) == before


def test_arguments_that_sglang_refuses_are_said_as_such(managed):
    """The server finds them, and ends; its parser is asked what it is that it does not like."""
    module.check_args({})
    servers = managed("exit(2)", args={"max-total-tokns": 9})
    rule = r"args = {'max-total-tokns': 9}: SGLang has no option max-total-tokns; did you mean max-"
    with pytest.raises(ValueError, match=rule + r"total-tokens\?"):
        servers.__enter__()


def test_a_server_that_would_take_its_time_to_end_is_not_waited_for(managed, monkeypatch):
    """SGLang looks every five seconds whether it has been told to."""
    monkeypatch.setattr(module, "GRACE_SECONDS", 60.0)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + HEALTHY
    before = set(children())
    with managed(deaf):
        began = time.monotonic()
    assert set(children()) == before and time.monotonic() - began < module.GRACE_SECONDS


@both_ways
def test_an_interrupt_while_waiting_leaves_nothing_behind(managed, monkeypatch):
    before = set(children())

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_is_healthy", interrupt)
    with pytest.raises(KeyboardInterrupt):
        managed(HEALTHY).__enter__()
    assert set(children()) == before


def test_a_killed_parent_takes_its_children_along(tmp_path):
    script = (
        "import os, subprocess, sys, time\n"
        "command = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "launch = [sys.executable, '-m', 'peergrad.rollout.launch', str(os.getpid())]\n"
        "print(subprocess.Popen([*launch, *command], start_new_session=True).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    while "launch" in " ".join(child.cmdline()):  # until it has become the command itself
        time.sleep(0.02)
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    wait_until(lambda: has_ended(child))


def test_a_child_of_a_dead_parent_does_not_start():
    command = [sys.executable, "-m", "peergrad.rollout.launch", "1", "echo", "started"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == ""
    assert "the parent process 1 ended" in result.stderr


def test_the_users_options_win(managed):
    args = {
        "max_total_tokens": 99,
        "--sleep-on-idle": False,
        "enable-metrics": True,
        "lora": [1, 2],
    }
    command = " ".join(managed(args=args, count=2, tensor=2).options(1))
    for option in (
        "--max-total-tokens 99",
        "--enable-metrics --lora 1 2",
        "--tp-size 2",
        "--dtype float32",
        "--weight-version 0",
        "--random-seed 1",
        "--disable-cuda-graph",
        "--radix-cache-backend peergrad",
    ):
        assert option in command
    assert "sleep-on-idle" not in command and "32768" not in command


@pytest.mark.skipif(torch.cuda.is_available(), reason="the defaults of a machine without a GPU")
@pytest.mark.parametrize(
    ("shape", "dtype", "tokens"),
    [
        # 2 x 4 layers x 4 heads x 16 x 4 bytes = 2 KiB a token
        ({"layers": 4, "heads": 8, "kv": 4, "width": 16}, Dtype.float32, 262_144),
        # 2 x 8 x 4 x 64 x 2 = 8 KiB; no head_dim: 512 / 8
        ({"layers": 8, "heads": 8, "kv": 4, "hidden": 512}, Dtype.bfloat16, 65_536),
        # 2 x 28 x 8 x 128 x 4 = 224 KiB
        ({"layers": 28, "heads": 16, "kv": 8, "width": 128}, Dtype.float32, 32_768),
        ({"layers": 1, "heads": 1, "kv": 1, "width": 1}, Dtype.float32, 262_144),
        ({"text_config": {}}, Dtype.float32, 32_768),
        (None, Dtype.float32, 32_768),
    ],
)
def test_the_cache_of_a_cpu_server_suits_the_model(tmp_path, shape, dtype, tokens):
    names = {
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv": "num_key_value_heads",
        "width": "head_dim",
        "hidden": "hidden_size",
    }
    if shape is not None:
        config = {names.get(key, key): value for key, value in shape.items()}
        (tmp_path / "config.json").write_text(json.dumps(config))
    servers = ManagedServers(
        ServersConfig(), model_path=str(tmp_path), dtype=dtype, log_dir=tmp_path
    )
    assert f"--max-total-tokens {tokens} " in " ".join(servers.options(0))


@pytest.mark.parametrize("gpu", [True])
def test_each_server_has_gpus_of_its_own(managed):
    servers = managed(args={"base-gpu-id": 4}, count=2, tensor=2)
    assert "--base-gpu-id 4" in " ".join(servers.options(0))
    assert "--base-gpu-id 6" in " ".join(servers.options(1))
    assert "sleep-on-idle" not in servers.options(0)
    assert [*managed(count=2, tensor=2).gpus(1)] == [3, 4]  # behind one rank
    assert [*managed(ranks=0, count=2, tensor=2).gpus(1)] == [2, 3]


@pytest.mark.parametrize("gpu", [True])
@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0)])
def test_servers_in_fp8(managed, monkeypatch, capability):
    asked = []

    def found(gpu):
        asked.append(gpu)
        return capability

    monkeypatch.setattr(torch.cuda, "get_device_capability", found)
    written = []
    servers = managed(fp8=Fp8Serving.block, args={"fp8-gemm-backend": "cutlass"})
    servers._weightless = written.append
    packed = capability >= (10, 0)
    options = " ".join(servers.options(0))
    assert "--load-format dummy" in options and "--quantization" not in options
    assert "--fp8-gemm-backend cutlass" in options  # the user's word
    assert ("--moe-runner-backend triton" in options) == packed
    servers.check()
    assert set(asked) == {1}  # behind the trainer's
    options = " ".join(managed(fp8=Fp8Serving.flash_rl).options(0))
    assert "--quantization fp8 --load-format flash_rl" in options and "triton" not in options
    assert not {"--load-format", "--quantization"} & set(managed().options(0))


def test_the_folder_that_servers_in_fp8_read_is_theirs(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_check_installed", lambda: None)
    monkeypatch.setattr(ManagedServers, "check", lambda self: None)
    monkeypatch.setattr(ManagedServers, "_nursery", lambda self: 1 / 0)
    written = []
    servers = ManagedServers(
        ServersConfig(fp8=Fp8Serving.block, count=2),
        **{"model_path": "m", "dtype": Dtype.bfloat16, "log_dir": tmp_path / "logs"},
        weightless=written.append,
    )
    with pytest.raises(ZeroDivisionError):
        servers.start()
    assert written == [tmp_path / "logs/server_0.model"]
    assert {option(servers, index, "model-path") for index in range(2)} == {str(written[0])}


@pytest.mark.parametrize(
    ("gpu", "capability", "found"),
    [(False, None, "none is seen here"), (True, (8, 6), "the servers have 8.6")],
)
def test_fp8_needs_gpus_that_multiply_in_it(managed, monkeypatch, capability, found):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capability)
    with pytest.raises(ValueError) as error:
        managed(fp8=Fp8Serving.flash_rl).check()
    assert str(error.value) == (
        "rollout.servers.fp8 = 'flash_rl': SGLang serves FP8 on GPUs of compute capability 8.9 and "
        f"up, and {found}; use such GPUs, or set it to off"
    )


@pytest.fixture
def alone(tmp_path, monkeypatch, gpu):
    """Builds servers on a node of their own, beside nobody."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8 * gpu)
    monkeypatch.setattr(module, "_check_installed", lambda: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # of a trainer that has nothing to do with them

    def build(host="node7", first=30000, **config):
        settings = ServersConfig(**config)
        address = Address.row(host, first, settings.count)
        return ManagedServers(
            settings, model_path="m", dtype=Dtype.float32, log_dir=tmp_path, address=address
        )

    return build


def option(servers, index, name):
    options = servers.options(index)
    return options[options.index(f"--{name}") + 1]


def test_a_server_on_a_node_of_its_own_listens_where_it_is_told(alone, tmp_path):
    servers = alone(count=2)
    assert servers.urls == ["http://node7:30000", "http://node7:30001"]
    assert [option(servers, i, "port") for i in range(2)] == ["30000", "30001"]
    assert option(servers, 1, "host") == "node7"
    assert servers.log(1) == tmp_path / "server_node7_30001.log"
    assert option(servers, 1, "weight-version") == "0"  # nobody's


def test_no_two_servers_of_any_node_draw_alike(alone):
    nodes = [alone(host, first, count=4) for host in ("a", "b") for first in (30000, 31000)]
    seeds = {option(servers, i, "random-seed") for servers in nodes for i in range(4)}
    assert len(seeds) == 16 and all(0 <= int(seed) < 2**31 for seed in seeds)
    assert option(alone("a", count=4), 3, "random-seed") in seeds  # again the same


@pytest.mark.parametrize("gpu", [True])
@pytest.mark.parametrize(
    ("config", "gpus"),
    [
        ({"count": 8}, [[0], [1], [2], [3], [4], [5], [6], [7]]),
        ({"count": 2, "tensor": 4}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ({"count": 2, "args": {"base_gpu_id": 6}}, [[6], [7]]),
        ({"count": 2, "tensor": 2, "args": {"--gpu-id-step": 2}}, [[0, 2], [4, 6]]),
    ],
)
def test_servers_on_a_node_of_their_own_share_its_gpus(alone, config, gpus):
    servers = alone(**config)
    servers.check()
    found = [list(servers.gpus(index)) for index in range(len(gpus))]
    assert found == gpus
    first = [option(servers, index, "base-gpu-id") for index in range(len(gpus))]
    assert first == [str(each[0]) for each in gpus]
    assert servers.devices(1) == f"GPU {','.join(map(str, gpus[1]))}"


@pytest.mark.parametrize("gpu", [True])
def test_more_gpus_than_there_are_are_refused(alone):
    with pytest.raises(ValueError) as error:
        alone(count=2, tensor=4, args={"base-gpu-id": 1}).start()
    assert str(error.value) == (
        "rollout.servers.count = 2: servers of rollout.servers.tensor = 4 from GPU 1 on need 9 "
        "GPUs, and 8 are seen here; lower one of the two, or see CUDA_VISIBLE_DEVICES"
    )


def test_the_log_of_an_earlier_start_is_kept(managed):
    servers = managed(HEALTHY)
    servers.log(0).parent.mkdir()
    servers.log(0).write_text("why it ended\n")
    with servers:
        assert number(servers, 0)
    assert Path(f"{servers.log(0)}.old").read_text() == "why it ended\n"


@pytest.mark.parametrize("option", ["port", "enable_deterministic_inference"])
def test_options_that_are_ours_or_harmful_are_refused(managed, option):
    with pytest.raises(ValueError, match=rf"rollout\.servers\.args\.{option} = 1: .*; remove"):
        managed(args={option: 1})


def test_servers_do_not_take_themselves_for_ranks(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("LOCAL_SCRATCH", "/scratch")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "0")
    env = module._environment(0, 1)
    assert not env.keys() & {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"}
    assert "TORCHELASTIC_RUN_ID" not in env
    assert env["LOCAL_SCRATCH"] == "/scratch"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in env
    assert env["NCCL_CUMEM_ENABLE"] == "0"  # as here: both sides must have the same
    assert env["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] == "0"


@pytest.mark.parametrize(("told", "threads"), [("3", 3), ("", 2), ("4,2", 2)])
def test_a_forked_server_computes_with_the_threads_of_its_environment(monkeypatch, told, threads):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    try:
        torch.set_num_threads(2)
        use_threads()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_missing_installation_says_what_to_do(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match=r"needs SGLang.*rollout\.servers\.mode=external"):
        module._check_installed()


def external(*urls, **options):
    return ServersConfig(mode=ServerMode.external, urls=list(urls), **options)


def test_base_urls_lose_their_slash_and_need_no_port():
    urls = ["http://node7:30000/", "https://node8", "http://[::1]:1", "http://127.0.0.1:2"]
    assert external(*urls).urls == ["http://node7:30000", *urls[1:]]


@pytest.mark.parametrize("wait", [0.0, 0.5, 86400.0])
def test_external_servers_may_be_waited_for(wait):
    assert external("http://a:1", wait=wait).wait == wait


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"wait": 600.0}, "600.0: has no effect with mode=managed, whose servers the run starts i"),
        ({"urls": ["http://a:1"], "wait": -1.0}, "-1.0: must be positive and finite; use 600"),
        ({"urls": ["http://a:1"], "wait": math.nan}, "nan: must be positive and finite; use 600"),
        ({"urls": ["http://a:1"], "wait": 1e9}, "1000000000.0: must be at most 1e+07; use 600"),
    ],
)
def test_waits_that_cannot_be_are_refused(config, line):
    mode = ServerMode.external if "urls" in config else ServerMode.managed
    with pytest.raises(ValueError) as error:
        ServersConfig(mode=mode, **config)
    assert str(error.value).startswith(f"rollout.servers.wait = {line}")


@pytest.mark.parametrize(
    ("urls", "line"),
    [
        (["node7:30000"], "'node7:30000': has no scheme; write http://node7:30000 (https:// if it"),
        (["localhost"], "'localhost': has no scheme; write http://localhost (https:// if"),
        (["ftp://node7"], "'ftp://node7': must be http or https; write http://node7"),
        (["http://a:1/v1"], "'http://a:1/v1': must be a base URL; write http://a:1"),
        (["http://a:1?x=2"], "'http://a:1?x=2': must be a base URL; write http://a:1"),
        (["http://a:1 "], "'http://a:1 ': has spaces or is empty; write http://host:port"),
        ([""], "'': has spaces or is empty; write http://host:port"),
        (["http://"], "'http://': names no host; write http://host:port"),
        (["http://a:70000"], "cannot be read as a URL (Port out of range 0-65535); write http://"),
        (["http://a:0"], "'http://a:0': port 0 is no server's; write the port that it listens on"),
        (["http://me:pw@a:1"], "has a user name; peergrad does not log in; remove it"),
        (["http://a:1", "http://A:1/"], "names http://a:1 2 times; name every server once"),
        (["http://a", "http://a:80"], "names http://a 2 times; name every server once"),
    ],
)
def test_addresses_that_cannot_be_are_refused(urls, line):
    with pytest.raises(ValueError) as error:
        external(*urls)
    assert str(error.value).startswith("rollout.servers.urls = ") and line in str(error.value)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ({"dtype": "bfloat16"}, ".dtype = 'bfloat16': is peergrad's to set; set model.dtype"),
        (
            {"--dty": "bfloat16"},
            ".--dty = 'bfloat16': is short for dtype, which is peergrad's to set; set model.dtype",
        ),
        ({"is_embedding": True}, ".is_embedding = True: does not generate; remove it"),
        (
            {"allow_auto": 1},
            ".allow_auto = 1: is short for allow-auto-truncate, which answers what it has left",
        ),
        ({"config": "a.yaml"}, ".config = 'a.yaml': reads further options, which nobody would che"),
        (
            {"preferred-sampling-params": '{"top_p": 0.9}'},
            "may draw from another distribution than the trainer's; remove it",
        ),
        ({"port": 3}, "rollout.servers.args.port = 3: is peergrad's to set; remove it"),
        ({"--tp_size": 2}, "args.--tp_size = 2: is peergrad's to set; set rollout.servers.tensor"),
        ({"dtype": "half"}, "args.dtype = 'half': is peergrad's to set; set model.dtype"),
        ({"dp-size": 2}, "args.dp-size = 2: cannot take weight updates in SGLang; remove it"),
        ({"pp_size": 2}, "args.pp_size = 2: cannot take weight updates with SGLang's stages; remo"),
        ({"api-key": "x"}, "locks peergrad out, which sends no key; remove it"),
        ({"a-b": 1, "a_b": 2}, "is there 2 times, spelt with dashes and underscores; keep one"),
    ],
)
def test_options_are_refused_before_anything_starts(args, line):
    with pytest.raises(ValueError) as error:
        ServersConfig(args=args)
    assert line in str(error.value)


def test_takeover_of_ones_own_servers_is_refused():
    assert external("http://a:1", takeover=True).takeover
    with pytest.raises(ValueError, match=r"takeover = True: has no effect with mode=managed"):
        ServersConfig(takeover=True)
