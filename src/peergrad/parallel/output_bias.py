"""A bias of the attention's output: Megatron gives one to all linear layers or to none."""

from typing import Any

from megatron.core.transformer import ModuleSpec


def add_output_bias(layer: ModuleSpec) -> None:
    """Have the layers of this spec, which is changed, add one behind their output projection."""
    attention = layer.submodules.self_attention.submodules
    attention.linear_proj = _biased(attention.linear_proj)


def _biased(linear: Any) -> Any:
    """Megatron's class for it, which holds the bias whole on every tensor rank, hands it on to be
    added to what the ranks have summed, and marks it for sequence parallelism."""

    class Biased(linear):
        def __init__(self, *sizes: int, bias: bool, **options: Any) -> None:
            super().__init__(*sizes, bias=True, **options)

    return Biased
