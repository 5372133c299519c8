"""Switch: each token goes to its one best expert (Fedus et al. 2021, arXiv 2101.03961)."""

from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flanmoe.moe.routers.base import Router, routers
from flanmoe.moe.routers.token_choice import TokenChoiceConfig, TokenChoiceRouter


@final
class SwitchConfig(TokenChoiceConfig):
    """Top-1 token choice with capacity.

    Attributes:
        gate: `probability` weighs the expert's output with its probability p. `straight_through`
            weighs it with 1 and lets the router's gradient through as if it were p / p', p' held
            fixed: what an upcycled model needs to start as the dense one. (A renormalised single
            gate would be 1 too, but leave the router without a gradient.)
    """

    kind: Literal["switch.v1"] = "switch.v1"
    gate: Literal["probability", "straight_through"] = "probability"

    def _build(self, hidden_size: int) -> Router:
        return SwitchRouter(self, hidden_size)


routers.register("switch.v1")(SwitchConfig)


@final
class SwitchRouter(TokenChoiceRouter):
    """The router of `SwitchConfig`."""

    def __init__(self, config: SwitchConfig, hidden_size: int) -> None:
        super().__init__(config, hidden_size, capacity=config.capacity, order=config.order)
        self.gate = config.gate

    @property
    def top_k(self) -> int:
        """One."""
        return 1

    def gates(self, probabilities: Float[Tensor, "T k"]) -> Float[Tensor, "T k"]:
        """Return p, or p over its own value held fixed."""
        if self.gate == "probability":
            return probabilities
        fixed = probabilities.detach()
        # Not p / p': the probability of a forced expert may be 0.
        return 1 + (probabilities - fixed) / fixed.clamp(min=torch.finfo(fixed.dtype).tiny)

    def asked(self, probabilities: Float[Tensor, "T k"]) -> Bool[Tensor, "T k"]:
        """Ask for every first choice."""
        return torch.ones_like(probabilities, dtype=torch.bool)
