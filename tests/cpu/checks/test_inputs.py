"""What a run reads at its start: each mistake in it is one line at check time."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peergrad.checks import Source, check, check_inputs
from peergrad.checks.place import check_folder
from peergrad.config import Config, Fp8, Recompute, RewardKind, ServerMode, Spec
from peergrad.inputs import collector_parts
from peergrad.parallel.hf.folder import INDEX
from tests.models import make_hf_model

Edit = Callable[[Config, Path], object]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("original"), layers=2)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A model of its own for each test, in ``model``, and 9 rows of data."""
    shutil.copytree(original, tmp_path / "model")
    write_rows(tmp_path, [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(1, 10)])
    return tmp_path


@pytest.fixture
def config(folder: Path) -> Config:
    config = Config()
    config.run.root = str(folder / "runs")
    config.model.path = str(folder / "model")
    config.data.source, config.data.max_prompt_tokens = str(folder / "rows.jsonl"), 100
    config.rollout.batch_size, config.rollout.max_new_tokens = 16, 8
    return config


def write_rows(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def refusal(config: Config) -> str:
    check(config, world=1)  # is not what finds it
    with pytest.raises(ValueError) as caught:
        check_folder(config)
        check_inputs(config)
    message = str(caught.value)
    assert re.fullmatch(r"[\w.]+ = .+: .+; .+", message), message  # one line
    return message


def test_what_was_found(config: Config, folder: Path) -> None:
    rows = [{"prompt": "1" * n, "answer": "2"} for n in (3, 7, 5, 101)]
    config.data.held_out = write_rows(folder, rows, "test.jsonl")
    found = check_inputs(config)
    assert found.shape.vocab == 128 and found.tokenizer is not None and found.tokenizer.end == 1
    assert found.train == Source(config.data.source, prompts=9, left_out=0, typical=4, longest=4)
    assert found.held_out == Source(config.data.held_out, 3, 1, typical=5, longest=7)
    assert not Path(config.run.root).exists()  # nothing was written


def test_several_files_and_what_they_share(config: Config, folder: Path) -> None:
    rows = [{"prompt": f"{i}+1=", "answer": f"{i + 1}.0"} for i in (1, 30, 30)]
    other = write_rows(folder, rows, "other.jsonl")
    test = write_rows(folder, [{"prompt": "1+1=", "answer": "2"}, *rows[1:2]], "test.jsonl")
    config.data.source, config.data.held_out = [config.data.source, other], test
    said: list[str] = []
    found = check_inputs(config, heard=said.append)
    assert found.train is not None and found.held_out is not None
    assert found.train.name == f"{folder}/rows.jsonl and 1 more"
    assert (found.train.prompts, found.train.repeated, found.train.contradicting) == (12, 2, 1)
    assert (found.held_out.repeated, found.shared) == (0, 2)
    assert said == ["", ""]  # nothing took a second
    write_rows(folder, [*rows, {"prompt": "9", "answer": ""}], "other.jsonl")
    assert f"the answer in row 4 of {folder}/other.jsonl ('') is empty; " in refusal(config)


def add_far_token(config: Config, folder: Path) -> None:
    """A tokenizer whose post-processor puts a token before every text that no model has."""
    file = folder / "model" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    far = {"id": "<far>", "ids": [500], "tokens": ["<far>"]}
    parts = [
        {"SpecialToken": {"id": "<far>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    tokenizer["post_processor"] = {
        **{"type": "TemplateProcessing", "single": parts, "pair": parts + parts[1:]},
        "special_tokens": {"<far>": far},
    }
    file.write_text(json.dumps(tokenizer))


def test_ids_that_the_model_does_not_know(config: Config, folder: Path) -> None:
    """The check and the collector, which reads the prompts again, refuse them alike."""
    add_far_token(config, folder)
    found = refusal(config)
    assert found.startswith(
        "data.prompt_key = 'prompt': row 1 of rows.jsonl has token 500, but the model (vocab_size) "
        "knows only 128; "
    )
    with pytest.raises(ValueError) as caught:
        collector_parts(config)
    assert str(caught.value) == found


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def rewrite(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a safetensors file and nothing else."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    file.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])


def shards(folder: Path, names: list[str]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {n: n for n in names}}))


NORM = "model.norm.weight"
FOLDERS: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: (f / WEIGHTS).unlink(), "holds no *.safetensors file; "),
    (
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
        "holds its weights as pickles, not as *.safetensors; convert it",
    ),
    (lambda f: (f / WEIGHTS).write_text(LFS), f"{WEIGHTS} is a Git-LFS pointer instead of weights"),
    (lambda f: (f / WEIGHTS).write_text(""), f"{WEIGHTS} is empty; download it again"),
    (lambda f: (f / WEIGHTS).write_text("abc"), f"{WEIGHTS} is no safetensors file; "),
    (lambda f: (f / WEIGHTS).write_text("<html>" * 99), f"{WEIGHTS} is no safetensors file; "),
    (
        lambda f: (f / WEIGHTS).write_bytes(b"\x02" + bytes(7) + b"[]"),
        f"{WEIGHTS} is no safetensors",
    ),
    (lambda f: cut(f / WEIGHTS, 100), f"{WEIGHTS} is cut short: 100 bytes, and its header alone"),
    (lambda f: cut(f / WEIGHTS, 100_000), f"{WEIGHTS} is not whole: 100000 bytes instead of "),
    (lambda f: shards(f, ["a.safetensors"]), f"{INDEX} names a.safetensors, which is not there"),
    (lambda f: (f / INDEX).write_text("{}"), f"{INDEX} is no index of safetensors files"),
    (lambda f: (f / INDEX).write_text("["), f"{INDEX} is no index of safetensors files"),
    (lambda f: (f / INDEX).write_text(LFS), f"{INDEX} is a Git-LFS pointer; fetch the real file"),
    (
        lambda f: rewrite(f / WEIGHTS, lambda h: h.update({"other": h.pop(NORM)})),
        f"tensor {NORM} is in none of its files; ",
    ),
    (
        lambda f: rewrite(f / WEIGHTS, lambda h: h[NORM].update(shape=[32, 2])),
        f"tensor {NORM} is (32, 2), but config.json means (64,); take both from one model",
    ),
    (
        lambda f: rewrite(f / WEIGHTS, lambda h: h[NORM].update(dtype="F8_E4M3")),
        f"tensor {NORM} is stored as F8_E4M3, which is quantised; ",
    ),
]


@pytest.mark.parametrize(("damage", "rule"), FOLDERS)
def test_weights_that_cannot_be_whole(
    config: Config, folder: Path, damage: Callable[[Path], object], rule: str
) -> None:
    shutil.copytree(folder / "model", folder / "reference")
    damage(folder / "model")
    assert refusal(config).startswith(f"model.path = '{folder}/model': {rule}")
    config.model.path = str(folder / "reference")
    config.model.reference = str(folder / "model")
    assert refusal(config).startswith(f"model.reference = '{folder}/model': {rule}")


def test_weights_that_nobody_reads_may_be_absent(config: Config, folder: Path) -> None:
    """With model.weights only managed servers read model.path, unless they are told not to."""
    (folder / "model" / WEIGHTS).unlink()
    config.model.weights = str(folder / "checkpoint")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "meta.json").write_text("{")
    assert refusal(config).startswith("model.path = ")
    config.rollout.servers.args = {"load-format": "dummy"}
    assert refusal(config).startswith("model.weights = ")
    config.rollout.servers.args = {}
    config.rollout.servers.mode = ServerMode.external
    assert refusal(config).startswith("model.weights = ")


META = {
    **{"format": 1, "step": 1, "updates": 1, "world": 1, "dtype": "float32"},
    **{"shape": {}, "files": {}},
}


@pytest.mark.parametrize(
    ("meta", "rule"),
    [
        ("{", "is no whole checkpoint (meta.json is not JSON "),
        ("[]", "is no whole checkpoint (meta.json holds a list "),
        ('{"format": 1}', "is no whole checkpoint (meta.json has no step, "),
        ('{"format": 1, "step": 1}', "is no whole checkpoint (meta.json has no updates, "),
        (
            json.dumps({**META, "shape": {"family": "llama"}}),
            "is of another model (family llama instead of qwen3); set model.path to the model it",
        ),
        ('{"format": 99}', "is no whole checkpoint (format 99 instead of "),
        (
            json.dumps({**META, "files": {"model/a": 3}}),
            "is no whole checkpoint (model/a is missing); ",
        ),
    ],
)
def test_checkpoints_that_are_none(config: Config, folder: Path, meta: str, rule: str) -> None:
    config.model.weights = str(folder / "checkpoint")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "meta.json").write_text(meta)
    assert refusal(config).startswith(f"model.weights = '{folder}/checkpoint': {rule}")


def test_a_run_that_would_end_before_its_checkpoint(config: Config, folder: Path) -> None:
    config.run.root, config.run.name = str(folder), "resumed"
    config.run.resume, config.run.steps = True, 2
    step = folder / "resumed" / "checkpoints" / "step_000003"
    step.mkdir(parents=True)
    (step / "meta.json").write_text(json.dumps({**META, "step": 3}))
    (step.parent / "latest").write_text(step.name)
    assert refusal(config).startswith(f"run.steps = 2: checkpoint {step} was taken after step 3; ")


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1.0, 3), (2.0, 5), (0.5, 2), (0.01, 1), (4.0, 10), (2.4, 6)]
)
def test_epochs_are_whole_steps(config: Config, folder: Path, epochs: float, steps: int) -> None:
    """Five prompts, two a step."""
    rows = [{"prompt": f"{i}+1=", "answer": f"{i + 1}"} for i in range(5)]
    (folder / "five.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.data.source, config.data.held_out = str(folder / "five.jsonl"), None
    config.rollout.batch_size, config.rollout.group_size = 8, 4
    assert check_inputs(config).steps is None
    config.run.epochs = epochs
    assert check_inputs(config).steps == steps


def test_what_is_counted_in_steps_fits_into_the_epochs(config: Config, folder: Path) -> None:
    (folder / "one.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    config.data.source, config.data.held_out = str(folder / "one.jsonl"), None
    config.rollout.batch_size, config.rollout.group_size = 4, 4
    config.run.epochs, config.run.steps, config.optim.warmup_steps = 5, 1, 5
    assert refusal(config).startswith("optim.warmup_steps = 5: optim.lr would never be reached")
    config.optim.warmup_steps = 4
    assert check_inputs(config).steps == 5


def drop(file: Path, key: str) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), key: None}))


def test_tokenizers_that_cannot_serve(config: Config, folder: Path) -> None:
    """tests/cpu/prompts/test_tokenizer.py has all of them."""
    drop(folder / "model" / "tokenizer_config.json", "eos_token")
    assert refusal(config).startswith(f"model.path = '{folder}/model': its tokenizer has no end")
    (folder / "model" / "tokenizer_config.json").unlink()
    (folder / "model" / "tokenizer.json").unlink()
    assert refusal(config).startswith(f"model.path = '{folder}/model': the folder holds no token")


@pytest.mark.parametrize("key", ["source", "held_out"])
@pytest.mark.parametrize(
    ("rows", "rule"),
    [
        ([], "data.{key} = {path}: holds no rows"),
        ([5], "data.{key} = {path}: row 1 of bad.jsonl is no object"),
        ([{"question": "1", "answer": "2"}], "data.prompt_key = 'prompt': row 1 of bad.jsonl has"),
        ([{"prompt": "1"}], "data.answer_key = 'answer': row 1 of bad.jsonl has no such column"),
        ([{"prompt": "1", "answer": None}], "data.answer_key = 'answer': row 1 of bad.jsonl must"),
        ([{"prompt": "1", "answer": " "}], "reward.kind = 'arithmetic': the answer in row 1 of "),
        ([{"prompt": "1" * 101, "answer": "2"}], "data.max_prompt_tokens = 100: the shortest of "),
    ],
)
def test_rows_that_cannot_be_used(
    config: Config, folder: Path, key: str, rows: list[Any], rule: str
) -> None:
    path = write_rows(folder, rows, "bad.jsonl")
    setattr(config.data, key, path)
    assert refusal(config).startswith(rule.format(key=key, path=repr(path)))


def test_answers_fit(config: Config, folder: Path) -> None:
    rows = [{"prompt": "1", "answer": "12345678"}, {"prompt": "1", "answer": "123456789"}]
    config.data.source = write_rows(folder, rows)
    assert refusal(config) == (
        "rollout.max_new_tokens = 8: is too few for any answer of data.source: the shortest takes "
        "9 with its end token; use at least 10"
    )
    config.rollout.max_new_tokens = 9  # enough for one
    check_inputs(config)


def chat_without_template(config: Config, folder: Path) -> None:
    (folder / "model" / "chat_template.jinja").unlink()
    config.data.chat = True


def reward_function(name: str) -> Edit:
    def edit(config: Config, folder: Path) -> None:
        config.reward.kind, config.reward.function = RewardKind.function, name

    return edit


def megatron(**fields: Any) -> Edit:
    return lambda config, folder: config.parallel.megatron.update(fields)


def root(name: str) -> Edit:
    return lambda config, folder: setattr(config.run, "root", str(folder / name))


OTHERS: list[tuple[Edit, str]] = [
    (chat_without_template, "data.chat = True: the tokenizer of "),
    (lambda c, f: setattr(c.reward, "kind", RewardKind.gsm8k) or write_rows(f, [
        {"prompt": "1", "answer": "one"}]), "reward.kind = 'gsm8k': the answer in row 1 of "),
    (reward_function("no_such_module:f"), "reward.function = 'no_such_module:f': cannot be imp"),
    (reward_function("math:pi"), "reward.function = 'math:pi': must name something callable"),
    (reward_function("math:sin"), "reward.function = 'math:sin': must take two arguments"),
    (megatron(recompute="full"), "parallel.megatron.recompute = 'full': is no field of Transf"),
    (megatron(init_method_std="2"), "parallel.megatron.init_method_std = '2': must be a number"),
    (megatron(recompute_num_layers=2), "parallel.megatron.recompute_num_layers = 2: is set by pe"),
    (megatron(fp8_param=True), "parallel.megatron.fp8_param = True: is set by peergrad or not"),
    (lambda c, f: setattr(c.parallel, "fp8", Fp8.blockwise),
        "parallel.fp8 = 'blockwise': needs Transformer Engine's layers, and parallel.spec=auto "),
    (lambda c, f: setattr(c.parallel, "recompute", Recompute.selective) or setattr(
        c.parallel, "recompute_modules", ["layernorm"]), "parallel.recompute_modules = 'layernorm"),
    (root("rows.jsonl"), "run.root = '"),
    (root("rows.jsonl/deeper"), "run.root = '"),
    (lambda c, f: setattr(c.run, "root", "/proc"), "run.root = '/proc': cannot be written to ("),
    (lambda c, f: setattr(c.run, "root", "x" * 300), "run.root = 'x"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "start"), OTHERS)
def test_everything_else(config: Config, folder: Path, edit: Edit, start: str) -> None:
    edit(config, folder)
    assert refusal(config).startswith(start)


def test_what_needs_a_gpu(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config.parallel.spec = Spec.te
    assert refusal(config).startswith("parallel.spec = 'te': Transformer Engine needs a GPU")
    config.optim.use_precision_aware_optimizer = True
    rule = " = True: is for the memory of a GPU, and PyTorch sees none; unset it "
    assert refusal(config).startswith(f"optim.use_precision_aware_optimizer{rule}")
    config.optim.optimizer_cpu_offload = True
    assert refusal(config).startswith(f"optim.optimizer_cpu_offload{rule}")


def test_what_a_gpu_needs(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    config.optim.use_precision_aware_optimizer = True
    rule = " = True: needs FusedAdam of the package transformer-engine, which is not installed; "
    assert refusal(config).startswith(f"optim.use_precision_aware_optimizer{rule}")
    config.parallel.deterministic_mode = True
    rule = " = True: needs NCCL_ALGO, which is None, to be one of Ring, Tree, "
    assert refusal(config).startswith(f"parallel.deterministic_mode{rule}")
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":8:8")
    rule = " = True: needs CUBLAS_WORKSPACE_CONFIG, which is :8:8, to be :4096:8 or :16:8; "
    assert refusal(config).startswith(f"parallel.deterministic_mode{rule}")


def test_weights_and_biases_wants_a_key(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "WANDB_API_KEY",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_BASE_URL",
        "NETRC",
        "WANDB_CONFIG_DIR",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    config.logger.wandb = "online"
    assert refusal(config) == (
        f"logger.wandb = 'online': needs a key, and neither WANDB_API_KEY nor {tmp_path}/.netrc "
        "has one for api.wandb.ai; run wandb login, or set logger.wandb=offline"
    )
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    check_inputs(config)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert "for wandb.example.org; " in refusal(config)
    settings = tmp_path / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("no section")
    assert "for wandb.example.org; " in refusal(config)
    settings.write_text("[default]\napi_key = x%y\n")
    check_inputs(config)
    settings.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    check_inputs(config)
