"""The gradient that a policy has taken, beside another one."""

from typing import Any

import torch


def exported_gradient(policy: Any) -> dict[str, torch.Tensor]:
    """The reduced gradients under their HF names: they travel as the weights do."""
    kept = [parameter.detach().clone() for parameter in policy.model.parameters()]
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.copy_(parameter.main_grad)
        found = {name: tensor.clone() for name, tensor in policy.weights()}
        for parameter, value in zip(policy.model.parameters(), kept, strict=True):
            parameter.copy_(value)
    return found


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """``|found - expected| / |expected|`` over all parameters."""
    assert found.keys() >= expected.keys()
    error = sum(((found[k].double() - v) ** 2).sum() for k, v in expected.items())
    return float((error / sum((v.double() ** 2).sum() for v in expected.values())) ** 0.5)
