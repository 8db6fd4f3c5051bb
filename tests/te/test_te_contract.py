"""The stand-in offers what the compiled module has, and takes what that takes."""

import inspect

import pytest

from tests.te import extension


@pytest.mark.parametrize("name", extension.FUNCTIONS)
def test_a_function_takes_what_the_compiled_one_does(name: str) -> None:
    """By the same names where it has any, by place alone where it has none; and every one of them:
    nothing is swallowed."""
    ours = extension.parameters(inspect.signature(extension.FUNCTIONS[name]))
    assert ours == extension.parameters(extension.real(name))


def test_what_is_not_emulated_says_so() -> None:
    module = extension.make()
    assert set(extension.SIGNATURES) <= set(vars(module))
    with pytest.raises(
        NotImplementedError, match=r"transformer_engine_torch.fused_attn_fwd is not"
    ):
        module.fused_attn_fwd(1, 2)
