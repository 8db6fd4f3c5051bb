"""One checkpoint for both layer specs: what one saves under a name of its own, or not at all.

In a mixture of experts the norm before a layer's experts stands alone with Transformer Engine;
Megatron's plain layers save it as one that is part of a linear layer, as it is in dense models. And
each module of Transformer Engine has a state of its own beside its weights, which only FP8 fills.
"""

from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
)
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

ALONE, WITHIN = ".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight"


def as_written(wanted: dict[str, Any], path: str) -> dict[str, Any]:
    """The sharded state ``wanted`` under the names of the checkpoint at ``path``, whichever layers
    wrote it. What these had no state for stays as it is here. What else is missing is left to the
    loader to complain of."""
    held = load_sharded_metadata(path)

    def find(value: Any) -> Any:
        if isinstance(value, ShardedObject):
            local = value.key.endswith("._extra_state") and value.unique_key not in held
            return LocalNonpersistentObject(value.data) if local else value
        if isinstance(value, ShardedTensor) and value.key not in held:
            for ours, theirs in ((ALONE, WITHIN), (WITHIN, ALONE)):
                other = value.key.removesuffix(ours) + theirs
                if value.key.endswith(ours) and other in held:
                    value.key = other
        return value

    found: dict[str, Any] = dict_list_map_inplace(find, wanted)
    return found
