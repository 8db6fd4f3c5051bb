"""A Megatron GPT model from an HF configuration, that ends in hidden states instead of logits."""

from typing import Any

import torch
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
from peergrad.parallel.groups import Groups
from peergrad.parallel.hf.config import Shape
from peergrad.parallel.norm import RMSNorm
from peergrad.parallel.options import choose_spec, with_users_fields


class PolicyModel(GPTModel):
    """GPT whose last pipeline stage returns hidden states ``[T, 1, H]``.

    ``parallel.head`` projects the scored rows alone, a chunk at a time: logits of a whole
    micro-batch need never exist.
    """

    shares_prompts = False
    """Whether its attention knows answers that share a prompt, see ``MicroBatch``."""

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


def run(model: torch.nn.Module, batch: MicroBatch) -> Tensor:
    """Forward one packed micro-batch through ``model``, a PolicyModel or its DDP wrapper.

    Returns hidden states ``[T, 1, H]``, ``[T / tp, 1, H]`` if sequence parallel.
    """
    packed = PackedRow(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
        families=batch.families,
        positions=batch.positions,
    )
    hidden: Tensor = model(
        batch.tokens[None], batch.positions[None], None, packed_seq_params=packed
    )
    return hidden


def transformer_config(
    shape: Shape, parallel: ParallelConfig, dtype: Dtype, spec: Spec
) -> TransformerConfig:
    """Megatron's configuration of this model and layout, with the fields of ``parallel.megatron``
    added; ValueError for one that cannot be."""
    params = torch.float32 if dtype is Dtype.float32 else torch.bfloat16
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
        "gated_linear_unit": True,
        "activation_func": F.silu,
        # Megatron's default is 0.1, which would put the trainer off the engine's policy.
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "sequence_parallel": parallel.sequence,
        "params_dtype": params,
        "pipeline_dtype": params,
        "bf16": dtype is Dtype.bfloat16,
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
        "gradient_accumulation_fusion": False,  # needs apex or TE's main-grad kernels
        "apply_rope_fusion": spec is Spec.te,  # the plain one reads lengths on the host
    }
    return with_users_fields(options, parallel)


def _torch_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers = [layer] * get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _te_spec(config: TransformerConfig) -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)


def build_model(
    shape: Shape, parallel: ParallelConfig, dtype: Dtype, groups: Groups
) -> PolicyModel:
    """This rank's part of the model, on its device, with weights yet to be loaded."""
    spec = choose_spec(parallel.spec)
    config = transformer_config(shape, parallel, dtype, spec)
    model = PolicyModel(
        config,
        _torch_spec(config) if spec is Spec.torch else _te_spec(config),
        vocab_size=shape.padded_vocab,
        max_sequence_length=shape.max_length,
        pre_process=groups.pipeline.rank() == 0,
        post_process=groups.is_last_stage,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        rope_scaling=shape.rope_factor is not None,
        rope_scaling_factor=shape.rope_factor or 1.0,
        parallel_output=True,
    )
    if spec is Spec.torch:
        model.decoder.register_forward_pre_hook(take_angles, with_kwargs=True)
        model.shares_prompts = True
    model.to(device=groups.device, dtype=config.params_dtype)
    return model
