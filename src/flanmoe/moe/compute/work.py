"""`Work`: what one call of expert compute does, and which of its tensors autograd is told about."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flanmoe.moe.compute.activations import AnyCombine, Combine
from flanmoe.moe.compute.fused import ExpertObserver
from flanmoe.moe.compute.grouping import Grouping, Segments
from flanmoe.moe.compute.linear import ExpertLinear

# Bytes of the first product that a run of experts makes on the CPU. Rows then stay in the cache from one
# step to the next, and steps over single numbers are long enough to be shared out to threads.
_RUN_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Work:
    """One call of expert compute.

    Attributes:
        grouping: of the batch.
        first, second: the two products.
        first_bias, second_bias: None where there are none.
        combine: between the two products.
        norm: of each expert's output, None for the identity.
        hidden_dropout: as in `FusedExperts`.
        observer: as in `FusedExperts`.
        dtype: of products.
        keep: whether a backward pass may follow.
        keep_activation, kernels: as in `FusedExperts`.
    """

    grouping: Grouping
    first: ExpertLinear
    second: ExpertLinear
    first_bias: Float[Tensor, "E F"] | None
    second_bias: Float[Tensor, "E H"] | None
    combine: Combine
    norm: AnyCombine | None
    hidden_dropout: float
    observer: ExpertObserver | None
    dtype: torch.dtype
    keep: bool
    keep_activation: bool
    kernels: Literal["torch", "triton"]

    @property
    def tensors(self) -> list[Tensor | None]:
        """What products and biases are made of, in the order that `with_tensors` takes it."""
        return [*self.first.tensors, *self.second.tensors, self.first_bias, self.second_bias]

    @property
    def captured(self) -> list[Tensor]:
        """Parameters of `combine` and `norm`, in this order."""
        captured = list(self.combine.captured)
        return captured if self.norm is None else [*captured, *self.norm.captured]

    @property
    def accumulate(self) -> torch.dtype:
        """In what choices are added up: float32 at least."""
        return torch.promote_types(self.dtype, torch.float32)

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> "Work":
        """Return the same work with other tensors."""
        *products, first_bias, second_bias = tensors
        split = len(self.first.tensors)
        present = [tensor for tensor in products if tensor is not None]
        return replace(
            self,
            first=self.first.with_tensors(present[:split]),
            second=self.second.with_tensors(present[split:]),
            first_bias=first_bias,
            second_bias=second_bias,
        )

    def kept_for_backward(self, hidden: Tensor, gates: Tensor) -> "Work":
        """Return the same work, keeping what a backward pass needs if one may follow."""
        arguments = [hidden, gates, *self.tensors, *self.captured]
        trained = any(tensor is not None and tensor.requires_grad for tensor in arguments)
        return replace(self, keep=trained and torch.is_grad_enabled())

    def runs(self) -> list[Segments]:
        """Return the experts in runs that are worked on one after the other; a single one on accelerators."""
        product = self.first.matrices
        if product.device.type != "cpu":
            return self.grouping.runs(max(sum(self.grouping.counts), 1))
        return self.grouping.runs(_RUN_BYTES // (product.shape[1] * self.dtype.itemsize))


def rows_at_a_time(num_rows: int, num_experts: int, product_bytes: int) -> int:
    """Return how many rows the CPU works on at a time if experts have equally many.

    Args:
        num_rows: of all experts.
        num_experts: how many there are.
        product_bytes: what a row of the first product takes.
    """
    return min(num_rows, max(_RUN_BYTES // product_bytes, -(-num_rows // num_experts)))
