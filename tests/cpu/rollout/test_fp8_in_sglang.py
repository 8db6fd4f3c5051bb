"""FP8 weights as the trainer sends them, in SGLang's own model classes. Nothing is computed with
them: SGLang multiplies in FP8 on GPUs alone."""

import json
from collections.abc import Iterator

import pytest
import torch

from peergrad import fp8
from peergrad.checks.fp8 import FLASH_RL
from peergrad.config import Config, Dtype, Fp8Scales, Fp8Serving
from peergrad.early import weightless
from peergrad.parallel.hf.companions import Companions
from peergrad.parallel.hf.config import read_shape
from peergrad.parallel.hf.families import FAMILIES
from peergrad.parallel.hf.files import open_tensors
from peergrad.parallel.hf.folder import read_folder
from peergrad.parallel.hf.fp8 import WITHOUT_SCALES, check_blocks, in_blocks
from peergrad.parallel.hf.tensors import tensor_shapes
from peergrad.rollout.buckets import buckets
from peergrad.rollout.form import BLOCKS_QUESTION, MATRIX, check_form, names_of_blocks
from peergrad.rollout.proof import FUSED, Digests, compare
from tests.models import make_hf_model

pytest.importorskip("sglang")
URL = "http://a:1"
SIZES = {
    **{"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 64, "intermediate_size": 384},
}
MODELS = {
    "qwen3": {"attention_bias": True},
    "qwen2": {"tied": True, "hidden_size": 256},
    "qwen3_moe": {
        **{"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
        "norm_topk_prob": True,
    },
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 2, "intermediate_size": 256},
}


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Iterator:
    """SGLang's model of an HF folder, its weights random, in this process."""
    patch = pytest.MonkeyPatch()
    patch.setenv("SGLANG_EXTERNAL_MODEL_PACKAGE", "peergrad.rollout.cpu_models")
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import parallel_state
    from sglang.srt.model_loader.loader import _initialize_model
    from sglang.srt.model_loader.utils import set_default_torch_dtype
    from sglang.srt.model_loader.weight_utils import get_quant_config, initialize_dummy_weights
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    def build(path):
        args = ServerArgs(model_path=str(path), dtype="bfloat16", load_format="dummy", device="cpu")
        publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=0, gpu_id=0))
        if not parallel_state.model_parallel_is_initialized():
            store = tmp_path_factory.mktemp("group") / "store"
            parallel_state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
            parallel_state.initialize_model_parallel(backend="gloo")
        config, load = ModelConfig.from_server_args(args), LoadConfig(load_format="dummy")
        with set_default_torch_dtype(torch.bfloat16):
            quant = get_quant_config(config, load, {}) if config.quantization else None
            model = _initialize_model(config, load, quant)
        initialize_dummy_weights(model)
        return model

    yield build
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
    patch.undo()


def checksums(model, question):
    """SGLang's answer to /weights_checker."""
    from sglang.srt.utils.weight_checker import WeightChecker

    assert question["action"] == "checksum"
    checker = WeightChecker(get_model=lambda: model)
    return checker._compute_checksum(question.get("skip_tensor_list"), role="target")["checksums"]


def weights_of(path):
    """As the trainer has them."""
    with open_tensors(read_folder(path)) as reader:
        for name in tensor_shapes(read_shape(str(path))):
            yield name, reader.get(name).to(torch.bfloat16)


def send(model, named):
    """Over the wire: what a server makes of our buckets."""
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    sent = 0
    for bucket, _ in buckets(named, 70_000):
        theirs = FlattenedTensorBucket.empty(bucket.names, bucket.dtypes, bucket.shapes, "cpu")
        theirs.get_flattened_tensor().copy_(bucket.flat)
        model.load_weights(theirs.reconstruct_tensors())
        sent += 1
    assert sent > 2


def within_rounding(matrix, codes, scales):
    from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant

    scale = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    found = block_quant_dequant(codes, scales, [128, 128], torch.float32)
    # Half a step of 3 bits of mantissa, or of the smallest codes.
    allowed = torch.maximum(matrix.abs() / 16, scale[: len(matrix), : matrix.shape[1]] / 1024)
    return bool(((found - matrix).abs() <= allowed * 1.0001).all())


def place(name):
    """(the parameter that an HF tensor is a part of, which part)."""
    head, leaf = name.rsplit(".", 1)
    stem, module = head.rsplit(".", 1)
    if ".experts." in name:
        before, expert = stem.rsplit(".", 1)
        part = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}.get(module, 0)
        fused = "w2" if module in ("down_proj", "w2") else "w13"
        return f"{before}.{fused}_{leaf}", (int(expert), part)
    fused, part, _ = FUSED.get(module, (module, 0, 1))
    return f"{stem}.{fused}.{leaf}", (0, part)


def expected(sent):
    """Our tensors put together as SGLang does: query, key, value; gate, up; experts."""
    parts = {}
    for name, tensor in sent:
        whole, where = place(name) if "layers" in name else (name, (0, 0))
        parts.setdefault(whole, {})[where] = tensor
    for whole, found in parts.items():
        rows = [torch.cat([found[w] for w in sorted(found) if w[0] == e]) for e, _ in found]
        yield whole, torch.stack(rows[:: len(rows) // len({e for e, _ in found})])


@pytest.mark.parametrize("family", MODELS)
def test_matrices_arrive_as_codes_and_scales(build, tmp_path, family):
    scales = Fp8Scales.power_of_two if family != "qwen2" else Fp8Scales.float32
    options = {**SIZES, **MODELS[family]}
    if family == "mixtral":
        options |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    path = make_hf_model(tmp_path / "model", family=family, layers=2, **options)
    config = Config()
    config.model.path, config.model.dtype = str(path), Dtype.bfloat16
    servers = config.rollout.servers
    servers.fp8, servers.fp8_scales = Fp8Serving.block, scales
    weightless(config)(tmp_path / "served")
    model = build(tmp_path / "served")

    sent = [pair for n, w in weights_of(path) for pair in fp8.served(n, w, scales)]
    send(model, sent)
    held = dict(model.named_parameters())
    for name, tensor in expected(sent):
        found = held[name] if ".experts." in name else held[name][None]
        found = found[:, : tensor.shape[1]]  # the vocabulary is padded
        assert found.dtype == tensor.dtype, name
        assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)), name
    by_name = dict(sent)
    for name, matrix in weights_of(path):
        if name + fp8.SCALE in by_name:
            assert within_rounding(matrix.float(), by_name[name], by_name[name + fp8.SCALE]), name

    digests = Digests(None)
    for name, tensor in sent:
        digests.add(name, tensor)
    names = checksums(model, {"action": "checksum"})
    assert compare(digests.result(), {URL: [names]}) == (0, len(names))
    tensors, blocks = set(names), set(checksums(model, BLOCKS_QUESTION))
    assert blocks == {name for name in tensors if MATRIX.fullmatch(name)} != set()
    assert names_of_blocks({"ranks": [{"checksums": dict.fromkeys(blocks)}]}) == blocks
    info = {"quantization": None, "load_format": "dummy", "model_path": str(tmp_path / "served")}
    check_form(URL, info, servers, tensors=tensors, blocks=blocks)
    with pytest.raises(ValueError, match=r"holds others of its matrices in FP8 .*(gate_up|w13)"):
        most = {name for name in blocks if "gate_up" not in name and "w13" not in name}
        check_form(URL, info, servers, tensors=tensors, blocks=most)


@pytest.mark.parametrize("family", WITHOUT_SCALES)
def test_what_sglang_drops_is_refused(build, tmp_path, family):
    """Without a word in its answer: its scales are still those that it began with."""
    path = make_hf_model(tmp_path / "model", family=family, layers=1, **SIZES)
    shape = read_shape(str(path))
    with pytest.raises(ValueError, match="drops the scales of models of family"):
        check_blocks("rollout.servers.fp8", "block", shape)
    companions = Companions.read(path)
    in_blocks(companions, shape, Fp8Scales.power_of_two).write(tmp_path / "served", dtype=None)
    model = build(tmp_path / "served")
    scales = Fp8Scales.power_of_two
    send(model, [pair for n, w in weights_of(path) for pair in fp8.served(n, w, scales)])
    held = {n: p for n, p in model.named_parameters() if n.endswith(fp8.SCALE)}
    assert held and all(bool((scale == 1).all()) for scale in held.values())


def test_a_server_without_fp8_names_no_blocks(build, tmp_path):
    path = make_hf_model(tmp_path / "model", layers=1)
    model = build(path)
    assert checksums(model, BLOCKS_QUESTION) == {}
    assert len(checksums(model, {"action": "checksum"})) > 8


def test_flash_rl_takes_the_families_that_we_think():
    from peergrad.rollout.cpu_models.trained import EntryClass

    marked = {
        entry.__name__
        for entry in EntryClass
        if getattr(entry.load_weights, "_supports_quantized_rl_reload", None) is entry.load_weights
    }
    assert marked == {FAMILIES[family].architecture for family in FLASH_RL}


def test_the_folder_without_weights_is_small_and_whole(tmp_path):
    """Tokenizer and templates, too: servers read them there."""
    path = make_hf_model(tmp_path / "model", layers=1, **SIZES)
    config = Config()
    config.model.path, config.model.dtype = str(path), Dtype.bfloat16
    assert weightless(config) is None
    config.rollout.servers.fp8 = Fp8Serving.block
    weightless(config)(tmp_path / "served")
    ours, theirs = ({f.name for f in folder.iterdir()} for folder in (tmp_path / "served", path))
    assert theirs - ours == {"model.safetensors"} and not ours - theirs
    found = json.loads((tmp_path / "served/config.json").read_text())
    assert found.pop("quantization_config")["scale_fmt"] == "ue8m0"
    assert found == {**json.loads((path / "config.json").read_text()), "dtype": "bfloat16"}
