"""How model and work are divided over the processes, and what experts are beside."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from peergrad.config.fp8 import Fp8, Fp8Config
from peergrad.config.rules import at_least, require, seconds

Spec = Enum("Spec", ["auto", "te", "torch"])
Recompute = Enum("Recompute", ["off", "selective", "full"])
RecomputeMethod = Enum("RecomputeMethod", ["uniform", "block"])
Replay = Enum("Replay", ["auto", "on", "off"])

MODULES = ("core_attn", "mlp", "layernorm", "moe")
"""Parts of a layer that can be computed again by themselves."""


@dataclass(kw_only=True)
class ParallelConfig(Fp8Config):
    tensor: int = 1
    """Tensor-parallel size: ranks that share every layer's matrices."""
    pipeline: int = 1
    """Pipeline-parallel size: ranks that share the layers (1F1B schedule)."""
    virtual_pipeline: int = 1
    """Pieces of each pipeline rank, taken in turn (interleaved schedule): the pipeline is filled
    and emptied in so many times less time, for as many times more communication."""
    first_stage_layers: int | None = None
    """Layers of the first pipeline rank, which also has the embedding; the others share the rest.
    null: as many as the others."""
    last_stage_layers: int | None = None
    """Layers of the last one, which also has the projection to the vocabulary and the loss."""
    context: int = 1
    """Context-parallel size: ranks that share every sequence's tokens, for long ones. Each prompt
    is then computed for every answer."""
    expert: int = 1
    """Expert-parallel size of a mixture of experts: ranks, of data, context and tensor alike, that
    share the experts of a layer and send tokens to each other."""
    expert_tensor: int | None = None
    """Ranks that share every expert's matrices; null: as many as share the others
    (``parallel.tensor``)."""
    data: int | None = None
    """Data-parallel size; default: whatever is left of the processes."""
    sequence: bool = False
    """Sequence parallel: activations outside the matrices are split over the tensor ranks."""
    spec: Spec = Spec.auto
    """Layers: ``te`` (Transformer Engine, GPU), ``torch`` (plain PyTorch), ``auto`` picks and
    logs."""
    micro_batch_tokens: int = 4096
    """Token budget of one packed micro-batch, on each of the context ranks; a longer sequence gets
    one of its own."""
    distributed_optimizer: bool = True
    """Shard the optimizer's state over the data-parallel and context ranks."""
    overlap_grad_reduce: bool = False
    """Send gradients to the other data-parallel and context ranks, a bucket of parameters at a
    time, while the backward pass goes on."""
    overlap_param_gather: bool = False
    """With ``overlap_grad_reduce``: parameters that other ranks' optimizers have updated are waited
    for where the next forward pass needs them, not at the end of the step."""
    ddp_bucket_size: int | None = None
    """Parameters of a bucket. null: 40 million, or a million for each data-parallel and context
    rank if that is more. Behind the first pipeline rank, all of a piece's, whatever this says."""
    deterministic_mode: bool = False
    """Of an operation that adds up in whatever order, take the form that does not, or fail: for
    equal weights from equal rollouts, bit for bit. GPUs need ``NCCL_ALGO``, as ``Ring``."""
    recompute: Recompute = Recompute.off
    """Activations that are computed again in the backward pass rather than kept: none, those of
    ``recompute_modules``, or ``full``, all but the input of every ``recompute_layers`` layers."""
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """Of each layer, with ``selective``: ``core_attn``, ``mlp``, ``layernorm`` (te), and ``moe``, a
    layer of experts with its router."""
    recompute_method: RecomputeMethod = RecomputeMethod.uniform
    """With ``full``: ``uniform`` keeps the input of every ``recompute_layers`` layers, ``block``
    that of each of the first ``recompute_layers`` of a rank's piece, and all of the rest."""
    recompute_layers: int = 1
    """See ``recompute`` and ``recompute_method``."""
    timeout_minutes: float = 30.0
    """Collectives that take longer are an error; so are ranks that come later. Rollouts may take
    longer: nobody waits for them in a collective."""
    megatron: dict[str, Any] = field(default_factory=dict)
    """Any further field of Megatron's TransformerConfig."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
        for name in (*sizes, "micro_batch_tokens", "recompute_layers"):
            at_least(f"parallel.{name}", getattr(self, name), 1)
        for name in ("data", "expert_tensor", "first_stage_layers", "last_stage_layers"):
            if (value := getattr(self, name)) is not None:
                at_least(f"parallel.{name}", value, 1)
        for name in ("virtual_pipeline", "first_stage_layers", "last_stage_layers"):
            value = getattr(self, name)
            unset = value is None or (name == "virtual_pipeline" and value == 1)
            rule, remedy = "needs parallel.pipeline > 1", "unset it"
            require(unset or self.pipeline > 1, f"parallel.{name}", value, rule, remedy)
        self._check_recompute()
        self._check_overlap()
        fit = self.fp8 is Fp8.off or self.spec is not Spec.torch
        rule, remedy = "needs Transformer Engine's layers", "set parallel.spec=te, or fp8=off"
        require(fit, "parallel.fp8", self.fp8.name, rule, remedy)
        fit = self.distributed_optimizer or not self.fp8_params
        rule, remedy = "needs parallel.distributed_optimizer", "set that, or unset this"
        require(fit, "parallel.fp8_params", self.fp8_params, rule, remedy)
        seconds("parallel.timeout_minutes", self.timeout_minutes, 30, unit=60)
        require(
            not self.sequence or self.tensor > 1,
            "parallel.sequence",
            self.sequence,
            "needs parallel.tensor > 1",
            "unset it",
        )

    def _check_overlap(self) -> None:
        reduce, gather = self.overlap_grad_reduce, self.overlap_param_gather
        key, remedy = "parallel.overlap_param_gather", "set that, or unset this"
        for name in ("overlap_grad_reduce", "distributed_optimizer"):
            fit = getattr(self, name) or not gather
            require(fit, key, gather, f"needs parallel.{name}", remedy)
        if (size := self.ddp_bucket_size) is not None:
            key = "parallel.ddp_bucket_size"
            at_least(key, size, 1)
            require(reduce, key, size, "has no effect without parallel.overlap_grad_reduce", remedy)

    def _check_recompute(self) -> None:
        """What is set must have an effect."""
        full, selective = (self.recompute is one for one in (Recompute.full, Recompute.selective))
        layers, method = self.recompute_layers, self.recompute_method
        rule, remedy = "has no effect without parallel.recompute=full", "set that, or unset this"
        require(full or layers == 1, "parallel.recompute_layers", layers, rule, remedy)
        plain = method is RecomputeMethod.uniform
        require(full or plain, "parallel.recompute_method", method.name, rule, remedy)
        key, modules = "parallel.recompute_modules", self.recompute_modules
        rule = "has no effect without parallel.recompute=selective"
        require(selective or modules == ["core_attn"], key, modules, rule, remedy)
        known = all(module in MODULES for module in modules)
        require(known, key, modules, f"must be of {', '.join(MODULES)}", "correct it")
        rule, remedy = "names nothing to compute again", "name one, or set parallel.recompute=off"
        require(bool(modules) or not selective, key, modules, rule, remedy)


@dataclass(kw_only=True)
class MoeConfig:
    """Of a mixture of experts; anything else refuses what is set here."""

    aux_loss_coef: float = 0.0
    """Of the load-balancing loss, in each layer: mean over samples of E times the sum over experts
    of their part of the sample's choices times their mean probability. 1 where all are alike."""
    z_loss_coef: float = 0.0
    """Of the mean over tokens of the squared logsumexp of the router's logits, in each layer."""
    replay: Replay = Replay.auto
    """Rollout routing replay (R3): tokens are scored and trained on with the experts that the
    engine chose, weighed by the trainer's router. ``auto``: where a server says them; ``on``: an
    answer without is an error; ``off``: the trainer chooses."""

    @property
    def replays(self) -> bool:
        """Whether the engine's choices are taken again where they are known."""
        return self.replay is not Replay.off

    def __post_init__(self) -> None:
        for name in ("aux_loss_coef", "z_loss_coef"):
            at_least(f"moe.{name}", getattr(self, name), 0.0)
