"""What happens between the two products of an expert: activations with their derivative written out.

Autograd would save every intermediate of `activation(gate) * up`. The functions here need the first
product alone: they compute the rest again, over few rows at a time, in places that are used again.
Any other function of a row goes backward by running autograd over it once more (`AnyCombine`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from flanmoe.moe.compute.buffers import Buffers

_aten: Any = torch.ops.aten


class Pointwise(NamedTuple):
    """An activation of one number, and its derivative.

    Attributes:
        function: as torch has it.
        into: writes it into a place: (input, out).
        backward_into: writes the gradient of the input into a place: (gradient, input, out).
    """

    function: Callable[[Tensor], Tensor]
    into: Callable[[Tensor, Tensor], object]
    backward_into: Callable[[Tensor, Tensor, Tensor], object]


def _relu_into(values: Tensor, out: Tensor) -> Tensor:
    return torch.clamp_min(values, 0, out=out)


def _relu_backward_into(gradient: Tensor, values: Tensor, out: Tensor) -> Tensor:
    return _aten.threshold_backward.grad_input(gradient, values, 0, grad_input=out)


def _silu_into(values: Tensor, out: Tensor) -> Tensor:
    return _aten.silu.out(values, out=out)


def _silu_backward_into(gradient: Tensor, values: Tensor, out: Tensor) -> Tensor:
    return _aten.silu_backward.grad_input(gradient, values, grad_input=out)


def _gelu_into(values: Tensor, out: Tensor, *, approximate: str) -> Tensor:
    return _aten.gelu.out(values, approximate=approximate, out=out)


def _gelu_backward_into(
    gradient: Tensor, values: Tensor, out: Tensor, *, approximate: str
) -> Tensor:
    return _aten.gelu_backward.grad_input(gradient, values, approximate=approximate, grad_input=out)


def _gelu(approximate: str) -> Pointwise:
    return Pointwise(
        F.gelu if approximate == "none" else partial(F.gelu, approximate=approximate),
        partial(_gelu_into, approximate=approximate),
        partial(_gelu_backward_into, approximate=approximate),
    )


# By the names that configurations give them.
POINTWISE: Mapping[str, Pointwise] = {
    "relu": Pointwise(F.relu, _relu_into, _relu_backward_into),
    "silu": Pointwise(F.silu, _silu_into, _silu_backward_into),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
}


class Recomputed(NamedTuple):
    """The second product's input, made again for the backward pass.

    Attributes:
        inner: what the second product took, until `backward` is called.
        backward: turns the gradient of `inner`, which it may overwrite, into that of the first
            product and those of `captured`.
    """

    inner: Float[Tensor, "N I"]
    backward: Callable[[Tensor], tuple[Tensor, Sequence[Tensor]]]


@runtime_checkable
class Combine(Protocol):
    """A function of the first product's rows, forward and backward."""

    @property
    def captured(self) -> Sequence[Tensor]:
        """Parameters that it uses beside its argument."""
        ...

    def __call__(self, product: Float[Tensor, "*N F"]) -> Float[Tensor, "*N I"]:
        """Return the second product's input, differentiable."""
        ...

    def forward(
        self,
        product: Float[Tensor, "N F"],
        buffers: Buffers,
        *,
        activated: Float[Tensor, "N I"] | None = None,
    ) -> Float[Tensor, "N I"]:
        """Return the same without autograd, for use until the next call.

        Args:
            product: rows of the first product.
            buffers: for what is needed for a moment.
            activated: where to leave the activation for `recompute`; nowhere without it.
        """
        ...

    def recompute(
        self,
        product: Float[Tensor, "N F"],
        buffers: Buffers,
        *,
        activated: Float[Tensor, "N I"] | None = None,
    ) -> Recomputed:
        """Return the same again, and the way back.

        Args:
            product: rows of the first product.
            buffers: for what is needed until the next call.
            activated: what `forward` left, None to compute it again.
        """
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """An activation by itself, as in T5 and the first Switch models.

    Attributes:
        name: in `POINTWISE`.
    """

    name: str

    @property
    def captured(self) -> Sequence[Tensor]:
        """None."""
        return ()

    def __call__(self, product: Float[Tensor, "*N F"]) -> Float[Tensor, "*N I"]:
        """Return the activation."""
        return POINTWISE[self.name].function(product)

    def forward(
        self,
        product: Float[Tensor, "N F"],
        buffers: Buffers,
        *,
        activated: Float[Tensor, "N I"] | None = None,
    ) -> Float[Tensor, "N I"]:
        """Return the activation, in a buffer unless it is to be kept."""
        inner = buffers.take("inner", *product.shape) if activated is None else activated
        POINTWISE[self.name].into(product, inner)
        return inner

    def recompute(
        self,
        product: Float[Tensor, "N F"],
        buffers: Buffers,
        *,
        activated: Float[Tensor, "N I"] | None = None,
    ) -> Recomputed:
        """Return the activation and the way back."""
        # Nobody wants the activation any more when the gradient takes its place.
        back = buffers.take("product gradient", *product.shape)
        inner = activated
        if inner is None:
            POINTWISE[self.name].into(product, back)
            inner = back

        def backward(gradient: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
            POINTWISE[self.name].backward_into(gradient, product, back)
            return back, ()

        return Recomputed(inner, backward)


@dataclass(frozen=True, slots=True)
class Gated:
    """`activation(gate) * up` for products whose first half is the gate (SwiGLU and its kin).

    Attributes:
        name: of the activation, in `POINTWISE`.
    """

    name: str

    @property
    def captured(self) -> Sequence[Tensor]:
        """None."""
        return ()

    def __call__(self, product: Float[Tensor, "*N F"]) -> Float[Tensor, "*N I"]:
        """Return the gated activation."""
        gate, up = product.chunk(2, dim=-1)
        return POINTWISE[self.name].function(gate) * up

    def forward(
        self,
        product: Float[Tensor, "N F"],
        buffers: Buffers,
        *,
        activated: Float[Tensor, "N I"] | None = None,
    ) -> Float[Tensor, "N I"]:
        """Return the gated activation in a buffer, and leave the activation in `activated`."""
        gate, up = product.chunk(2, dim=-1)
        inner = buffers.take("inner", product.shape[0], gate.shape[1])
        place = inner if activated is None else activated
        POINTWISE[self.name].into(gate, place)
        return torch.mul(place, up, out=inner)

    def recompute(
        self,
        product: Float[Tensor, "N F"],
        buffers: Buffers,
        *,
        activated: Float[Tensor, "N I"] | None = None,
    ) -> Recomputed:
        """Return the gated activation and the way back."""
        pointwise = POINTWISE[self.name]
        gate, up = product.chunk(2, dim=-1)
        # Each half of the gradient holds, until it is its turn, what is needed until then.
        back = buffers.take("product gradient", product.shape[0], product.shape[1])
        gate_back, up_back = back.chunk(2, dim=-1)
        if activated is None:
            pointwise.into(gate, up_back)
        activation = up_back if activated is None else activated
        inner = torch.mul(activation, up, out=gate_back)

        def backward(gradient: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
            torch.mul(gradient, activation, out=up_back)
            pointwise.backward_into(gradient.mul_(up), gate, gate_back)
            return back, ()

        return Recomputed(inner, backward)


@dataclass(frozen=True, slots=True)
class AnyCombine:
    """Any other function of a row, differentiated by autograd.

    It must give the same whenever it is called: the backward pass calls it again.

    Attributes:
        function: the function.
        captured: parameters that it uses beside its argument.
        autocast: enters the state of autocast that the forward pass was called in.
    """

    function: Callable[[Tensor], Tensor]
    captured: Sequence[Tensor]
    autocast: Callable[[], AbstractContextManager[object]]

    def __call__(self, product: Float[Tensor, "*N F"]) -> Float[Tensor, "*N I"]:
        """Return what the function does."""
        with self.autocast():
            return self.function(product)

    def forward(
        self,
        product: Float[Tensor, "N F"],
        buffers: Buffers,
        *,
        activated: Float[Tensor, "N I"] | None = None,
    ) -> Float[Tensor, "N I"]:
        """Return what the function does; nothing of it can be kept."""
        assert activated is None
        return self(product)

    def recompute(
        self,
        product: Float[Tensor, "N F"],
        buffers: Buffers,
        *,
        activated: Float[Tensor, "N I"] | None = None,
    ) -> Recomputed:
        """Return what the function does and the way back through autograd."""
        assert activated is None
        start = product.detach().requires_grad_()
        with torch.enable_grad():
            inner = self(start)

        def backward(gradient: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
            found = torch.autograd.grad(
                inner,
                [start, *self.captured],
                gradient.to(inner.dtype),
                allow_unused=True,
                materialize_grads=True,
            )
            return found[0], found[1:]

        return Recomputed(inner.detach(), backward)


def captured_parameters(
    function: Callable[[Tensor], Tensor], example: Float[Tensor, "N F"]
) -> list[Tensor]:
    """Return the trained parameters that a function of rows uses beside its argument.

    They are found as autograd sees them, by calling the function on an example.
    """
    start = example.detach().requires_grad_()
    with torch.enable_grad():
        pending: list[Any] = [function(start).grad_fn]
    found: dict[int, Tensor] = {}
    seen: set[Any] = {None}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and variable is not start:
            found[id(variable)] = variable
        pending.extend(following for following, _ in node.next_functions)
    return list(found.values())
