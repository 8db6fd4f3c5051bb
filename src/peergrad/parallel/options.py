"""What ``parallel.spec`` and ``parallel.megatron`` may say."""

import logging
import types
import typing
from dataclasses import fields
from enum import Enum
from typing import Any, Literal, Union

from megatron.core.transformer import TransformerConfig

from peergrad.config import Fp8, ParallelConfig, Recompute, Spec, require
from peergrad.config.rules import one_line
from peergrad.parallel import engine
from peergrad.running.hints import meant

log = logging.getLogger(__name__)

UNSUPPORTED = (
    *("fp8_quantizer_factory", "fp8_interval", "fp8_dot_product_attention"),
    *("fp8_multi_head_attention", "fp4", "fp4_recipe", "fp4_param", "fp4_quantizer_factory"),
    *("hybrid_context_parallel", "max_seqlen_per_dp_cp_rank"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size"),
    *("pipeline_model_parallel_layout", "account_for_embedding_in_pipeline_split"),
    "account_for_loss_in_pipeline_split",
)
ANOTHER_MODEL = (
    *("num_moe_experts", "mtp_num_layers", "multi_latent_attention"),
    *("experimental_attention_variant", "linear_attention_freq", "no_rope_freq", "window_size"),
    *("window_attn_skip_freq", "rotary_interleaved", "softmax_type", "qk_l2_norm"),
    *("apply_residual_connection_post_layernorm", "layernorm_zero_centered_gamma", "qk_clip"),
    *("glu_linear_offset", "activation_func_clamp_value", "attention_output_gate"),
    *("is_hybrid_model", "heterogeneous_block_specs", "mrope_section", "fp16"),
)
"""Fields that change the function which the weights mean: the engine would compute another one."""

OF_EXPERTS = ("moe_router_dtype", "moe_permute_fusion")
"""The fields that a mixture of experts may be given; all others that begin so are set here, or make
another function of its weights."""

OF_THE_ENGINE = (
    "moe_permute_fusion",
    *("cpu_offloading", "fine_grained_activation_offloading", "tp_comm_overlap"),
    *("cp_comm_type", "attention_backend"),
    *("enable_cuda_graph", "external_cuda_graph", "use_te_activation_func", "use_te_rng_tracker"),
)
"""Fields that only Transformer Engine's layers know; others ignore them, or fail when they run."""


def choose_spec(spec: Spec) -> Spec:
    """Resolve ``auto``: Transformer Engine where it and a GPU are, PyTorch elsewhere, with a
    warning where the first is there and broken.

    Raises ValueError if ``te`` is asked for and cannot be had.
    """
    gpu = engine.has_gpu()
    if spec is Spec.te and not gpu:
        raise ValueError(
            "parallel.spec = 'te': Transformer Engine needs a GPU, and PyTorch sees none; "
            "set parallel.spec=torch"
        )
    absence = engine.absence() if gpu and spec is not Spec.torch else None
    chosen = (Spec.te if gpu and absence is None else Spec.torch) if spec is Spec.auto else spec
    if absence is not None:
        what, remedy = absence
        line = f"the package transformer-engine {what}; {remedy} or set parallel.spec=torch"
        if spec is Spec.te:
            raise ValueError(f"parallel.spec = 'te': {line}")
        if engine.installed():  # or else nobody expects it
            log.warning("parallel.spec = 'auto': %s", line)
    log.info("layers: %s spec", chosen.name)
    return chosen


def recompute_fields(parallel: ParallelConfig, spec: Spec) -> dict[str, Any]:
    """Megatron's names for ``parallel.recompute`` and what belongs to it. ValueError for a part
    that the layers of ``spec`` cannot compute again."""
    full, selective = (parallel.recompute is kind for kind in (Recompute.full, Recompute.selective))
    for module in parallel.recompute_modules if selective else ():
        rule, remedy = "needs Transformer Engine's layers", "remove it"
        fit = module != "layernorm" or spec is Spec.te
        require(fit, "parallel.recompute_modules", module, rule, remedy)
    return {
        "recompute_granularity": parallel.recompute.name if full or selective else None,
        "recompute_method": parallel.recompute_method.name if full else None,
        "recompute_num_layers": parallel.recompute_layers if full else None,
        "recompute_modules": list(parallel.recompute_modules) if selective else None,
    }


def with_users_fields(
    ours: dict[str, Any], parallel: ParallelConfig, spec: Spec
) -> TransformerConfig:
    """Megatron's configuration from ``ours`` and the fields of ``parallel.megatron``.

    Raises ValueError for a field that does not exist, is not the user's to set, has a value of
    another type, or that Megatron refuses.
    """
    known = typing.get_type_hints(TransformerConfig)
    names = {field.name for field in fields(TransformerConfig) if not field.name.startswith("_")}
    for name, value in parallel.megatron.items():
        key = f"parallel.megatron.{name}"
        remedy = "correct or remove it"
        require(name in names, key, value, "is no field of TransformerConfig", remedy)
        foreign = name not in ours and name not in (*UNSUPPORTED, *ANOTHER_MODEL)
        moe = ours.get("num_moe_experts") is not None and name in OF_EXPERTS
        foreign = foreign and (moe or not name.startswith("moe_"))
        own = [phrase for phrase in meant(name) if phrase.startswith("parallel.")]
        instead = f"set {own[0]}" if own else "remove it"
        require(foreign, key, value, "is set by peergrad or not supported", instead)
        idle = name in OF_THE_ENGINE and spec is not Spec.te and value not in (None, False)
        require(not idle, key, value, "needs Transformer Engine's layers", "remove it")
        idle = name.startswith("fp8_") and parallel.fp8 is Fp8.off
        require(not idle, key, value, "has no effect without parallel.fp8", "remove it")
        require(_fits(value, known[name]), key, value, f"must be {_name(known[name])}", remedy)
    engine.require_attention(parallel.megatron.get("attention_backend", "auto"))
    values = {name: _meant(value, known[name]) for name, value in parallel.megatron.items()}
    try:
        return TransformerConfig(**ours, **values)
    except (ValueError, AssertionError, TypeError, KeyError, AttributeError, ImportError) as error:
        if not parallel.megatron:
            raise  # ours alone
        rule = f"Megatron refuses this combination ({one_line(error)})"
        raise ValueError(
            f"parallel.megatron = {parallel.megatron}: {rule}; correct or remove the field"
        ) from error


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from YAML is of the annotated type; a list does for a tuple."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin in (list, tuple):
        items = arguments[0] if arguments else Any
        return isinstance(value, list) and all(_fits(item, items) for item in value)
    if _is_enum(kind):
        known = isinstance(value, str) and value in kind.__members__
        return known and value != "local"  # of layers without Transformer Engine
    if kind is Any:
        return True
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return type(value) is int
    return isinstance(kind, type) and isinstance(value, kind)


def _meant(value: Any, kind: Any) -> Any:
    """A value that fits, as Megatron has it."""
    return kind[value] if _is_enum(kind) else value


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _name(kind: Any) -> str:
    """An annotation as a person would write it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_name(one) for one in arguments)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if _is_enum(kind):
        return " or ".join(name for name in kind.__members__ if name != "local")
    if origin in (list, tuple):
        return f"a list of {_name(arguments[0]) if arguments else 'values'}"
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return "null" if kind is type(None) else plain.get(kind, "what YAML cannot say: leave it")
