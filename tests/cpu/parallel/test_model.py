"""What ``parallel.megatron`` may and may not say."""

import pytest

from peergrad.config import Dtype, ParallelConfig, Spec
from peergrad.parallel.model import transformer_config
from tests.cpu.parallel.test_mapping import SHAPE


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("no_such_field", "is no field of TransformerConfig"),
        ("attention_dropout", "is set by peergrad or not supported"),
        ("context_parallel_size", "is set by peergrad or not supported"),
    ],
)
def test_fields_that_are_not_the_users_are_refused(key: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"parallel\.megatron\.{key} = 2: {rule}"):
        transformer_config(SHAPE, ParallelConfig(megatron={key: 2}), Dtype.float32, Spec.torch)


def test_other_fields_pass_through() -> None:
    parallel = ParallelConfig(megatron={"recompute_granularity": "selective"})
    built = transformer_config(SHAPE, parallel, Dtype.bfloat16, Spec.torch)
    assert built.recompute_granularity == "selective"
    assert built.bf16 and built.attention_dropout == 0 == built.hidden_dropout
