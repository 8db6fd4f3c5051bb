"""The Megatron model against transformers on the same weights, for every layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import MIXTURES, VARIED, make_hf_model
from tests.spawn import run_ranks

LENGTHS = (3, 17, 1, 40, 9)
VOCAB = 100  # no multiple of the padding
Layout = dict[str, Any]  # fields of parallel
SPREAD: Layout = {"tensor": 2, "sequence": True, "expert": 2}


def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in LENGTHS]


def hf_logits(path: str) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return [model(torch.from_numpy(s).long()[None]).logits[0] for s in sequences()]


def build(path: str, layout: Layout) -> Any:
    from peergrad.config import (
        Config,
        Dtype,
        KernelsConfig,
        ModelConfig,
        ParallelConfig,
        RolloutConfig,
    )
    from peergrad.parallel.mesh import init_mesh
    from peergrad.parallel.policy import Scorer

    config = Config(
        model=ModelConfig(path=path, dtype=Dtype.float32),
        parallel=ParallelConfig(micro_batch_tokens=48, **layout),
        kernels=KernelsConfig(chunk=7),
        rollout=RolloutConfig(temperature=0.7),
    )
    return Scorer(config, init_mesh(config.parallel, seed=0), path=path)


def last_hidden(scorer: Any, batches: list[Any]) -> list[torch.Tensor]:
    """Hidden states through the real schedule; last stage only."""
    with torch.no_grad():
        return scorer._schedule(
            scorer.model, batches, lambda batch, hidden, **_: hidden, forward_only=True
        )


def rank_logits(path: str, layout: Layout) -> dict[str, Any]:
    """Logits of all sequences, packed into one row and one by one, logprobs and exports. No logits
    of context ranks, which have parts of the rows, nor of a virtual pipeline, which takes no such
    numbers of rows."""
    from peergrad.algo.packing import pack
    from peergrad.algo.samples import Sample

    scorer = build(path, layout)
    samples = []
    for tokens in sequences():
        zero = np.zeros(tokens.size - 1, np.float32)
        samples.append(Sample(tokens, 1, zero, zero, zero + 1, zero.astype(np.int32)))
    options: dict[str, Any] = {"multiple": layout["tensor"] if "sequence" in layout else 1}
    options["routed"] = scorer.shape.experts is not None
    ways = (("packed", [samples]), ("alone", [[s] for s in samples]))
    out: dict[str, Any] = {"logits": {}, "weights": {}}
    for name, parts in ways if not {"context", "virtual_pipeline"} & set(layout) else ():
        hidden = last_hidden(scorer, [pack(part, **options) for part in parts])
        if scorer.mesh.is_last_stage:
            weight = scorer.head.model.head_weight()
            shards = [torch.empty_like(weight) for _ in range(scorer.mesh.tensor.size())]
            torch.distributed.all_gather(shards, weight.detach(), group=scorer.mesh.tensor)
            head = torch.cat(shards)[: scorer.shape.vocab]
            rows = torch.cat(
                [
                    scorer.head.model.head_input(h, summed=False)[
                        : sum(s.tokens.size - 1 for s in part)
                    ]
                    for h, part in zip(hidden, parts, strict=True)
                ]
            )
            out["logits"][name] = (rows @ head.t()).split([s.tokens.size - 1 for s in samples])
    out["logp"] = np.concatenate(scorer.score(samples).logp)
    for key, value in scorer.weights():
        out["weights"][key] = value.clone()
    return out


def all_layouts(paths: list[str], layouts: list[Layout]) -> list[dict[str, Any]]:
    """Every model on every layout, one after the other in the same processes."""
    from peergrad.parallel.mesh import leave_layout

    found = []
    for layout in layouts:
        for path in paths:
            found.append(rank_logits(path, layout))
            leave_layout()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        (1, [{}]),
        (2, [{"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "sequence": True}, {"context": 2}]),
        (4, [{"tensor": 2, "pipeline": 2}, {"context": 2, "pipeline": 2, "virtual_pipeline": 2}]),
        (2, [{"expert": 2}, {**SPREAD, "expert_tensor": 1}, {"context": 2, "expert": 2}]),
        (4, [SPREAD, {"expert": 2, "pipeline": 2, "virtual_pipeline": 2}]),
        # Two ranks hold the same experts, and two the same key and value heads.
        (4, [{**SPREAD, "tensor": 4, "expert_tensor": 1}]),
    ],
)
def test_equals_transformers(tmp_path: Path, ranks: int, layouts: list[Layout]) -> None:
    families = MIXTURES if any("expert" in layout for layout in layouts) else VARIED
    paths = [
        make_hf_model(tmp_path / family, family=family, vocab=VOCAB, **others)
        for family, others in families.items()
    ]
    models = [(hf_logits(str(path)), path) for path in paths]
    every = run_ranks(ranks, all_layouts, [str(path) for path in paths], layouts)
    assert all(found["weights"] for found in every[0])
    for rank in every:
        for found, model in zip(rank, models * len(layouts), strict=True):
            check(found, *model)


def check(found: dict[str, Any], wanted: list[torch.Tensor], path: Path) -> None:
    for sequences_logits in found["logits"].values():
        for ours, theirs in zip(sequences_logits, wanted, strict=True):
            # the last token predicts nothing, and is not computed
            torch.testing.assert_close(ours, theirs[:-1], atol=1e-4, rtol=0)
    check_logprobs(found["logp"], wanted)
    if found["weights"]:  # the first context rank's
        check_round_trip(found["weights"], path)


def check_logprobs(found: np.ndarray, wanted: list[torch.Tensor]) -> None:
    """Scores at temperature 0.7, in the order of the samples, against log_softmax of transformers'
    logits."""
    expected = []
    for logits, tokens in zip(wanted, sequences(), strict=True):
        target = torch.from_numpy(tokens[1:]).long()
        logp = (logits[:-1] / 0.7).log_softmax(-1).gather(1, target[:, None])[:, 0]
        expected.append(logp.detach().numpy())
    np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-4)


def check_round_trip(weights: dict[str, torch.Tensor], path: Path) -> None:
    """HF -> Megatron -> HF is bit-exact and complete."""
    from safetensors.torch import load_file

    original = load_file(path / "model.safetensors")
    assert set(weights) == set(original)
    for key, value in original.items():
        assert torch.equal(weights[key], value), key
