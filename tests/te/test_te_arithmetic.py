"""Where Transformer Engine's layers add up in more digits, and in fewer."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.spawn import run_ranks
from tests.te.test_te_parity import make, model, objective, samples

pytestmark = pytest.mark.distributed


def gradients(path: str) -> dict[str, Any]:
    """Of a model in bfloat16 with one micro-batch: is every matrix's gradient in bfloat16, too?"""
    from peergrad.parallel.mesh import leave_layout
    from peergrad.parallel.policy import Scorer

    found: dict[str, Any] = {}
    policy = make(path, "te", {"micro_batch_tokens": 10_000}, "bfloat16")
    policy.update(samples(), objective())
    for name, parameter in policy.model.named_parameters():
        if ".linear_" in name and name.endswith("weight") and "norm" not in name:
            grad = parameter.main_grad
            found[name] = bool((grad == grad.bfloat16()).all())
    frozen = Scorer(policy.config, policy.mesh, path=path)
    modules = [m for m in frozen.model.modules() if hasattr(m, "fuse_wgrad_accumulation")]
    found["frozen"] = [module.fuse_wgrad_accumulation for module in modules]
    leave_layout()
    return found


def test_gradients_of_weights_are_added_up_in_float32(tmp_path: Path) -> None:
    """Made in bfloat16 first they would be rounded to it. A model that does not learn has no place
    to add them to."""
    (found,) = run_ranks(1, gradients, model(tmp_path, "qwen3"))
    assert found.pop("frozen") == [False] * 8
    assert len(found) == 8 and not any(found.values())


def quantised() -> dict[str, Any]:
    """Largest relative error of each way to hold ``[256, 384]`` in 8 bits, of what Transformer
    Engine's own Python reads and of what the stand-in's products do; and of a product."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch import Float8BlockQuantizer, Float8CurrentScalingQuantizer
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    from peergrad.parallel.device import set_up_device
    from tests.te.quantisation import value_of

    set_up_device()
    torch.manual_seed(0)
    x = torch.randn(256, 384) * torch.logspace(-3, 3, 256)[:, None]
    e4m3, found = tex.DType.kFloat8E4M3, {}

    def error(value: torch.Tensor, exact: torch.Tensor = x) -> float:
        return float((value - exact).abs().amax() / exact.abs().amax())

    def blocks(dim: int, rows: bool, compact: bool = False) -> Any:
        return Float8BlockQuantizer(
            e4m3, rowwise=rows, columnwise=not rows, block_scaling_dim=dim, all_gather_usage=compact
        )

    for rows in (True, False):
        for dim, compact in ((1, False), (1, True), (2, False)):
            one = blocks(dim, rows, compact)(x)
            found["blocks", rows, dim, compact, "theirs"] = error(one.dequantize())
            if not compact:
                found["blocks", rows, dim, compact, "ours"] = error(value_of(one, rows=rows))
    whole = Float8CurrentScalingQuantizer(e4m3, device=torch.device("cpu"))(x)
    for rows in (True, False):
        found["whole", rows] = error(value_of(whole, rows=rows))
    weight = torch.randn(128, 384)
    product = general_gemm(blocks(2, True)(weight), blocks(1, True)(x), torch.float32)[0]
    found["product"] = error(product, x @ weight.t())
    exact = blocks(1, True)(x).dequantize() @ blocks(2, True)(weight).dequantize().t()
    found["product of what is held"] = error(product, exact)
    return found


def test_eight_bits_are_held_as_transformer_engine_reads_them() -> None:
    (found,) = run_ranks(1, quantised)
    assert found.pop("product of what is held") < 1e-6
    assert found.pop("product") < 0.05
    assert len(found) == 12 and all(0 < error <= 1 / 16 for error in found.values())
