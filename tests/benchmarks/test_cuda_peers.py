"""Peers that need CUDA are given what their interfaces ask for; stand-ins here, as neither runs without."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parents[2] / "benchmarks"


class Noting(nn.Module):
    """Notes how it was made and called."""

    def __init__(self, **made: Any) -> None:
        super().__init__()
        self.made = made
        self.weight = nn.Parameter(torch.ones(1))
        self.called: tuple[Any, ...] = ()

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Return the hidden states, in a pair where a backend is named."""
        self.called = (*arguments, named)
        return (arguments[0], None) if named else arguments[0]


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
    for key, value in attributes.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def test_installed_peers_get_the_choices_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Noting] = []

    def make(**settings: Any) -> Noting:
        made.append(Noting(**settings))
        return made[-1]

    stand_in(monkeypatch, "scattermoe")
    stand_in(monkeypatch, "scattermoe.mlp", GLUMLP=make)
    backend = SimpleNamespace(sonicmoe="its own")
    stand_in(monkeypatch, "sonicmoe", MoE=make, KernelBackendMoE=backend)
    stand_in(monkeypatch, "sonicmoe.enums", ActivationType=SimpleNamespace(SWIGLU="swiglu"))
    monkeypatch.syspath_prepend(str(FOLDER))
    hidden, gates = torch.randn(5, 8), torch.rand(5, 2)
    chosen = torch.randint(4, (5, 2))
    peers = importlib.import_module("cuda_peers").cuda_peers(
        hidden, chosen, gates, num_experts=4, width=16
    )
    assert list(peers) == ["scattermoe", "sonic-moe"]
    outputs: list[Tensor] = [forward() for forward, _ in peers.values()]
    assert all(torch.equal(output, hidden) for output in outputs)
    scatter, sonic = made
    sizes = {"num_experts": 4, "top_k": 2, "input_size": 8, "hidden_size": 16}
    assert {name: scatter.made[name] for name in sizes} == sizes
    assert scatter.called[:3] == (hidden, gates, chosen)
    assert sonic.made["hidden_size"] == 8
    assert sonic.made["intermediate_size"] == 16
    assert sonic.made["num_experts_per_tok"] == 2
    assert sonic.called[1] == {"kernel_backend_moe": "its own"}


def test_without_them_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    found = importlib.import_module("cuda_peers").cuda_peers(
        torch.randn(1, 2), torch.zeros(1, 1).long(), torch.ones(1, 1), num_experts=1, width=2
    )
    assert found == {}
