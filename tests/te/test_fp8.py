"""Products in 8 bits: what they change, what they must not, and weights that are kept so."""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import MIXTURES, VARIED, make_hf_model
from tests.spawn import run_ranks
from tests.te.test_te_parity import make, objective, samples

pytestmark = pytest.mark.distributed

BLOCKWISE = {"fp8": "blockwise"}
PARAMS = {**BLOCKWISE, "fp8_params": True}


def each(path: str, layouts: list[dict[str, Any]], of: Callable[..., Any]) -> list[Any]:
    """``of`` a policy of each layout, one after the other in the same processes."""
    from peergrad.config import Fp8
    from peergrad.parallel.mesh import leave_layout

    found = []
    for layout in layouts:
        recipe = Fp8[layout.get("fp8", "off")]
        packing = {"fp8_depends_on_packing": recipe is Fp8.tensorwise}
        found.append(of(make(path, "te", {**packing, **layout, "fp8": recipe}, "bfloat16")))
        leave_layout()
    return found


def logp(policy: Any, **options: Any) -> np.ndarray:
    return np.concatenate(policy.score(samples(), **options).logp)


def both_ways(policy: Any) -> tuple[np.ndarray, np.ndarray]:
    return logp(policy), logp(policy, in_8_bits=False)


def test_logprobs_depend_on_the_packing_with_scales_of_what_is_packed(tmp_path: Path) -> None:
    path = str(make_hf_model(tmp_path / "a", layers=2, vocab=100, **VARIED["qwen3"]))
    recipes = ("off", "blockwise", "delayed", "tensorwise")
    layouts = [{"fp8": x, "micro_batch_tokens": n} for x in recipes for n in (32, 64)]
    (found,) = run_ranks(1, each, path, layouts, both_ways)
    plain = found[0][0]
    for recipe, (narrow, _), (wide, exact) in zip(recipes, found[::2], found[1::2], strict=True):
        assert np.abs(exact - plain).max() < 1e-6, recipe  # the same weights in bfloat16
        if recipe != "off":
            assert 0.05 < np.abs(narrow - plain).mean() < 0.3, recipe
        apart = np.abs(narrow - wide).max()
        assert apart > 0.1 if recipe == "tensorwise" else apart < 1e-6, (recipe, apart)


def learn(policy: Any) -> dict[str, Any]:
    """What is loaded, what is learnt from it in three steps, and how 8 bits are used."""
    from megatron.core.fp8_utils import is_float8tensor

    found: dict[str, Any] = {"loaded": dict(_cloned(policy)), "before": logp(policy)}
    found["kept"] = sum(map(is_float8tensor, policy.model.parameters()))
    found["norms"] = []
    for _ in range(3):
        update = policy.update(samples(), objective())
        assert update.finite
        found["norms"].append(update.metrics["optim/grad_norm"])
        deque(policy.weights(), maxlen=0)  # as they are brought to the engine
    held = [p for p in policy.model.parameters() if hasattr(p, "_high_precision_init_val")]
    assert not held
    found["after"], found["learnt"] = logp(policy), dict(_cloned(policy))
    return found


def _cloned(policy: Any) -> Any:
    return ((name, x.clone()) for name, x in policy.weights())


def quantised(weight: torch.Tensor) -> torch.Tensor:
    """As 8 bits say it in blocks of 128 x 128, whose scales are powers of two."""
    found = torch.empty_like(weight)
    for i in range(0, weight.shape[0], 128):
        for j in range(0, weight.shape[1], 128):
            block = weight[i : i + 128, j : j + 128].float()
            scale = torch.exp2(torch.floor(torch.log2(448 / block.abs().amax())))
            rounded = (block * scale).to(torch.float8_e4m3fn).float() / scale
            found[i : i + 128, j : j + 128] = rounded.to(weight.dtype)
    return found


def test_weights_in_8_bits_learn_as_those_that_are_not(tmp_path: Path) -> None:
    """From the weights of the model, not from those that it was made with; what is exported are
    the numbers that it computes with."""
    from safetensors.torch import load_file

    path = str(make_hf_model(tmp_path / "a", layers=2, vocab=100, tied=True))
    original = load_file(Path(path) / "model.safetensors")
    (found,) = run_ranks(1, each, path, [BLOCKWISE, PARAMS], learn)
    usual, kept = found
    assert (usual["kept"], kept["kept"]) == (0, 8)
    for name, x in original.items():
        exact = x.bfloat16()
        assert torch.equal(usual["loaded"][name], exact), name
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert torch.equal(kept["loaded"][name], quantised(exact)), name
    for name, x in usual["learnt"].items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert torch.equal(kept["learnt"][name], quantised(x)), name
    for key in ("before", "norms", "after"):
        np.testing.assert_allclose(kept[key], usual[key], rtol=1e-6, atol=1e-5)


def again(path: str, folder: str) -> list[dict[str, Any]]:
    """A policy that learns, twice; one that starts from the weights which a checkpoint has of it
    before, and goes on from a checkpoint between the two."""
    from peergrad.config import Fp8
    from peergrad.parallel.mesh import leave_layout
    from peergrad.parallel.snapshot import load_megatron, save_weights, write_megatron

    layout = {**PARAMS, "fp8": Fp8.blockwise}
    policy = make(path, "te", layout, "bfloat16")
    first, state = Path(folder) / "first", Path(folder) / "state"
    save_weights(first, policy.model, policy.shape, policy.mesh, companions=policy.companions)
    found = [learn(policy)]
    state.mkdir()
    write_megatron(state, policy.model, policy.optimizer, aside=False).finish()
    found.append(learn(policy))
    leave_layout()
    policy = make(path, "te", layout, "bfloat16", weights=str(first))
    found.append(learn(policy))
    load_megatron(state, policy.model, policy.optimizer)
    found.append(learn(policy))
    leave_layout()
    return found


def test_checkpoints(tmp_path: Path) -> None:
    """Of weights alone they hold what 8 bits say, and main weights begin there, not with the random
    ones that a model is made with; with an optimizer's state they are exact."""
    path = str(make_hf_model(tmp_path / "a", layers=2, vocab=100, tied=True))
    ((first, second, restarted, resumed),) = run_ranks(1, again, path, str(tmp_path))
    for key in ("before", "norms", "after"):
        np.testing.assert_array_equal(resumed[key], second[key])
    np.testing.assert_array_equal(restarted["before"], first["before"])
    np.testing.assert_allclose(restarted["norms"], first["norms"], rtol=0.1)


def alike(found: list[dict[str, Any]], of: int = 0) -> None:
    """Each layout rounds a little otherwise; what is lost or added up twice differs by far more."""
    for one in found:
        np.testing.assert_allclose(one["norms"], found[of]["norms"], rtol=0.05)
        assert np.abs(one["before"] - found[of]["before"]).mean() < 0.3


@pytest.mark.slow
def test_layouts(tmp_path: Path) -> None:
    """Rows are padded as each needs it; parameters come from other ranks in 8 bits."""
    model = {"layers": 2, "vocab": 100, "hidden_size": 128, **VARIED["qwen3"]}
    path = str(make_hf_model(tmp_path / "a", **model))
    layouts = [
        {**PARAMS, "data": 2},
        {**BLOCKWISE, "data": 2},
        {**BLOCKWISE, "tensor": 2},
        {**PARAMS, "tensor": 2, "sequence": True},
        {**PARAMS, "pipeline": 2, "fp8_first_layers_bf16": 1},
        {**PARAMS, "data": 2, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ]
    found, _ = run_ranks(2, each, path, layouts, learn)
    alike(found)
    assert [one["kept"] for one in found] == [8, 0, 0, 8, 0, 8]
    for key in ("before", "norms", "after"):  # kept in 8 bits or not, gathered when it is
        for one in (found[1], found[-1]):
            np.testing.assert_allclose(found[0][key], one[key], rtol=1e-6, atol=1e-5)


@pytest.mark.slow
def test_experts(tmp_path: Path) -> None:
    model = {"layers": 2, "vocab": 100, "family": "qwen3_moe", **MIXTURES["qwen3_moe"]}
    path = str(make_hf_model(tmp_path / "a", **model))
    layouts = [{**BLOCKWISE, "data": 2}, {**BLOCKWISE, "data": 2, "expert": 2}]
    found, _ = run_ranks(2, each, path, layouts, learn)
    alike(found)
