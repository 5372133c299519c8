"""Expert choice: each expert takes the tokens that it scores highest (Zhou et al. 2022, arXiv 2202.09368).

Load is even by construction, so there is nothing to balance; a token may be served by any number of
experts, none included. Experts choose among the tokens of one example, in training as in
evaluation, so that an example's output does not depend on what else is in the batch. They see all
of its tokens, so a causal decoder must not use it.
"""

from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from flanmoe.moe.routers.base import Router, RouterConfig, Scored, routers
from flanmoe.moe.routers.capacity import rounded_share
from flanmoe.moe.routing import Choices, ForcedRouting, Routing, numbered


@final
class ExpertChoiceConfig(RouterConfig):
    """Experts choose tokens.

    Attributes:
        capacity_factor: mean number of experts a token. An expert takes
            C = clip(round(capacity_factor * T / E), 1, T) of an example's T real tokens. The paper
            uses 2; T5X's `experts_choose` models 1.
    """

    kind: Literal["expert_choice.v1"] = "expert_choice.v1"
    capacity_factor: float = Field(default=2.0, gt=0, allow_inf_nan=False)

    @property
    def looks_ahead(self) -> str:
        """Why a token's routing depends on later tokens."""
        return (
            "`expert_choice` lets each expert take its favourites among all tokens of an example, "
            "so that a later token can push out an earlier one"
        )

    def _build(self, hidden_size: int) -> Router:
        return ExpertChoiceRouter(self, hidden_size)


routers.register("expert_choice.v1")(ExpertChoiceConfig)


@final
class ExpertChoiceRouter(Router):
    """The router of `ExpertChoiceConfig`. Gates are probabilities over experts, not renormalised."""

    def __init__(self, config: ExpertChoiceConfig, hidden_size: int) -> None:
        super().__init__(config, hidden_size)
        self.capacity_factor = config.capacity_factor

    @property
    def top_k(self) -> int:
        """Zero: tokens do not ask."""
        return 0

    def route(self, scored: Scored) -> Routing:
        """Let each expert take its best tokens of each example; of equals the earlier one."""
        groups = torch.where(scored.valid, numbered(scored.segments) + 1, 0)
        sizes = torch.bincount(groups)
        share = rounded_share(
            sizes, self.num_experts, factor=self.capacity_factor, rounding="nearest"
        )
        capacities = share.clamp(min=1).minimum(sizes)
        # Group 0 is padding.
        capacities[:1] = 0
        taken = _best_of_each_group(scored.probabilities.detach(), groups, sizes, capacities)
        token_ids, expert_ids = taken.nonzero().unbind(dim=1)
        return _routing(scored, token_ids, expert_ids)

    def replay(self, scored: Scored, forced: ForcedRouting) -> Routing:
        """Make the given assignments."""
        kept = scored.valid[forced.token_ids]
        return _routing(scored, forced.token_ids[kept], forced.expert_ids[kept])


def _best_of_each_group(
    probabilities: Float[Tensor, "T E"],
    groups: Int[Tensor, " T"],
    sizes: Int[Tensor, " G"],
    capacities: Int[Tensor, " G"],
) -> Bool[Tensor, "T E"]:
    """Mark for each expert the `capacities` most probable tokens of each group."""
    by_score = probabilities.sort(dim=0, descending=True, stable=True).indices
    # Stable again, so that inside each group the order by score stays.
    regrouped = groups[by_score].sort(dim=0, stable=True).indices
    tokens = by_score.gather(0, regrouped)
    starts = sizes.cumsum(0) - sizes
    ranks = torch.arange(len(groups), device=groups.device).unsqueeze(1) - starts[groups[tokens]]
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter(
        0, tokens, ranks < capacities[groups[tokens]]
    )


def _routing(
    scored: Scored, token_ids: Int[Tensor, " N"], expert_ids: Int[Tensor, " N"]
) -> Routing:
    return Routing(
        token_ids=token_ids,
        expert_ids=expert_ids,
        gates=scored.probabilities[token_ids, expert_ids],
        logits=scored.logits,
        valid=scored.valid,
        segments=scored.segments,
        choices=Choices.none(len(scored.logits), scored.logits.device),
    )
