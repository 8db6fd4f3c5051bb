"""A Megatron GPT model from an HF configuration, that ends in hidden states instead of logits."""

import math
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor

from peergrad.algo.packing import MicroBatch
from peergrad.config import Dtype, ParallelConfig, Spec
from peergrad.parallel.attention import PackedAttention, PackedRow, take_angles
from peergrad.parallel.experts import tell_router, use_experts
from peergrad.parallel.fp8 import fp8_fields
from peergrad.parallel.hf.config import Shape
from peergrad.parallel.mesh import Mesh
from peergrad.parallel.norm import RMSNorm
from peergrad.parallel.options import choose_spec, recompute_fields, with_users_fields
from peergrad.parallel.output_bias import add_output_bias
from peergrad.parallel.rope import frequencies
from peergrad.parallel.routing import Routed


class PolicyModel(GPTModel):
    """GPT whose last pipeline stage returns hidden states ``[T, 1, H]``.

    ``parallel.head`` projects the scored rows alone, a chunk at a time: logits of a whole
    micro-batch need never exist.
    """

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # The one private method overridden: its stock form projects every row to the vocabulary.
        return hidden_states

    def head_input(self, hidden: Tensor, *, summed: bool) -> Tensor:
        """Hidden states of the last stage as ``[T, H]``, whole on every tensor rank. ``summed``:
        the gradient that will come is the sum over these ranks already; else it is taken here."""
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=not summed, group=group
            )
        elif not summed:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=group)
        return hidden.flatten(0, 1)

    def head_weight(self) -> Tensor:
        """``[Vp / tp, H]``: this tensor rank's rows of the output projection."""
        weight: Tensor = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return weight


class Stage(torch.nn.ModuleList):
    """A rank's part of the model: one piece, or several in a virtual pipeline, that have one
    configuration."""

    shares_prompts = False
    """Whether its attention knows answers that share a prompt, see ``MicroBatch``."""

    @property
    def pieces(self) -> list[PolicyModel]:
        return cast(list[PolicyModel], list(self))

    @property
    def config(self) -> TransformerConfig:
        return self.pieces[0].config


def run(
    model: torch.nn.Module,
    batch: MicroBatch,
    context: dist.ProcessGroup,
    routed: Routed | None = None,
) -> Tensor:
    """Forward this rank's part of a packed micro-batch through ``model``, a PolicyModel or its DDP
    wrapper. ``context``: the ranks that hold the other parts; ``routed``: what the routers of a
    mixture of experts are told. Collective.

    Returns hidden states ``[T, 1, H]`` of it, ``[T / tp, 1, H]`` if sequence parallel.
    """
    tokens, positions = batch.tokens, batch.positions
    divided: dict[str, Any] = {}
    if batch.held is not None:
        tokens, positions = tokens[batch.held.tokens], positions[batch.held.tokens]
        divided = {
            "cu_seqlens_q_padded": batch.cu_seqlens,
            "cu_seqlens_kv_padded": batch.cu_seqlens,
            "cp_group": context,
        }
    packed = PackedRow(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
        families=batch.families,
        positions=positions,
        routed=routed,
        **divided,
    )
    hidden: Tensor = model(tokens[None], positions[None], None, packed_seq_params=packed)
    return hidden


def transformer_config(
    shape: Shape, parallel: ParallelConfig, dtype: Dtype, spec: Spec
) -> TransformerConfig:
    """Megatron's configuration of this model and layout, with the fields of ``parallel.megatron``
    added; ValueError for one that cannot be."""
    params = torch.float32 if dtype is Dtype.float32 else torch.bfloat16
    pieces = parallel.virtual_pipeline
    options: dict[str, Any] = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.kv_heads,
        "kv_channels": shape.head_dim,
        "ffn_hidden_size": shape.ffn,
        "layernorm_epsilon": shape.norm_eps,
        "qk_layernorm": shape.qk_norm,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "add_qkv_bias": shape.qkv_bias,
        # YaRN lengthens turned queries and keys alike, all of their pairs: so are their products.
        "softmax_scale": shape.rope.attention**2 / math.sqrt(shape.head_dim),
        "gated_linear_unit": True,
        "activation_func": F.silu,
        # Megatron's default is 0.1, which would put the trainer off the engine's policy.
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": pieces if pieces > 1 else None,
        "num_layers_in_first_pipeline_stage": parallel.first_stage_layers,
        "num_layers_in_last_pipeline_stage": parallel.last_stage_layers,
        "microbatch_group_size_per_vp_stage": parallel.pipeline,  # Scorer divides so
        # Anything else mixes up what two ranks send to each other at the same time.
        "overlap_p2p_comm": pieces > 1,
        "batch_p2p_comm": pieces == 1,
        "context_parallel_size": parallel.context,
        "sequence_parallel": parallel.sequence,
        "params_dtype": params,
        "pipeline_dtype": params,
        "bf16": dtype is Dtype.bfloat16,
        "deterministic_mode": parallel.deterministic_mode,
        "use_cpu_initialization": not torch.cuda.is_available(),
        # The loss function returns sums over globally weighted tokens: see Policy.update.
        "calculate_per_token_loss": True,
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",  # demanded by variable lengths
        "batch_p2p_sync": False,
        "persist_layer_norm": spec is Spec.te,
        "bias_activation_fusion": spec is Spec.te,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,  # of the trained model, in parallel/fused.py
        "apply_rope_fusion": spec is Spec.te,  # the plain one reads lengths on the host
        **_expert_fields(shape, parallel, spec),
        **recompute_fields(parallel, spec),
        **fp8_fields(parallel, spec),
    }
    return with_users_fields(options, parallel, spec)


def _expert_fields(shape: Shape, parallel: ParallelConfig, spec: Spec) -> dict[str, Any]:
    """Megatron's names for the experts of a layer; none of a model without."""
    if (experts := shape.experts) is None:
        return {}
    return {
        "num_moe_experts": experts.number,
        "moe_router_topk": experts.chosen,
        "moe_ffn_hidden_size": shape.ffn,
        # The softmax of the largest logits alone is that of all, made to sum to 1.
        "moe_router_pre_softmax": not experts.normed,
        "moe_router_load_balancing_type": "none",  # see parallel/experts.py
        "moe_grouped_gemm": spec is Spec.te,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
    }


def _torch_spec(
    config: TransformerConfig, shape: Shape, piece: int | None
) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(
        config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if shape.o_bias:
        add_output_bias(layer)
    if shape.experts is not None:
        use_experts(layer)
    layers = [layer] * get_num_layers_to_build(config, piece)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _te_spec(config: TransformerConfig, shape: Shape) -> ModuleSpec:
    layer = get_gpt_layer_with_transformer_engine_spec(
        config.num_moe_experts, config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
    )
    if shape.o_bias:
        add_output_bias(layer)
    if shape.experts is not None:
        use_experts(layer)
    return layer


def build_model(shape: Shape, parallel: ParallelConfig, dtype: Dtype, mesh: Mesh) -> Stage:
    """This rank's part of the model, on its device, with weights yet to be loaded."""
    spec = choose_spec(parallel.spec)
    config = transformer_config(shape, parallel, dtype, spec)
    pieces = parallel.virtual_pipeline
    stage = Stage(
        _build_piece(shape, config, spec, mesh, piece=i if pieces > 1 else None)
        for i in range(pieces)
    )
    stage.shares_prompts = spec is Spec.torch and parallel.context == 1
    return stage.to(device=mesh.device, dtype=config.params_dtype)


def _build_piece(
    shape: Shape, config: TransformerConfig, spec: Spec, mesh: Mesh, *, piece: int | None
) -> PolicyModel:
    """``piece``: its number on this rank; None: there is one."""
    last = (config.virtual_pipeline_model_parallel_size or 1) - 1
    model = PolicyModel(
        config,
        _torch_spec(config, shape, piece) if spec is Spec.torch else _te_spec(config, shape),
        vocab_size=shape.padded_vocab,
        max_sequence_length=shape.max_length,
        pre_process=mesh.pipeline.rank() == 0 and not piece,
        post_process=mesh.is_last_stage and (piece is None or piece == last),
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        parallel_output=True,
        vp_stage=piece,
    )
    model.rotary_pos_emb.inv_freq = frequencies(shape.rope, shape.head_dim)
    if spec is Spec.torch:
        model.decoder.register_forward_pre_hook(take_angles, with_kwargs=True)
    if shape.experts is not None:
        for layer in model.decoder.layers:
            layer.register_forward_pre_hook(tell_router, with_kwargs=True)
            for name, parameter in layer.mlp.experts.named_parameters():
                # Also of one part: Megatron would add up over the wrong ranks where fewer share an
                # expert's matrices than the others, and keep its optimizer's state elsewhere.
                parameter.allreduce = False
                # Transformer Engine, which is not told of these ranks, calls all divided by rows.
                parameter.partition_dim = int("linear_fc2" in name)
    return model
