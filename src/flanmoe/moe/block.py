"""`MoEBlock`: one sparse block of any model, seen the same way whoever wrote the model."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from flanmoe.moe.routing import Routing


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The matrices of one expert, in `nn.Linear` orientation. H hidden size, I expert width.

    `gate` is None where the activation stands alone: an expert is then `down @ activation(up @ x)`.
    """

    gate: Float[Tensor, "I H"] | None
    up: Float[Tensor, "I H"]
    down: Float[Tensor, "H I"]
    gate_bias: Float[Tensor, " I"] | None = None
    up_bias: Float[Tensor, " I"] | None = None
    down_bias: Float[Tensor, " H"] | None = None


@runtime_checkable
class MoEBlock(Protocol):
    """A sparse block: a router module and an experts module.

    Attributes:
        name: dotted path of the block inside its model.
        layer: number of the transformer layer that holds it.
        router: the module that scores tokens; forward hooks on it see every routing decision.
        experts: the module that holds and computes the experts.
        num_experts, top_k: counts; `top_k` is 0 where experts choose their tokens.
        hidden_size, expert_width: sizes of one expert.
        norm_top_k: whether the gates of the chosen experts are renormalised to sum to 1.
    """

    name: str
    layer: int
    router: nn.Module
    experts: nn.Module
    num_experts: int
    top_k: int
    hidden_size: int
    expert_width: int
    norm_top_k: bool

    def read_expert(self, index: int) -> ExpertWeights:
        """Return copies of one expert's matrices."""
        ...

    def write_expert(self, index: int, weights: ExpertWeights) -> None:
        """Overwrite one expert's matrices in place."""
        ...

    def routing(
        self,
        returned: Any,
        *,
        valid: Bool[Tensor, " T"] | None = None,
        segments: Int[Tensor, " T"] | None = None,
    ) -> Routing:
        """Read what the router module's forward returned for these tokens."""
        ...
