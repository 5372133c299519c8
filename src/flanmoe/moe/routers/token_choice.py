"""Token choice: each token asks for its k best experts; capacity may say no.

Switch, GShard, ST-MoE and dropless top-k differ in how many they ask for, what the gate is, and
whether a second choice may be given up. All else is here, once.
"""

from abc import abstractmethod
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flanmoe.core.errors import ModelError
from flanmoe.moe.routers.base import Router, RouterConfig, Scored
from flanmoe.moe.routers.capacity import CapacityConfig, fitting
from flanmoe.moe.routing import Choices, ForcedRouting, Routing

_ALMOST_NOTHING = 1e-9


class TokenChoiceConfig(RouterConfig):
    """What routers with capacity are told.

    Attributes:
        capacity: how many assignments an expert takes.
        order: who is served first: tokens as they come (`natural`), or those with the largest
            first probability (`batch_priority`, arXiv 2106.05974), which looks ahead.
    """

    capacity: CapacityConfig = CapacityConfig()
    order: Literal["natural", "batch_priority"] = "natural"

    @property
    def looks_ahead(self) -> str | None:
        """Why a token's routing depends on later tokens; None in natural order."""
        if self.order == "natural":
            return None
        return (
            "`order: batch_priority` serves the most confident tokens of a group first, later ones "
            "before earlier ones"
        )


def best(probabilities: Float[Tensor, "T E"], top_k: int) -> Int[Tensor, "T k"]:
    """Return the most probable experts of each token, best first; of equals the lower number."""
    return probabilities.detach().sort(dim=1, descending=True, stable=True).indices[:, :top_k]


def renormalised(probabilities: Float[Tensor, "T k"]) -> Float[Tensor, "T k"]:
    """Return probabilities divided by their sum."""
    return probabilities / (probabilities.sum(dim=1, keepdim=True) + _ALMOST_NOTHING)


class TokenChoiceRouter(Router):
    """Each token asks for its k most probable experts.

    Args:
        config: number of experts, jitter, initial weights.
        hidden_size: width of the hidden states.
        capacity: how many assignments an expert takes; None for no limit.
        order: who is served first.
    """

    def __init__(
        self,
        config: RouterConfig,
        hidden_size: int,
        *,
        capacity: CapacityConfig | None,
        order: Literal["natural", "batch_priority"] = "natural",
    ) -> None:
        super().__init__(config, hidden_size)
        self.capacity = capacity
        self.order = order

    @abstractmethod
    def gates(self, probabilities: Float[Tensor, "T k"]) -> Float[Tensor, "T k"]:
        """Return gates for the probabilities of the chosen experts, best first."""

    @abstractmethod
    def asked(self, probabilities: Float[Tensor, "T k"]) -> Bool[Tensor, "T k"]:
        """Say which choices are asked for, from the probabilities of the chosen experts."""

    def route(self, scored: Scored) -> Routing:
        """Choose, ask, and keep what fits."""
        expert_ids = best(scored.probabilities, self.top_k)
        # Detached first: what a checkpointed layer saves must be the same in `replay`.
        probabilities = scored.probabilities.detach().gather(1, expert_ids)
        asked = self.asked(probabilities) & scored.valid.unsqueeze(1)
        choices = Choices(expert_ids, asked)
        return self._routing(scored, choices, self._kept(scored, choices))

    def replay(self, scored: Scored, forced: ForcedRouting) -> Routing:
        """Keep what is forced; gates come from the scores of the forced choices.

        Raises:
            ModelError: if an assignment is not among what its token asked for.
        """
        expert_ids, asked = forced.choices.expert_ids, forced.choices.asked
        # Asked again for the random numbers alone: what is drawn after them in a pass that is computed twice,
        # dropout for one, must be what was drawn the first time.
        self.asked(scored.probabilities.detach().gather(1, expert_ids))
        matches = asked[forced.token_ids] & (
            expert_ids[forced.token_ids] == forced.expert_ids.unsqueeze(1)
        )
        if not matches.any(dim=1).all():
            raise ModelError(
                "Each forced assignment must be one that its token asked for, but "
                f"{int((~matches.any(dim=1)).sum())} of {len(matches)} are not. Give the choices "
                "that the assignments were made from."
            )
        kept = torch.zeros_like(asked)
        kept[forced.token_ids, matches.int().argmax(dim=1)] = True
        valid = scored.valid.unsqueeze(1)
        return self._routing(scored, Choices(expert_ids, asked & valid), kept & valid)

    def _kept(self, scored: Scored, choices: Choices) -> Bool[Tensor, "T k"]:
        capacity = self.capacity
        factor = capacity.factor(training=self.training) if capacity else None
        if capacity is None or factor is None:
            return choices.asked
        groups = capacity.groups(scored.segments)
        num_groups = int(groups.max()) + 1 if len(groups) else 0
        num_tokens = torch.bincount(groups[scored.valid], minlength=num_groups)
        return fitting(
            choices.expert_ids,
            choices.asked,
            groups=groups,
            capacities=capacity.capacities(num_tokens, self.num_experts, factor=factor),
            order=self._serving_order(scored.probabilities),
            num_experts=self.num_experts,
        )

    def _serving_order(self, probabilities: Float[Tensor, "T E"]) -> Int[Tensor, " T"]:
        if self.order == "natural":
            return torch.arange(len(probabilities), device=probabilities.device)
        return probabilities.detach().amax(dim=1).argsort(descending=True, stable=True)

    def _routing(self, scored: Scored, choices: Choices, kept: Bool[Tensor, "T k"]) -> Routing:
        gates = self.gates(scored.probabilities.gather(1, choices.expert_ids))
        return Routing(
            token_ids=kept.nonzero()[:, 0],
            expert_ids=choices.expert_ids[kept],
            gates=gates[kept],
            logits=scored.logits,
            valid=scored.valid,
            segments=scored.segments,
            choices=choices,
        )
