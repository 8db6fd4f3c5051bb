"""What ``parallel.megatron`` may and may not say."""

import dataclasses

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend

from peergrad.algo.division import Cost
from peergrad.config import Dtype, ParallelConfig, Recompute, Spec
from peergrad.parallel.model import transformer_config
from peergrad.parallel.options import choose_spec, with_users_fields
from peergrad.parallel.policy import cost
from tests.cpu.parallel.test_mapping import SHAPE


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("no_such_field", 2, "is no field of TransformerConfig"),
        ("_cpu_offloading_context", 2, "is no field of TransformerConfig"),
        ("attention_dropout", 2, "is set by peergrad or not supported"),
        ("context_parallel_size", 2, "is set by peergrad or not supported"),
        ("num_moe_experts", 2, "is set by peergrad or not supported"),
        ("moe_router_topk", 2, "is set by peergrad or not supported"),
        ("rotary_interleaved", True, "is set by peergrad or not supported"),
        (
            "num_microbatches_with_partial_activation_checkpoints",
            "all",
            "must be a whole number or null",
        ),
        (
            "num_microbatches_with_partial_activation_checkpoints",
            1.5,
            "must be a whole number or null",
        ),
        (
            "num_microbatches_with_partial_activation_checkpoints",
            True,
            "must be a whole number or null",
        ),
        ("pipeline_model_parallel_comm_backend", "mpi", "must be nccl or ucc or null"),
        ("recompute_granularity", "full", "is set by peergrad or not supported"),
        ("offload_modules", "mlp", "must be a list of text or null"),
        ("offload_modules", [1], "must be a list of text or null"),
        ("use_kitchen", "yes", "must be true or false"),
        ("hybrid_context_parallel", True, "is set by peergrad or not supported"),
        ("pipeline_model_parallel_layout", "Et|tL", "is set by peergrad or not supported"),
        ("cp_comm_type", "a2a", "needs Transformer Engine's layers"),
        ("fp8_margin", 1, "has no effect without parallel.fp8"),
        ("fp4", "e2m1", "is set by peergrad or not supported"),
        ("attention_backend", "fused", "needs Transformer Engine's layers"),
        ("cpu_offloading", True, "needs Transformer Engine's layers"),
        ("init_method_std", "small", "must be a number"),
        ("timers", "mine", "must be what YAML cannot say: leave it or null"),
    ],
)
def test_fields_that_are_not_the_users_are_refused(key: str, value: object, rule: str) -> None:
    with pytest.raises(ValueError) as caught:
        transformer_config(SHAPE, ParallelConfig(megatron={key: value}), Dtype.float32, Spec.torch)
    assert str(caught.value).startswith(f"parallel.megatron.{key} = {value!r}: {rule}; ")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("tensor_model_parallel_size", "tensor"),
        ("pipeline_model_parallel_size", "pipeline"),
        ("virtual_pipeline_model_parallel_size", "virtual_pipeline"),
        ("num_layers_in_first_pipeline_stage", "first_stage_layers"),
        ("num_layers_in_last_pipeline_stage", "last_stage_layers"),
        ("context_parallel_size", "context"),
        ("deterministic_mode", "deterministic_mode"),
        ("sequence_parallel", "sequence"),
        ("recompute_granularity", "recompute"),
        ("recompute_method", "recompute_method"),
        ("recompute_num_layers", "recompute_layers"),
        ("recompute_modules", "recompute_modules"),
        ("fp8", "fp8"),
        ("fp8_recipe", "fp8"),
        ("fp8_param", "fp8_params"),
    ],
)
def test_a_field_with_a_key_of_its_own_names_it(name: str, key: str) -> None:
    assert key in {field.name for field in dataclasses.fields(ParallelConfig)}
    parallel = ParallelConfig(megatron={name: "full"})
    with pytest.raises(ValueError, match=rf"or not supported; set parallel\.{key}$"):
        transformer_config(SHAPE, parallel, Dtype.float32, Spec.torch)


def test_what_megatron_refuses_is_one_line() -> None:
    parallel = ParallelConfig(
        tensor=2,
        sequence=True,
        recompute=Recompute.full,
        megatron={"distribute_saved_activations": True},
    )
    with pytest.raises(ValueError, match=r"^parallel.megatron = .*Megatron refuses .*; correct"):
        transformer_config(SHAPE, parallel, Dtype.float32, Spec.torch)


def test_transformer_engine_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^parallel.spec = 'te': .* needs a GPU.*; set "):
        choose_spec(Spec.te)
    assert choose_spec(Spec.auto) is Spec.torch


def test_the_kind_of_attention_is_a_field_and_not_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for backend in ("local", ["fused"], 2):
        parallel = ParallelConfig(megatron={"attention_backend": backend})
        with pytest.raises(ValueError, match=r"must be flash or fused or unfused or auto; correct"):
            transformer_config(SHAPE, parallel, Dtype.float32, Spec.te)
    for name in ("FLASH", "FUSED", "UNFUSED"):
        monkeypatch.setenv(f"NVTE_{name}_ATTN", str(int(name == "FUSED")))
    fused = ParallelConfig(megatron={"attention_backend": "fused"})
    ours = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
    built = with_users_fields(ours, fused, Spec.te)
    assert built.attention_backend is AttnBackend.fused
    with pytest.raises(
        ValueError,
        match=r"^NVTE_FLASH_ATTN = '0': contradicts parallel.megatron.attention_backend = 'auto', "
        r"which sets it; unset it, and choose by that key$",
    ):
        transformer_config(SHAPE, ParallelConfig(), Dtype.float32, Spec.torch)


def test_other_fields_pass_through() -> None:
    parallel = ParallelConfig(megatron={"init_method_std": 0.5}, deterministic_mode=True)
    built = transformer_config(SHAPE, parallel, Dtype.bfloat16, Spec.torch)
    assert built.init_method_std == 0.5 and built.deterministic_mode
    assert built.bf16 and built.attention_dropout == 0 == built.hidden_dropout


def test_what_there_is_to_compute_by_hand() -> None:
    """A layer has 6 x (2 x 16 + 2 x 8 + 3 x 8) weights, and there are two; a head has 6 x 21."""
    assert cost(SHAPE) == Cost(pair=2 * 16 / 432, scored=126 / 864)
