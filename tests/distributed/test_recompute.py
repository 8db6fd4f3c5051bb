"""``parallel.recompute`` keeps what it says between the passes, and no more. That gradients stay
what they are is on the grid of test_invariance.py."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import make_hf_model
from tests.spawn import run_ranks

TOKENS, HIDDEN, LAYERS = 96, 64, 4
INPUT = (TOKENS - 1) * HIDDEN * 4  # bytes of a layer's: nothing is predicted from the last token
CASES: dict[str, dict[str, Any]] = {
    "off": {},
    "attention": {"recompute": "selective"},
    "both": {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "one": {"recompute": "full", "recompute_method": "block"},
    "three": {"recompute": "full", "recompute_method": "block", "recompute_layers": 3},
    "each": {"recompute": "full"},
    "pairs": {"recompute": "full", "recompute_layers": 2},
}


def kept_bytes(path: str) -> dict[str, int]:
    """What autograd keeps of a forward pass through the layers in each case, parameters aside."""
    import numpy as np

    from peergrad.algo.packing import pack
    from peergrad.algo.samples import Sample
    from peergrad.config import Dtype, ParallelConfig, Recompute, RecomputeMethod
    from peergrad.parallel.hf.config import read_shape
    from peergrad.parallel.mesh import init_mesh
    from peergrad.parallel.model import build_model, run

    mesh = init_mesh(ParallelConfig(), seed=0)
    tokens, zero = np.arange(TOKENS, dtype=np.int32), np.zeros(TOKENS - 8, np.float32)
    sample = Sample(tokens, 8, zero, zero, zero + 1, zero.astype(np.int32))
    found = {}
    for name, given in CASES.items():
        kinds = {"recompute": Recompute, "recompute_method": RecomputeMethod}
        fields = {k: kinds[k][v] if k in kinds else v for k, v in given.items()}
        stage = build_model(read_shape(path), ParallelConfig(**fields), Dtype.float32, mesh)
        held = {p.untyped_storage().data_ptr() for p in stage.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(x: torch.Tensor, kept: Any = kept, held: Any = held) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in held:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        stage.train()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            run(stage.pieces[0], pack([sample], share=False), mesh.context)
        found[name] = sum(storage.nbytes() for storage in kept.values())
    return found


@pytest.mark.distributed
def test_less_is_kept(tmp_path: Path) -> None:
    path = str(make_hf_model(tmp_path / "model", layers=LAYERS))
    (found,) = run_ranks(1, kept_bytes, path)
    order = ["off", "attention", "both", "each", "pairs"]
    assert sorted(found[name] for name in order)[::-1] == [found[name] for name in order]
    assert len({found[name] for name in order}) == len(order)
    # The inputs of two layers fewer; each block's layer leaves the same behind.
    assert found["each"] - found["pairs"] == 2 * INPUT
    assert found["one"] - found["three"] == 2 * (found["off"] - found["one"]) > 0
