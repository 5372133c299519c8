"""Does the load-balancing loss see layers that collapse onto different experts?

transformers concatenates the tokens of all layers before it multiplies load by probability. Four layers that
each send everything to one expert, each to another, then look like perfect balance.
"""

from typing import Any

import torch
from torch.nn.functional import one_hot
from transformers.models.mixtral import modeling_mixtral

from flanmoe.stages.doctor.check import Check, Measured

_NUM_LAYERS = 4
_NUM_TOKENS = 64


def _score(experts: list[int]) -> float:
    """Return the loss of layers that each send every token to one expert; there are as many experts."""
    layers = [torch.full((_NUM_TOKENS,), expert) for expert in experts]
    logits: Any = tuple(50.0 * one_hot(layer, _NUM_LAYERS).float() for layer in layers)
    return float(modeling_mixtral.load_balancing_loss_func(logits, _NUM_LAYERS, top_k=1))


def _probe() -> Measured:
    same = _score([0] * _NUM_LAYERS)
    return Measured(
        _score(list(range(_NUM_LAYERS))),
        f"All layers on the same expert score {same:.2f}; perfect balance scores 1.00.",
        expected=same,
    )


CHECKS = (
    Check(
        name="pooled_layers",
        library="transformers",
        measures=f"load_balancing_loss_func of {_NUM_LAYERS} layers, each collapsed onto another expert",
        expected=float(_NUM_LAYERS),
        meaning=(
            "The loss of a model whose layers have all collapsed can look like perfect balance: there is no "
            "gradient against it, and the logged value does not show it."
        ),
        way_out=(
            "Train with flanmoe: the balance loss is one of each layer, averaged afterwards. `flanmoe inspect` "
            "shows the load layer by layer."
        ),
        probe=_probe,
    ),
)
