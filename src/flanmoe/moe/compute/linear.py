"""What one of the two products of an expert FFN is made of: `ExpertLinear`, and matrices alone.

`GroupedFFN` knows neither how a product is made nor what of it is trained. It asks an `ExpertLinear`
for the product of some experts' rows, then for the gradient of these rows, then for gradients of the
tensors that the product is made of. Low-rank experts are another `ExpertLinear`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from flanmoe.moe.compute.grouping import Segments
from flanmoe.moe.compute.products import new_gradient, segment_mm, segment_outer


@runtime_checkable
class ExpertLinear(Protocol):
    """One linear map an expert, from A numbers to B, without its bias.

    It must be linear in the rows to the letter: the gradient of gates is taken from
    `input_gradient`, and rows are scaled by their gates before `weight_gradients` sees them. The
    backward pass may ask for `forward` again: what it draws, it must draw once. All methods are
    called without autograd, with autocast off.
    """

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the map is made of, in an order that stays the same: what autograd may differentiate."""
        ...

    @property
    def matrices(self) -> Float[Tensor, "E B A"]:
        """The tensor whose sizes are the map's."""
        ...

    def with_tensors(self, tensors: Sequence[Tensor]) -> "ExpertLinear":
        """Return the same map of other tensors: cast for autocast, or read back for the backward pass."""
        ...

    def forward(
        self,
        rows: Float[Tensor, "N A"],
        segments: Segments,
        *,
        out: Float[Tensor, "N B"] | None = None,
    ) -> Float[Tensor, "N B"]:
        """Return each row's product, in `out` if that is given."""
        ...

    def input_gradient(
        self,
        gradient: Float[Tensor, "N B"],
        segments: Segments,
        *,
        out: Float[Tensor, "N A"] | None = None,
    ) -> Float[Tensor, "N A"]:
        """Return the gradient of the rows that went in, in `out` if that is given."""
        ...

    def new_gradients(
        self, counts: tuple[int, ...], wanted: Sequence[torch.dtype | None]
    ) -> list[Tensor | None]:
        """Make room for the gradients of `tensors`.

        Args:
            counts: rows of every expert of the whole batch.
            wanted: of each tensor the dtype of its gradient, None where it is not trained.
        """
        ...

    def weight_gradients(
        self,
        gradient: Float[Tensor, "N B"],
        rows: Float[Tensor, "N A"],
        segments: Segments,
        into: Sequence[Tensor | None],
    ) -> None:
        """Write, or add, what these segments give to the gradients of `tensors`; None is left out."""
        ...


@dataclass(frozen=True, slots=True)
class FullMatrices:
    """One matrix an expert, which maps x to `weight @ x`."""

    weight: Float[Tensor, "E B A"]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The matrices."""
        return (self.weight,)

    @property
    def matrices(self) -> Float[Tensor, "E B A"]:
        """The matrices."""
        return self.weight

    def with_tensors(self, tensors: Sequence[Tensor]) -> "FullMatrices":
        """Return the map of other matrices."""
        (weight,) = tensors
        return FullMatrices(weight)

    def forward(
        self,
        rows: Float[Tensor, "N A"],
        segments: Segments,
        *,
        out: Float[Tensor, "N B"] | None = None,
    ) -> Float[Tensor, "N B"]:
        """Return each row's product."""
        return segment_mm(rows, self.weight.transpose(1, 2), segments, out=out)

    def input_gradient(
        self,
        gradient: Float[Tensor, "N B"],
        segments: Segments,
        *,
        out: Float[Tensor, "N A"] | None = None,
    ) -> Float[Tensor, "N A"]:
        """Return the gradient of the rows."""
        return segment_mm(gradient, self.weight, segments, out=out)

    def new_gradients(
        self, counts: tuple[int, ...], wanted: Sequence[torch.dtype | None]
    ) -> list[Tensor | None]:
        """Make room for the gradient of the matrices, strides as theirs; nothing is added up in it."""
        (dtype,) = wanted
        return [None if dtype is None else new_gradient(self.weight, counts, dtype=dtype)]

    def weight_gradients(
        self,
        gradient: Float[Tensor, "N B"],
        rows: Float[Tensor, "N A"],
        segments: Segments,
        into: Sequence[Tensor | None],
    ) -> None:
        """Write the gradient of each used expert's matrix once, into its place."""
        (out,) = into
        if out is not None:
            segment_outer(gradient, rows, segments, out=out)
