"""`FusedExperts`: the matrices of all experts of one block, and what is done with their outputs."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from flanmoe.core.errors import ModelError
from flanmoe.moe.compute.activations import POINTWISE, Gated
from flanmoe.moe.compute.low_rank import LowRankExperts

# Attribute of an experts module that holds its rate of expert dropout.
_HIDDEN_DROPOUT = "flanmoe_hidden_dropout"
# The one that says whether it keeps its activations.
_KEEP_ACTIVATION = "flanmoe_keep_activation"
# And the one that holds what is shown its outputs.
_OBSERVER = "flanmoe_observer"


class ExpertOutputs(NamedTuple):
    """What the experts of one block returned for one batch, before gates. N assignments, H hidden size.

    Attributes:
        outputs: of each assignment; sorted by expert, within an expert by token.
        expert_ids, token_ids, gates: of the same assignments; those to "no expert" are left out.
    """

    outputs: Float[Tensor, "N H"]
    expert_ids: Int[Tensor, " N"]
    token_ids: Int[Tensor, " N"]
    gates: Float[Tensor, " N"]


ExpertObserver = Callable[[ExpertOutputs], None]


class Part(NamedTuple):
    """Some experts of a block, and the assignments that are theirs; all others go to no expert."""

    experts: "FusedExperts"
    expert_ids: Int[Tensor, "T k"]


Split = Callable[[Tensor], Sequence[Part]]


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """The matrices of all experts of one block, and what happens between them.

    An expert computes `output_norm(down @ combine(gate_up @ x + gate_up_bias) + down_bias)`, in
    training with dropout on what `combine` returns (expert dropout).

    Attributes:
        gate_up: first matrices, fused; views with other strides are fine.
        down: second matrices.
        combine: turns the first product (N, F) into the second's input (N, I); see `gated`.
        gate_up_bias, down_bias: biases, None where there are none.
        output_norm: applied to each expert's output, None for the identity.
        hidden_dropout: share of `combine`'s outputs that is set to 0, the rest scaled up by
            1 / (1 - share); drawn from torch's global generator, expert after expert. Leave it at 0
            outside training.
        keep_activation: keep activations for the backward pass, one number a unit of each visited expert,
            instead of computing them again.
        kernels: what products are made with: `torch`'s own, the way that `product_path` names, or
            `triton`, ours, which fetch rows and put them back (CUDA; not measured).
        observer: is shown what the experts return, without gradients; see `observed_outputs`.
        low_rank: a low-rank change of the matrices, None for none; they get no gradient beside it.
        split: divides assignments between the experts here and copies of some; see `ChosenExperts`.
    """

    gate_up: Float[Tensor, "E F H"]
    down: Float[Tensor, "E H I"]
    combine: Callable[[Tensor], Tensor]
    gate_up_bias: Float[Tensor, "E F"] | None = None
    down_bias: Float[Tensor, "E H"] | None = None
    output_norm: Callable[[Tensor], Tensor] | None = None
    hidden_dropout: float = 0.0
    keep_activation: bool = False
    kernels: Literal["torch", "triton"] = "torch"
    observer: ExpertObserver | None = None
    low_rank: LowRankExperts | None = None
    split: Split | None = None

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return self.gate_up.shape[0]


def hidden_dropout(experts: nn.Module) -> float:
    """Return the rate of expert dropout that an experts module trains with, 0 if none was set."""
    return getattr(experts, _HIDDEN_DROPOUT, 0.0)


def set_hidden_dropout(experts: nn.Module, rate: float) -> None:
    """Set the rate of expert dropout that an experts module, ours or not, trains with."""
    setattr(experts, _HIDDEN_DROPOUT, rate)


def keep_activation(experts: nn.Module) -> bool:
    """Return whether an experts module keeps its activations for the backward pass; by default it does not."""
    return getattr(experts, _KEEP_ACTIVATION, False)


def set_keep_activation(experts: nn.Module, keep: bool) -> None:
    """Say whether an experts module, ours or not, keeps its activations for the backward pass."""
    setattr(experts, _KEEP_ACTIVATION, keep)


def expert_observer(experts: nn.Module) -> ExpertObserver | None:
    """Return what is shown the outputs of an experts module, None if nothing is."""
    return getattr(experts, _OBSERVER, None)


@contextmanager
def observed_outputs(experts: nn.Module, observer: ExpertObserver) -> Generator[None]:
    """Show what an experts module returns to `observer` in every forward pass of the `with` block.

    The module, ours or not, must run flanmoe's compute.

    Raises:
        ModelError: if something observes it already.
    """
    if expert_observer(experts) is not None:
        raise ModelError(
            "The outputs of experts can be observed once at a time, but something observes those of this "
            f"{type(experts).__name__} already. End the other observation first."
        )
    setattr(experts, _OBSERVER, observer)
    try:
        yield
    finally:
        delattr(experts, _OBSERVER)


def gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return `activation(gate) * up` for products whose first half is the gate (SwiGLU and its kin).

    The activations of `POINTWISE` have their derivative written out; any other is left to autograd.
    """
    for name, pointwise in POINTWISE.items():
        if activation is pointwise.function:
            return Gated(name)

    def combine(product: Tensor) -> Tensor:
        gate, up = product.chunk(2, dim=-1)
        return activation(gate) * up

    return combine
