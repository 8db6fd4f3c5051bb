"""What is found out about external servers before anything is loaded, on stand-ins."""

import json
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
from fake_sglang import FakeServer, Hanging, Mark

from peergrad.config import Config, Dtype, Fp8Serving, ServerMode
from peergrad.observing.screen import Screen
from peergrad.rollout import arrival
from peergrad.rollout import probe as module
from peergrad.rollout.probe import ServerFacts, probe
from peergrad.running.ports import free_ports

MODEL = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 100,
    "num_hidden_layers": 2,
}


class Server(Mark):
    """The routes that the probe asks, with SGLang 0.5.23's answers."""

    def __init__(self, version="default", model=(), absent=(), **info):
        super().__init__(version)
        self.model = {"model_path": "/models/m", **MODEL, **dict(model)}
        self.info = {"version": "0.5.23", "dtype": "float32", "tp_size": 2, "dp_size": 1, **info}
        self.absent = absent
        self.tensors = ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"]
        self.tensors += ["model.layers.1.self_attn.qkv_proj.weight", "draft.layers.7.x"]
        self.blocks = []

    def routes(self):
        names = ("model_info", "server_info", "begin_weight_update", "v1/models")
        routes = {name: getattr(self, name.replace("/", "_")) for name in names}
        routes |= {"generate": self.generate, "weights_checker": self.weights_checker}
        return {
            **routes,
            **{name: lambda _: (404, {"detail": "Not Found"}) for name in self.absent},
        }

    def model_info(self, _):
        return 200, {**self.model, "weight_version": self.version}

    def server_info(self, _):
        return 200, self.info

    def begin_weight_update(self, _):
        return 405, {"detail": "Method Not Allowed"}

    def v1_models(self, _):
        return 200, {"data": [{"max_model_len": 512}]}

    def generate(self, body):
        assert body["sampling_params"]["max_new_tokens"] == 0
        message = "logit_bias must has keys in [0, 99], got -1."
        return 400, {"error": {"message": message}}

    def weights_checker(self, body):
        names = self.blocks if body.get("skip_tensor_list") else self.tensors
        return 200, {"ranks": [{"checksums": dict.fromkeys(names, "0")}]}


class Old(Server):
    def routes(self):
        return {**super().routes(), "get_server_info": lambda _: (200, {"version": "0.4.9"})}


def serve(*servers):
    return [FakeServer(lambda _: (404, {}), **server.routes()) for server in servers]


@pytest.fixture(autouse=True)
def much_time(monkeypatch):
    """For a stand-in to answer, however busy the machine is."""
    monkeypatch.setattr(module, "SECONDS", 120.0)


@pytest.fixture
def config(tmp_path):
    """Builds the configuration of a run on ``urls``."""
    (tmp_path / "config.json").write_text(json.dumps(MODEL))

    def build(*urls):
        built = Config()
        built.model.path, built.model.dtype = str(tmp_path), Dtype.float32
        built.data.max_prompt_tokens, built.rollout.max_new_tokens = 200, 100
        built.rollout.servers.mode = ServerMode.external
        built.rollout.servers.urls = list(urls)
        return built

    return build


def refusal(config, server, *others, identity=None, change=lambda config: None):
    """What the probe says of the first of some servers."""
    fakes = serve(server, *others)
    for fake in fakes:
        fake.__enter__()
    try:
        built = config(*(fake.url for fake in fakes))
        change(built)
        with pytest.raises(ValueError) as error:
            probe(built, identity)
    finally:
        for fake in fakes:
            fake.__exit__()
    line = str(error.value)
    assert "\n" not in line and "; " in line
    return line.replace(fakes[0].url, "URL")


def test_the_facts_of_a_server(config):
    (fake,) = serve(Server())
    with fake:
        (facts,) = probe(config(fake.url))
    assert facts == ServerFacts(
        url=fake.url,
        sglang="0.5.23",
        weight_version="default",
        model_path="/models/m",
        model_type="qwen3",
        architectures=("Qwen3ForCausalLM",),
        vocab_size=100,
        layers=2,
        dtype="float32",
        context=512,
        tensor=2,
    )
    posts = {path for path, body in fake.requests if body}
    assert posts == {"/generate", "/weights_checker"}  # neither changes anything


def test_runs_without_external_servers_ask_nobody(config):
    assert probe(Config()) == []
    replay = config("http://127.0.0.1:9")
    replay.rollout.replay = "runs/earlier"
    assert probe(replay) == []


def test_what_a_server_does_not_tell_is_not_held_against_it(config):
    mute = Server(model={"model_type": None, "architectures": None}, absent=("v1/models",))
    mute.generate = lambda _: (200, {})
    mute.weights_checker = lambda _: (400, {"message": "no such action"})
    (fake,) = serve(mute)
    with fake:
        (facts,) = probe(config(fake.url))
    assert (facts.vocab_size, facts.layers, facts.context) == (None, None, None)


@pytest.mark.parametrize(
    ("server", "line"),
    [
        (
            Server(absent=("server_info",)),
            "rollout.servers.urls = 'URL': has no /server_info, so it is no SGLang server of "
            "0.5.21 or later; name SGLang workers of 0.5.21 or later, not a router",
        ),
        (
            Old(absent=("model_info",)),
            "has no /model_info, so it is SGLang 0.4.9, too old; name SGLang workers of 0.5.21 or",
        ),
        (
            Server(absent=("begin_weight_update",)),
            "rollout.servers.urls = 'URL': SGLang 0.5.23 has no begin_weight_update; start it with "
            "SGLang 0.5.21 or later",
        ),
        (
            Server(dp_size=2),
            "rollout.servers.urls = 'URL': has dp_size = 2, with which SGLang takes no weight "
            "updates; start one server for each replica",
        ),
        (
            Server(pp_size=2),
            "rollout.servers.urls = 'URL': has pp_size = 2, whose stages would all take the same "
            "places in weight updates, and wait for ever; start it with --tp-size alone",
        ),
        (
            Server(model={"model_type": "llama"}),
            "serves another model (/models/m) than model.path = ",
        ),
        (
            Server(model={"architectures": ["LlamaForCausalLM"]}),
            "architectures LlamaForCausalLM, not Qwen3ForCausalLM; start it with the run's model",
        ),
        (
            Server(version="runs/b-9c0d:7"),
            "rollout.servers.urls = 'URL': belongs to run 'runs/b-9c0d' (weight version 7), and a ",
        ),
        (
            Server(max_total_num_tokens=299),
            "rollout.servers.urls = 'URL': has room for 299 tokens, but data.max_prompt_tokens + "
            "rollout.max_new_tokens = 200 + 100; lower one of the two, or ",
        ),
        (
            Server(enable_deterministic_inference=True),
            "seeds all requests alike, so groups are copies; start it without "
            "--enable-deterministic-inference",
        ),
        (Server(allow_auto_truncate=True), "start it without --allow-auto-truncate"),
        (Server(is_embedding=True), "does not generate; start it without --is-embedding"),
        (
            Server(preferred_sampling_params='{"min_p": 0.1}'),
            "may draw from another distribution than the trainer's; start it without "
            "--preferred-sampling-params",
        ),
    ],
)
def test_each_unfit_server_is_refused_with_one_line(config, server, line):
    assert line in refusal(config, server)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((200, "Welcome"), "answers /model_info otherwise than SGLang"),
        ((200, {"weights": 3}), "answers /model_info otherwise than SGLang"),
        ((401, {"error": "Unauthorized"}), "asks for a key (401); start the server without --api"),
        ((500, "<html>\n oops"), "is no SGLang server, or not well ("),
    ],
)
def test_other_http_servers_are_none_of_sglang(config, answer, words):
    server = Server()
    server.model_info = lambda _: answer
    assert words in refusal(config, server)


def test_unreachable_servers_are_named_with_the_reason(config, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.3)
    with Hanging() as hanging:
        gone = FakeServer()
        gone.__enter__()
        gone.__exit__()
        for url, words in (
            (gone.url, r"cannot be reached \(connection refused\); start the server, or correct"),
            ("http://no.such.invalid:1", r"cannot be reached \(the host name is not known\)"),
            (hanging.url, "no answer within 0.3 s"),
        ):
            with pytest.raises(ValueError, match=rf"^rollout\.servers\.urls = '{url}': {words}"):
                probe(config(url))


def test_a_vocabulary_or_depth_of_another_size_is_another_model(config, tmp_path):
    for key, words in (("vocab_size", "vocab_size 100, not 7"), ("num_hidden_layers", "2, not 7")):
        (tmp_path / "config.json").write_text(json.dumps({**MODEL, key: 7}))
        change = lambda built: setattr(built.model, "path", str(tmp_path))  # noqa: E731
        assert words in refusal(config, Server(), change=change)


def test_one_server_by_two_names_is_refused(config):
    (fake,) = serve(Server())
    with fake:
        twice = config(fake.url, fake.url.replace("127.0.0.1", "localhost"))
        with pytest.raises(ValueError, match=rf"is the same server as {fake.url}; name every"):
            probe(twice)
    start = {"tokenizer_e2e": 80.11, "load_weight": 0.04}
    same = [Server(port=30000, startup_time=start) for _ in range(2)]
    assert "is the same server as URL" in refusal(config, *same)


def test_two_servers_are_two(config):
    starts = [{"tokenizer_e2e": seconds} for seconds in (80.1, 80.2)]
    one, two = serve(*(Server(port=30000, startup_time=start) for start in starts))
    with one, two:
        assert [facts.url for facts in probe(config(one.url, two.url))] == [one.url, two.url]


def test_our_own_server_and_one_to_take_over_pass(config):
    (fake,) = serve(Server(version="runs/b-9c0d:7"))
    with fake:
        built = config(fake.url)
        assert probe(built, "runs/b-9c0d")[0].weight_version == "runs/b-9c0d:7"
        built.rollout.servers.takeover = True
        assert probe(built, "runs/a-1f3a")


def test_another_precision_is_worth_a_warning(config, caplog):
    (fake,) = serve(Server(dtype="bfloat16", quantization="awq"))
    with fake:
        (facts,) = probe(config(fake.url))
    assert facts.warnings[0].startswith("computes in bfloat16, model.dtype = float32")
    assert facts.warnings[1].startswith("quantizes weights (awq)")
    assert f"{fake.url}: computes in bfloat16" in caplog.text


BLOCKS = ["model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.qkv_proj.weight"]
FLASH = {"quantization": "fp8", "load_format": "flash_rl"}
REMEDY = "start it on what python tools/quantize_fp8.py makes of the model"


@pytest.mark.parametrize(
    ("form", "info", "blocks", "line"),
    [
        (
            *("off", {"quantization": "fp8"}, []),
            "rollout.servers.urls = 'URL': makes FP8 codes of a bfloat16 checkpoint by itself, "
            f"which SGLang cannot update; {REMEDY} (rollout.servers.fp8=block) or with "
            "--quantization fp8 --load-format flash_rl (rollout.servers.fp8=flash_rl)",
        ),
        ("block", {"quantization": "fp8"}, [], "makes FP8 codes of a bfloat16 checkpoint"),
        (
            *("off", {}, BLOCKS),
            "rollout.servers.urls = 'URL': holds matrices in FP8 blocks, and is to be sent no FP8; "
            "set rollout.servers.fp8=block, or start it on the model itself",
        ),
        (
            *("block", {}, []),
            f"holds no FP8, and is to be sent matrices in FP8 blocks; set rollout.servers.fp8=off, "
            f"or {REMEDY}",
        ),
        ("off", FLASH, [], "set rollout.servers.fp8=flash_rl, or start it on the model itself"),
        ("block", FLASH, None, "holds matrices in FP8 by flash_rl, and is to be sent"),
        ("flash_rl", {}, [], "or start it with --quantization fp8 --load-format flash_rl"),
        (
            *("block", {}, BLOCKS[:1]),
            "holds others of its matrices in FP8 than it is to be sent: not alike are "
            f"model.layers.1.self_attn.qkv_proj.weight; {REMEDY}",
        ),
        (
            *("block", {"model_path": "FREE"}, BLOCKS),
            "has scales of kind float32 in FREE, and is to be sent power_of_two; set "
            f"rollout.servers.fp8_scales=float32, or {REMEDY}",
        ),
        (
            *("block", {"model_path": "SMALL"}, BLOCKS),
            f"has FP8 blocks of [64, 64] in SMALL, not [128, 128]; {REMEDY}",
        ),
        ("block", {"model_path": "POWERS", "quantization": "fp8"}, BLOCKS, None),
        ("block", {"model_path": "/elsewhere"}, BLOCKS, None),
        ("block", {}, None, None),  # does not tell
        (
            *("block", {"model_path": "PLAIN", "quantization": "fp8"}, None),  # nor need it
            "makes FP8 codes of a bfloat16 checkpoint",
        ),
        ("flash_rl", FLASH, [], None),
    ],
)
def test_what_servers_hold_is_what_they_are_sent(config, tmp_path, form, info, blocks, line):
    kinds = {"FREE": (128, None), "SMALL": (64, "ue8m0"), "POWERS": (128, "ue8m0")}
    for name, (size, scales) in kinds.items():
        found = {"quant_method": "fp8", "weight_block_size": [size, size], "scale_fmt": scales}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"quantization_config": found}))
    (tmp_path / "PLAIN").mkdir()
    (tmp_path / "PLAIN" / "config.json").write_text("{}")
    if info.get("model_path") in (*kinds, "PLAIN"):
        info = {**info, "model_path": str(tmp_path / info["model_path"])}
    server = Server(**info)
    server.blocks = server.tensors if blocks is None else blocks  # a SGLang that leaves nothing out

    def change(built):
        built.rollout.servers.fp8 = Fp8Serving[form]

    if line is not None:
        said = refusal(config, server, change=change)
        assert line in said.replace(f"{tmp_path}/", "")
        return
    (fake,) = serve(server)
    with fake:
        built = config(fake.url)
        change(built)
        (facts,) = probe(built)
    assert any("quantizes weights (fp8)" in text for text in facts.warnings) == bool(blocks or info)


def test_nccl_must_be_told_the_same_on_both_sides(config, monkeypatch):
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    line = refusal(config, Server(device="cuda", enable_symm_mem=True, enable_nccl_nvls=True))
    assert line == (
        "rollout.servers.urls = 'URL': has --enable-symm-mem, with which SGLang sets "
        "NCCL_CUMEM_ENABLE=1, and this run has 0; set NCCL_CUMEM_ENABLE=1 for all ranks: NCCL "
        "needs one value on both sides"
    )
    fakes = serve(Server(device="cuda"), Server(device="cuda", enable_nccl_nvls=True), Server())
    with fakes[0], fakes[1], fakes[2]:
        found = [facts.warnings for facts in probe(config(*(fake.url for fake in fakes)))]
    text = "must have been started with NCCL_NVLS_ENABLE=1, as this run: it does not tell"
    assert found == [(text,), (), ()]


@pytest.fixture
def patient(config, monkeypatch):
    """Builds the configuration of a run that waits for its servers."""
    monkeypatch.setattr(arrival, "POLL_SECONDS", 0.05)

    def build(*urls, wait=600.0):
        built = config(*urls)
        built.rollout.servers.wait = wait
        return built

    return build


def test_servers_that_come_late_are_waited_for(patient, capsys):
    """One listens when another has been asked for the second time, which answers for a while as a
    proxy does for it, and then as SGLang does while it warms up; one is there."""
    here, loading = Server(), Server()
    answers = [(503, "no backend"), (200, {})]
    healths = [(503, {}), (503, {}), (200, {})]
    said = lambda _: answers.pop(0) if len(answers) > 1 else loading.model_info(_)  # noqa: E731

    def healthy(_):
        if len(healths) == 2:
            come()
        return healths.pop(0) if len(healths) > 1 else (200, {})

    routes = {**loading.routes(), "model_info": said, "health": healthy}
    (port,) = free_ports(1)
    late = f"http://127.0.0.1:{port}"
    (first,) = serve(here)
    with (
        first,
        FakeServer(lambda _: (404, {}), **routes) as second,
        ExitStack() as stack,
        Screen(1) as screen,
    ):
        come = lambda: stack.enter_context(  # noqa: E731
            FakeServer(lambda _: (404, {}), port=port, **Server().routes())
        )
        facts = probe(patient(first.url, second.url, late), waiting=screen.waiting)
    assert [fact.url for fact in facts] == [first.url, second.url, late]
    assert not answers[1:] and not healths[1:]
    assert capsys.readouterr().out.splitlines()[0].partition("  ")[2] == (
        f"waiting for servers, for 600 s at most: {second.url} (is still starting), "
        f"{late} (connection refused)"
    )


@pytest.mark.parametrize(
    ("server", "words"),
    [
        (lambda _: (200, "Welcome"), "answers /model_info otherwise than SGLang"),
        (lambda _: (500, "oops"), "is no SGLang server, or not well"),
        (lambda _: (404, {}), "has no /model_info, so it is no SGLang server"),
    ],
)
def test_another_program_is_not_waited_for(patient, server, words):
    (port,) = free_ports(1)
    with FakeServer(server) as other, Screen(1, shown=False) as screen:
        config = patient(f"http://127.0.0.1:{port}", other.url)
        with pytest.raises(ValueError, match=rf"^rollout\.servers\.urls = '{other.url}': {words}"):
            probe(config, waiting=screen.waiting)


def test_a_host_without_a_name_is_not_waited_for(patient):
    with Screen(1, shown=False) as screen, pytest.raises(ValueError, match="name is not known"):
        probe(patient("http://no.such.invalid:1"), waiting=screen.waiting)


def test_a_server_that_does_not_come_is_named(patient, monkeypatch):
    """One that hangs, and one whose port nobody has."""
    monkeypatch.setattr(module, "SECONDS", 0.1)
    (port,) = free_ports(1)
    with (
        Hanging() as hanging,
        Screen(1, shown=False) as screen,
        pytest.raises(ValueError) as error,
    ):
        urls = hanging.url, f"http://127.0.0.1:{port}"
        probe(patient(*urls, wait=0.5), waiting=screen.waiting)
    assert str(error.value).startswith(
        "rollout.servers.wait = 0.5: 2 of 2 servers did not come within these seconds, "
        f"{urls[0]} (no answer in time), {urls[1]} (connection refused); see their logs"
    )


def test_a_check_waits_for_nobody(patient):
    (port,) = free_ports(1)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot be reached \(connection refused\)"):
        probe(patient(f"http://127.0.0.1:{port}"))
    assert time.monotonic() - began < 300  # of the 600 that it could wait


def test_the_probe_is_light():
    heavy = "{'torch', 'sglang', 'transformers', 'megatron'}"
    code = f"import sys, peergrad.rollout.probe; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
