"""Matrix products in 8 bits: the keys ``parallel.fp8`` and ``parallel.fp8_*``."""

from dataclasses import dataclass, fields
from enum import Enum

from peergrad.config.rules import at_least, require

FP8_MULTIPLE = 16
"""Of what numbers of rows and columns cuBLAS takes a matrix in 8 bits."""
FP8_BLOCK = 128
"""Rows, and columns, that share a scale, where blocks have one."""
Fp8 = Enum("Fp8", ["off", "blockwise", "delayed", "tensorwise"])
Fp8Format = Enum("Fp8Format", ["e4m3", "hybrid"])


@dataclass(kw_only=True)
class Fp8Config:
    fp8: Fp8 = Fp8.off
    """Matrix products of the layers in 8 bits, by Transformer Engine, with a scale for:
    ``blockwise``, 1 x 128 numbers of an activation and 128 x 128 of a weight; ``delayed``, a whole
    tensor, from what was largest in earlier passes; ``tensorwise``, a whole tensor, so that a
    sample's logprobs depend on what it is packed with. Embedding, norms, attention and head stay in
    bfloat16."""
    fp8_format: Fp8Format = Fp8Format.e4m3
    """4 bits of exponent and 3 of mantissa, or with ``hybrid`` 5 and 2 for gradients."""
    fp8_first_layers_bf16: int = 0
    """Of the first layers, so many are left in bfloat16."""
    fp8_last_layers_bf16: int = 0
    """And so many of the last."""
    fp8_params: bool = False
    """Matrices of policy and reference are kept in 8 bits, and gathered so from the data-parallel
    ranks; the optimizer has them in float32 all the same."""
    fp8_score: bool = True
    """Logprobs of the old policy are taken in 8 bits, as those of its updates are."""
    fp8_reference: bool = True
    """And those of the reference model."""
    fp8_gap_every: int = 10
    """Steps between measurements of what 8 bits change: some samples are scored once more, in
    bfloat16 with the same weights (``logprob_gap/fp8*``). 0: never."""
    fp8_depends_on_packing: bool = False
    """Allow ``tensorwise``: a token's logprob changed by up to 0.55 nats, in a small model, with
    the samples that it was packed with, and these differ between old, new and reference."""

    def __post_init__(self) -> None:
        for name in ("fp8_first_layers_bf16", "fp8_last_layers_bf16", "fp8_gap_every"):
            at_least(f"parallel.{name}", getattr(self, name), 0)
        if self.fp8 is Fp8.off:
            self._require_unset()
        tensorwise, allowed = self.fp8 is Fp8.tensorwise, self.fp8_depends_on_packing
        rule = "a sample's logprobs depend on what it is packed with, by up to 0.55 nats"
        remedy = "use blockwise, or say parallel.fp8_depends_on_packing=true"
        require(allowed or not tensorwise, "parallel.fp8", "tensorwise", rule, remedy)
        key, rule = "parallel.fp8_depends_on_packing", "is of parallel.fp8=tensorwise alone"
        require(tensorwise or not allowed, key, allowed, rule, "unset it")
        if self.fp8 is Fp8.delayed:
            rule, remedy = "is not known to be right with delayed scales", "use blockwise"
            require(not self.fp8_params, "parallel.fp8_params", self.fp8_params, rule, remedy)
            for name in ("fp8_first_layers_bf16", "fp8_last_layers_bf16"):
                value, rule = getattr(self, name), "Transformer Engine cannot with delayed scales"
                require(value == 0, f"parallel.{name}", value, rule, "use parallel.fp8=blockwise")

    def _require_unset(self) -> None:
        """What is set must have an effect."""
        for one in fields(Fp8Config):
            value = getattr(self, one.name)
            said = value.name if isinstance(value, Enum) else value
            rule = "has no effect without parallel.fp8"
            require(
                value == one.default, f"parallel.{one.name}", said, rule, "set that, or unset this"
            )
