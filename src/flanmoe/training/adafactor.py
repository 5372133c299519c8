"""Adafactor as T5X has it (Shazeer and Stern 2018, arXiv 1804.04235): a learning rate relative to the weights.

One step t of one weight W with gradient G, in float32:

    beta = 1 - t^-0.8,  S = G^2 + 1e-30
    V    = beta V + (1 - beta) S            or, factored, its row means R and column means C alone,
                                            from which V = R C / mean(R)
    U    = G / sqrt(V),                     divided by max(1, RMS(U))
    W    = W - rate * max(RMS(W), 1e-3) U

It is factored where the last two axes both have 128 entries or more. All axes before them are batch axes:
every expert of a fused weight has statistics, a scale RMS(W) and a clipping RMS(U) of its own, as it would
as a weight by itself (T5X marks its expert axis so, `FactorDim.BATCH`).

Neither library at hand has this. torch.optim.Adafactor caps the rate at 1 / sqrt(t), adds its epsilon
elsewhere, factors every matrix and takes scale and clipping over all experts together; transformers'
factors every matrix and takes both over all experts. The tests compare with transformers' where the two
coincide.

What differs from T5X. It keeps the gate and the up matrix of an expert apart; ours lie in one fused weight
of twice the rows, which share one scale, one clipping and one set of column means. It factors weights with
an expert axis however small they are. Its weight decay is not multiplied by the rate; ours is, as AdamW's.
"""

from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from flanmoe.models.optimizer_state import is_factored

_DECAY_EXPONENT = 0.8
_EPSILON = 1e-30
_SMALLEST_SCALE = 1e-3
_LARGEST_UPDATE = 1.0


@final
class Adafactor(Optimizer):
    """Adafactor without momentum; see the module for its formulas.

    Args:
        params: parameters or groups of them.
        lr: rate relative to the scale of each weight.
        weight_decay: decoupled; multiplied by the rate.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, *, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Change every parameter that has a gradient.

        Args:
            closure: computes the loss and the gradients anew.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._change(parameter, rate=group["lr"], decay=group["weight_decay"])
        return loss

    def _change(self, parameter: Tensor, *, rate: float, decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state |= _new_state(parameter)
        gradient = parameter.grad.to(_precision(parameter))  # pyright: ignore[reportOptionalMemberAccess]
        state["step"] += 1
        mixing = float(state["step"]) ** -_DECAY_EXPONENT
        update = gradient * _inverse_root(state, gradient.square() + _EPSILON, mixing)
        update /= (_rms(update) / _LARGEST_UPDATE).clamp(min=1.0)
        scale = _rms(parameter.to(update.dtype)).clamp(min=_SMALLEST_SCALE)
        if decay:
            parameter.mul_(1 - rate * decay)
        parameter.sub_(rate * scale * update)


def _precision(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _new_state(parameter: Tensor) -> dict[str, Any]:
    shape, dtype = parameter.shape, _precision(parameter)
    state: dict[str, Any] = {"step": torch.tensor(0.0)}
    if is_factored(shape):
        state["row"] = parameter.new_zeros((*shape[:-1], 1), dtype=dtype)
        state["column"] = parameter.new_zeros((*shape[:-2], 1, shape[-1]), dtype=dtype)
    else:
        state["full"] = parameter.new_zeros(shape, dtype=dtype)
    return state


def _inverse_root(state: dict[str, Any], squares: Tensor, mixing: float) -> Tensor:
    """Move the second moments towards the squares and return 1 / sqrt(V)."""
    if "full" in state:
        return state["full"].lerp_(squares, mixing).rsqrt()
    row = state["row"].lerp_(squares.mean(dim=-1, keepdim=True), mixing)
    column = state["column"].lerp_(squares.mean(dim=-2, keepdim=True), mixing)
    return (row / row.mean(dim=-2, keepdim=True)).rsqrt() * column.rsqrt()


def _rms(values: Tensor) -> Tensor:
    """Return the root mean square of each matrix along the last two axes, or of all values."""
    axes = (-2, -1) if values.ndim > 2 else tuple(range(values.ndim))
    return values.square().mean(dim=axes, keepdim=True).sqrt()
