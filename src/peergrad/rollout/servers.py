"""SGLang servers that live and die with this process, be it a trainer or ``peergrad.serve``."""

import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil
import torch

from peergrad.config import Dtype, Fp8Serving, ServersConfig, require
from peergrad.config.rollout import OURS, flag
from peergrad.rollout.address import Address
from peergrad.rollout.arguments import REFUSED_STATUS
from peergrad.rollout.nursery import Child, Nursery, Order
from peergrad.rollout.server_log import cause
from peergrad.running.environment import CONNECTIONS
from peergrad.running.ports import free_ports

log = logging.getLogger(__name__)

CPU_OPTIONS = {
    "sleep-on-idle": True,  # without it an idle server takes a whole core
    "disable-cuda-graph": True,
    # There is no second device whose work the schedule could overlap with, and overlapping draws
    # one token past the end of every answer: a quarter of the steps if answers have three.
    "disable-overlap-schedule": True,
    "radix-cache-backend": "peergrad",  # registered in cpu_platform.py
    "skip-server-warmup": True,  # a second of start-up; there are no kernels to compile
    # Answers are read as token ids, and what ends them is said in every request: neither a second
    # process need make text of them nor a third look at each for what its tokenizer calls an end.
    "skip-tokenizer-init": True,
    # Requests are all alive at once and hold no cycles: to search the 70 objects of each for
    # garbage, as Python does by default after every 700, is a tenth of all work.
    "gc-threshold": 200_000,
    # For each request that it takes in, the scheduler counts anew those that it has taken in since
    # the last step: of a thousand at once that is a twentieth of all work.
    "prefill-max-requests": 256,
}
# Tokens of a CPU server's KV cache. Without a number it takes most of the memory; with too small a
# one a small model, which could answer a thousand prompts at once, does so in several rounds.
CPU_TOKENS = (32_768, 262_144)
CPU_CACHE_BYTES = 512 << 20
CPU_SERVER = "peergrad.rollout.cpu_server"
CPU_MODELS = "peergrad.rollout.cpu_models"
GPU_SERVER = "sglang.launch_server"
FORMS: dict[Fp8Serving, dict[str, Any]] = {
    Fp8Serving.off: {},
    # Codes and scales come with the first weight sync: what is on the disk would be read in vain.
    Fp8Serving.block: {"load-format": "dummy"},
    Fp8Serving.flash_rl: {"quantization": "fp8", "load-format": "flash_rl"},
}
"""What makes servers hold matrices so."""
# From Blackwell on DeepGEMM packs scales once for all: there is no place left for new ones.
PLAIN_SCALES = {"fp8-gemm-backend": "triton", "moe-runner-backend": "triton"}
BLACKWELL, ADA = (10, 0), (8, 9)  # compute capabilities; before Ada no GPU multiplies in FP8
# Until servers are forked: OpenBLAS starts its threads as soon as it is loaded.
LOADING = {"OMP_NUM_THREADS": "1"}
TORCHRUN = re.compile(r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|NAME)|MASTER_\w+|TORCHELASTIC_\w+)")
CORE_DUMPS = "CUDA_ENABLE_USER_TRIGGERED_COREDUMP"  # CUDA's own
POLL_SECONDS = 0.25
GRACE_SECONDS = 10.0


class ManagedServers:
    """``with ManagedServers(...) as servers:`` yields healthy servers at ``servers.urls``; so do
    ``start`` and ``ready``, with time between them for something else, if ``stop`` comes after.

    Each runs in a session of its own, so that Ctrl-C in the terminal reaches only the trainer,
    which then stops them in order; if the trainer is killed, the kernel kills them (``launch``).
    Without a GPU all are forked from one process that has imported SGLang (``nursery``). Start it
    from the main thread.
    """

    def __init__(
        self,
        config: ServersConfig,
        *,
        model_path: str,
        dtype: Dtype,
        log_dir: Path,
        seed: int = 0,
        weight_version: int = 0,
        address: Address | None = None,
        ranks: int | None = None,
        tells_experts: bool = False,
        weightless: Callable[[Path], object] | None = None,
    ) -> None:
        """``address``: where they listen, with the GPUs of this machine to themselves. None: beside
        a trainer, at free ports that only this machine sees. ``ranks``: of that trainer on this
        machine, which have the first GPUs; None: as many as torchrun says. ``tells_experts``: those
        of a mixture of experts that its tokens go to are said with the answers, where asked for.
        ``weightless``: writes the folder of the model that they serve, without weights, in place of
        ``model_path``."""
        self._config = config
        self._alone = address is not None
        self._ranks = 0 if self._alone else ranks
        self._address = address or Address("127.0.0.1", free_ports(config.count))
        self._log_dir = log_dir
        self._processes: Sequence[subprocess.Popen[bytes] | Child] = []  # of the servers
        self._roots: list[subprocess.Popen[bytes]] = []  # that we have started: of their trees
        self._words: dict[int, str] = {}  # the last ones of those that have ended
        self._began = 0.0
        self._fixed: dict[str, Any] = {
            "model-path": model_path,
            "host": self._address.host,
            "dtype": dtype.name,
            "tp-size": config.tensor,
            "weight-version": weight_version,
        }
        self._tells_experts = tells_experts
        self._weightless = weightless
        if weightless is not None:
            self._fixed["model-path"] = str(self._served)
        self._seed = seed
        self.urls = self._address.urls
        self._rising: list[int] = []  # those that were not healthy yet
        self._http = httpx.Client(timeout=5.0, trust_env=False)

    def __enter__(self) -> Self:
        try:
            self.start()
            self.ready()
        except BaseException:  # an interrupt too: nobody else knows of these processes yet
            self.stop()
            raise
        return self

    def start(self) -> None:
        """Start the processes, and return at once. Raises as ``check`` does."""
        self.check()
        self._log_dir.mkdir(parents=True, exist_ok=True)
        if self._weightless is not None:
            self._weightless(self._served)
        self._began, self._rising = time.monotonic(), list(range(self._config.count))
        for index, url in enumerate(self.urls):
            if self.log(index).exists():  # it may tell why an earlier one ended
                self.log(index).replace(f"{self.log(index)}.old")
            self.log(index).write_bytes(b"")
            log.info("server %d starts at %s, log %s", index, url, self.log(index))
        if torch.cuda.is_available():
            self._processes = self._roots
            for index in range(self._config.count):
                self._roots.append(self._launch(index))
        else:
            nursery = self._nursery()
            self._processes = nursery.children
            self._roots.append(nursery.process)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def ended(self, wait: float = 0.0) -> dict[str, str]:
        """What is known of the servers that have ended by themselves, a line each, by URL. May be
        asked at any time. ``wait``: seconds that those whose connections just broke may take to
        end, if not all have."""
        deadline = time.monotonic() + wait
        while True:
            for index, process in enumerate(self._processes):
                if index not in self._words and (status := process.poll()) is not None:
                    self._words[index] = self._last_words(index, status)
            if len(self._words) == len(self.urls) or time.monotonic() >= deadline:
                return {self.urls[index]: words for index, words in self._words.items()}
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """End the servers with all their processes; safe to call again."""
        _end(self._roots)
        self._processes, self._roots, self._words = [], [], {}
        self._http.close()

    def options(self, index: int) -> list[str]:
        """Of the command line of server ``index``; ``rollout.servers.args`` wins over our
        defaults."""
        options: dict[str, Any] = {"random-seed": self._random_seed(index)}
        options["enable-return-routed-experts"] = self._tells_experts
        if not torch.cuda.is_available():
            model, dtype = Path(self._fixed["model-path"]), Dtype[self._fixed["dtype"]]
            options |= CPU_OPTIONS | {"max-total-tokens": _cpu_tokens(model, dtype)}
        if self._config.fp8 is Fp8Serving.block and self._capability() >= BLACKWELL:
            options |= PLAIN_SCALES
        options |= {flag(key): value for key, value in self._config.args.items()}
        if torch.cuda.is_available():
            options["base-gpu-id"] = self.gpus(index)[0]
        options |= FORMS[self._config.fp8]
        fixed = self._fixed | {"port": self._address.ports[index]}
        assert fixed.keys() <= OURS.keys(), "what is set here must be refused there"
        options |= fixed
        return _flags(options)

    def gpus(self, index: int) -> range:
        """Of server ``index``, counted among those that this process sees."""
        args = {flag(key): value for key, value in self._config.args.items()}
        # Behind the GPUs of this node's trainer ranks, unless told otherwise.
        told = os.environ.get("LOCAL_WORLD_SIZE", "1")
        ranks = told if self._ranks is None else self._ranks
        first, step = int(args.get("base-gpu-id", ranks)), int(args.get("gpu-id-step", 1))
        size = self._config.tensor * step
        return range(first + index * size, first + (index + 1) * size, step)

    def devices(self, index: int) -> str:
        """What server ``index`` computes on, for a person."""
        if not torch.cuda.is_available():
            return "CPU"
        return "GPU " + ",".join(map(str, self.gpus(index)))

    def check(self) -> None:
        """Raise RuntimeError if SGLang is not installed, ValueError if there are too few GPUs."""
        _check_installed()
        seen = torch.cuda.device_count()
        needed = self.gpus(self._config.count - 1)[-1] + 1
        require(
            needed <= seen or not torch.cuda.is_available(),
            "rollout.servers.count",
            self._config.count,
            f"servers of rollout.servers.tensor = {self._config.tensor} from GPU {self.gpus(0)[0]} "
            f"on need {needed} GPUs, and {seen} are seen here",
            "lower one of the two, or see CUDA_VISIBLE_DEVICES",
        )

        if self._config.fp8 is not Fp8Serving.off:
            key, value = "rollout.servers.fp8", self._config.fp8.name
            found = self._capability()
            rule = "SGLang serves FP8 on GPUs of compute capability 8.9 and up, and "
            rule += f"the servers have {found[0]}.{found[1]}" if any(found) else "none is seen here"
            require(found >= ADA, key, value, rule, "use such GPUs, or set it to off")

    def _capability(self) -> tuple[int, int]:
        """Of the first server's first GPU."""
        if not torch.cuda.is_available():
            return (0, 0)
        return torch.cuda.get_device_capability(self.gpus(0)[0])

    @property
    def _served(self) -> Path:
        """The folder that ``weightless`` writes."""
        return self.log(0).with_suffix(".model")

    def _random_seed(self, index: int) -> int:
        """Another for each server; of those on nodes of their own, all of which may be number 0
        there, the address makes it so."""
        if not self._alone:
            return self._seed + index
        return (self._seed + zlib.crc32(self.urls[index].encode())) % 2**31

    def _launch(self, index: int) -> subprocess.Popen[bytes]:
        launch = [sys.executable, "-m", "peergrad.rollout.launch", str(os.getpid())]
        with self.log(index).open("ab") as output:
            return subprocess.Popen(
                [*launch, sys.executable, "-m", GPU_SERVER, *self.options(index)],
                env=_environment(index, self._config.tensor),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _nursery(self) -> Nursery:
        """All servers, forked from one process that has imported SGLang."""
        environments = [_environment(i, self._config.tensor) for i in range(len(self.urls))]
        shared = environments[0] | LOADING
        orders = [
            Order(self.options(i), str(self.log(i)), dict(own.items() - shared.items()))
            for i, own in enumerate(environments)
        ]
        return Nursery(CPU_SERVER, orders, environment=shared)

    def ready(self) -> None:
        """Wait until all are healthy. Raises as ``risen`` does."""
        while self._rising:
            self.risen()
            if self._rising:
                time.sleep(POLL_SECONDS)

    def risen(self) -> list[int]:
        """Which have become healthy since this was last asked. Raises RuntimeError if one ends
        before, or if they take more than ``rollout.servers.start_timeout`` from their start;
        ValueError if one ends because SGLang refuses ``rollout.servers.args``."""
        seconds, limit = time.monotonic() - self._began, self._config.start_timeout
        urls = self._address.own_urls
        found = [index for index in self._rising if _is_healthy(self._http, urls[index])]
        self._rising = [index for index in self._rising if index not in found]
        for index in found:
            log.info("server %d healthy after %.0f s", index, seconds)
        if self._rising and (ended := self.ended()):
            check_args(self._config.args)  # says better what it is
            raise RuntimeError(next(iter(ended.values())))
        if self._rising and seconds > limit:
            late = self._rising[0]
            raise RuntimeError(
                f"rollout.servers.start_timeout = {limit:g}: server {late} was not healthy within "
                f"these seconds; raise it, or see in {self.log(late)} what the server is doing"
            )
        return found

    def _last_words(self, index: int, status: int) -> str:
        line = cause(self.log(index))
        how = f"ended with exit code {status}"
        if status < 0:  # SGLang's launcher, too, ends itself so, once a worker has failed
            how = f"was ended by {signal.Signals(-status).name}"
        if line is None or "exit code -9" in line:
            how += ", perhaps for want of memory" * (status == -signal.SIGKILL)
        log.info("server %d %s", index, how)
        said = "" if line is None else f" (its log says {line!r})"
        return (
            f"rollout.servers: server {index} at {self.urls[index]} {how}{said}; "
            f"see {self.log(index)}"
        )

    def log(self, index: int) -> Path:
        """What server ``index`` prints. On nodes of their own they may share a folder."""
        host, port = self._address.name, self._address.ports[index]
        name = f"{host.replace(':', '.')}_{port}" if self._alone else str(index)
        return self._log_dir / f"server_{name}.log"


def _flags(options: dict[str, Any]) -> list[str]:
    """``{"a": 1, "b": True, "c": [2, 3], "d": False}`` as ``--a 1 --b --c 2 3``."""
    flags: list[str] = []
    for key, value in options.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list | tuple) else [value]
        flags += [f"--{key}", *map(str, values)]
    return flags


def _cpu_tokens(model: Path, dtype: Dtype) -> int:
    """As many tokens as ``CPU_CACHE_BYTES`` hold, within ``CPU_TOKENS``; the least of them for a
    model whose configuration does not tell, as one of another architecture may."""
    least, most = CPU_TOKENS
    try:
        shape = json.loads((model / "config.json").read_text())
        heads = shape["num_attention_heads"]
        width = shape.get("head_dim") or shape["hidden_size"] // heads
        per_layer = 2 * width * (shape.get("num_key_value_heads") or heads)
        bytes_each = shape["num_hidden_layers"] * per_layer * (4 if dtype is Dtype.float32 else 2)
        return int(min(most, max(least, CPU_CACHE_BYTES // bytes_each)))
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return least


def _environment(index: int, tensor: int) -> dict[str, str]:
    """Ours, less what torchrun set: a server would take itself for one of the trainer's ranks."""
    env = {key: value for key, value in os.environ.items() if not TORCHRUN.fullmatch(key)}
    env.pop(CONNECTIONS, None)  # Megatron's: SGLang has a number of its own
    env["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"  # healthy while paused, too
    env["SGLANG_RETURN_ORIGINAL_LOGPROB"] = "0"  # logprobs are those at rollout.temperature
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    # One whose worker has died would first wait a minute for dumps that nobody can or has asked to
    # make, and look alive meanwhile.
    env.setdefault("SGLANG_PYSPY_DUMP_BEFORE_CRASH", str(int(shutil.which("py-spy") is not None)))
    env.setdefault("SGLANG_CUDA_COREDUMP_BEFORE_CRASH", env.get(CORE_DUMPS, "0"))
    if not torch.cuda.is_available():
        env.setdefault("OMP_NUM_THREADS", "1")
        env.setdefault("SGLANG_EXTERNAL_MODEL_PACKAGE", CPU_MODELS)
        # Between its processes: msgpack, which costs a request 40 us less than pickled objects.
        env.setdefault("SGLANG_USE_PICKLE_IPC", "0")
        if tensor > 1:  # SGLang binds ranks to NUMA nodes unless told which cores to take
            cores = sorted(os.sched_getaffinity(0))
            bind = [cores[(index * tensor + rank) % len(cores)] for rank in range(tensor)]
            env.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(map(str, bind)))
    return env


def check_args(args: Mapping[str, Any]) -> None:
    """Raise ValueError if SGLang's own parser refuses ``rollout.servers.args``.

    Takes about ten seconds, for it imports SGLang in a process of its own; where SGLang cannot be
    imported nothing is checked.
    """
    if not args or importlib.util.find_spec("sglang") is None:
        return
    flags = _flags({flag(key): value for key, value in args.items()})
    done = subprocess.run(
        [sys.executable, "-m", "peergrad.rollout.arguments", *flags],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == REFUSED_STATUS:
        rule, _, remedy = done.stdout.strip().rpartition("\n")[2].partition("; ")
        require(False, "rollout.servers.args", dict(args), rule, remedy)


def _check_installed() -> None:
    if importlib.util.find_spec("sglang") is None:
        raise RuntimeError(
            "rollout.servers.mode = managed: needs SGLang in this Python environment; install it "
            "(see README.md), or start servers elsewhere and set rollout.servers.mode=external"
        )
    plugins = {point.name for point in entry_points(group="sglang.srt.platforms")}
    if not torch.cuda.is_available() and not plugins:
        raise RuntimeError(
            "rollout.servers.mode = managed: SGLang does not start without a GPU unless it finds "
            "peergrad's platform plugin; install peergrad as a package (pip install -e .)"
        )


def _is_healthy(http: httpx.Client, url: str) -> bool:
    try:
        return http.get(f"{url}/health").is_success
    except httpx.TransportError:
        return False


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM to each server, SIGKILL to what its tree still holds after the grace, and wait.

    SIGTERM goes to the launcher alone: it ends its workers, and would take it for a crash if they
    ended by themselves. It looks every five seconds whether it has been told, so that the memory of
    GPUs is freed in order; without a GPU there is nothing that the kernel would not free.
    """
    grace = GRACE_SECONDS if torch.cuda.is_available() else 0.0
    tree: list[psutil.Process] = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(process.pid)
            tree += [root, *root.children(recursive=True)]
            root.terminate()
    _, alive = psutil.wait_procs(tree, timeout=grace)
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(alive, timeout=GRACE_SECONDS)
    for process in processes:
        process.wait()
