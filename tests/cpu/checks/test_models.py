"""The model folders of a run, as its check reads them: what the load would refuse, it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peergrad.checks import check_inputs
from peergrad.config import Config
from tests.models import make_hf_model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("original"), layers=1, tied=True)


@pytest.fixture
def config(original: Path, tmp_path: Path) -> Config:
    config = Config()
    config.run.root, config.run.name = str(tmp_path / "runs"), "x"
    config.model.path = str(shutil.copytree(original, tmp_path / "model"))
    row = {"prompt": "1+1=", "answer": "2"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 20)
    config.data.source, config.data.max_prompt_tokens = str(tmp_path / "rows.jsonl"), 100
    config.rollout.batch_size, config.rollout.max_new_tokens = 16, 8
    return config


def refusal(config: Config) -> str:
    with pytest.raises(ValueError) as caught:
        check_inputs(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def add(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file({**load_file(file), name: tensor}, file)

    return edit


@pytest.mark.parametrize(
    ("edit", "rule"),
    [
        (add("score.weight", torch.ones(1, 64)), "tensor score.weight has no place in the qwen3 "),
        (
            add("lm_head.weight", torch.ones(128, 64)),
            "config.json says tie_word_embeddings = true, but lm_head.weight is not model.embed_to",
        ),
        (
            lambda folder: (folder / "vocab.json").symlink_to("nowhere"),
            "vocab.json cannot be read (No such file or directory); ",
        ),
    ],
)
def test_what_the_load_or_the_end_would_refuse(
    config: Config, edit: Callable[[Path], object], rule: str
) -> None:
    check_inputs(config)
    edit(Path(config.model.path))
    assert refusal(config).startswith(f"model.path = {config.model.path!r}: {rule}")


@pytest.mark.parametrize("key", ["path", "reference"])
def test_no_model_is_read_from_where_the_run_writes_its_own(
    config: Config, tmp_path: Path, key: str
) -> None:
    """At its end the run would replace the model that it, or its resume, starts from."""
    exported = tmp_path / "runs" / "x" / "hf"
    exported.parent.mkdir(parents=True)
    shutil.copytree(config.model.path, exported)
    (tmp_path / "link").symlink_to(exported.parent)
    for path in (exported, tmp_path / "link" / "hf"):
        setattr(config.model, key, str(path))
        assert refusal(config) == (
            f"model.{key} = {str(path)!r}: is the folder that this run replaces by the trained "
            "model; choose another run.name, or move that folder"
        )
    config.run.name = "y"
    check_inputs(config)
