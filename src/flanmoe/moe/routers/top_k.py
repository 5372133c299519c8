"""Dropless top-k: each token goes to its k best experts, and none is ever turned away.

What Mixtral (renormalised), Qwen-MoE and OLMoE do. The only token choice that is causal and whose
output for a token does not depend on the rest of the batch.
"""

from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from flanmoe.moe.routers.base import Router, RouterConfig, routers
from flanmoe.moe.routers.token_choice import TokenChoiceRouter, renormalised


@final
class TopKConfig(RouterConfig):
    """Dropless top-k.

    Attributes:
        top_k: experts that each token visits.
        normalize: whether gates are divided by their sum. With `top_k` 1 that makes the gate 1 and
            leaves the router without a gradient from the task; use `switch` there.
    """

    kind: Literal["top_k.v1"] = "top_k.v1"
    top_k: int = Field(default=2, ge=1)
    normalize: bool = True

    @model_validator(mode="after")
    def _there_are_enough(self) -> "TopKConfig":
        if self.top_k > self.num_experts:
            raise ValueError(
                f"`top_k` must be at most `num_experts` ({self.num_experts}), but is {self.top_k}"
            )
        if self.top_k == 1 and self.normalize:
            raise ValueError(
                "`normalize` must be false when `top_k` is 1, but is true: a single renormalised "
                "gate is always 1 and gives the router no gradient"
            )
        return self

    def _build(self, hidden_size: int) -> Router:
        return TopKRouter(self, hidden_size)


routers.register("top_k.v1")(TopKConfig)


@final
class TopKRouter(TokenChoiceRouter):
    """The router of `TopKConfig`."""

    def __init__(self, config: TopKConfig, hidden_size: int) -> None:
        super().__init__(config, hidden_size, capacity=None)
        self.normalize = config.normalize
        self._top_k = config.top_k

    @property
    def top_k(self) -> int:
        """Experts that each token visits."""
        return self._top_k

    def gates(self, probabilities: Float[Tensor, "T k"]) -> Float[Tensor, "T k"]:
        """Return the probabilities, divided by their sum where the model does that."""
        return renormalised(probabilities) if self.normalize else probabilities

    def asked(self, probabilities: Float[Tensor, "T k"]) -> Bool[Tensor, "T k"]:
        """Ask for every choice."""
        return torch.ones_like(probabilities, dtype=torch.bool)
