"""What optimizers keep beside the weights that they train, counted from shapes."""

from collections.abc import Iterable, Sequence
from typing import Literal

from torch import nn

Optimizer = Literal["adamw", "adafactor", "sgd"]

# The shortest of a weight's last two axes from which Adafactor keeps means of rows and columns in place of all
# second moments, as T5X has it.
SMALLEST_FACTORED = 128
_FLOAT32 = 4


def is_factored(shape: Sequence[int]) -> bool:
    """Return whether Adafactor keeps means of rows and columns for a weight of this shape."""
    return len(shape) >= 2 and min(shape[-2:]) >= SMALLEST_FACTORED


def optimizer_bytes(parameters: Iterable[nn.Parameter], optimizer: Optimizer) -> int:
    """Return the bytes that an optimizer keeps for what it trains.

    AdamW keeps two float32 moments of every weight, Adafactor one or its factors, plain SGD nothing.
    """
    return sum(_bytes(p, optimizer) for p in parameters if p.requires_grad)


def _bytes(parameter: nn.Parameter, optimizer: Optimizer) -> int:
    if optimizer == "sgd":
        return 0
    if optimizer == "adamw":
        return 2 * _FLOAT32 * parameter.numel()
    shape = parameter.shape
    if not is_factored(shape):
        return _FLOAT32 * parameter.numel()
    return _FLOAT32 * (parameter.numel() // shape[-1] + parameter.numel() // shape[-2])
