"""Bytes of optimizers against what they keep after a step."""

import pytest
import torch
from torch import nn

from flanmoe.models.optimizer_state import Optimizer, optimizer_bytes
from flanmoe.training.adafactor import Adafactor


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_bytes_are_those_of_the_state(name: Optimizer) -> None:
    shapes = ((130, 200), (3, 128, 129), (127, 300), (40,), (2, 3, 4))
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    frozen = nn.Parameter(torch.randn(500, 500), requires_grad=False)
    made = {
        "adamw": lambda: torch.optim.AdamW(parameters, lr=1e-3),
        "adafactor": lambda: Adafactor(parameters, lr=1e-3),
        "sgd": lambda: torch.optim.SGD(parameters, lr=1e-3),
    }[name]()
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    made.step()
    kept = [
        value
        for state in made.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim
    ]
    expected = sum(value.numel() * value.element_size() for value in kept)
    assert optimizer_bytes([*parameters, frozen], name) == expected
