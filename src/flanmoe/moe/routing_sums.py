"""`RoutingSums`: what a router did with some tokens, as sums that add up over batches and processes.

Everything that is shown or judged of routing (shares, entropy, confidence, drops, unused experts,
co-activation) is a ratio of these sums, so that micro-batches, steps and ranks put together say the same
as one large batch. G groups of tokens (tasks), T tokens, N assignments, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flanmoe.moe.losses import router_probabilities
from flanmoe.moe.routing import Routing


@dataclass(frozen=True, slots=True)
class RoutingSums:
    """What one layer's router did with the tokens of each group. Padding enters nothing.

    Attributes:
        tokens: tokens.
        asked: choices that they asked for; 0 where experts choose.
        dropped: choices asked for that did not fit.
        unserved: tokens that no expert took.
        assignments: (token, expert) pairs that were kept, by expert.
        gate_mass: sum of their gates, by expert.
        entropy: sum over tokens of the entropy of the router's probabilities, in nats.
        confidence: sum over tokens of the largest probability.
        squared_logits: sum over tokens of the mean square of their logits, each less the token's mean
            (which the softmax does not see).
        coactivation: tokens that had both experts; on the diagonal those that had the expert. None
            where it was not asked for.
    """

    tokens: Int[Tensor, " G"]
    asked: Int[Tensor, " G"]
    dropped: Int[Tensor, " G"]
    unserved: Int[Tensor, " G"]
    assignments: Int[Tensor, "G E"]
    gate_mass: Float[Tensor, "G E"]
    entropy: Float[Tensor, " G"]
    confidence: Float[Tensor, " G"]
    squared_logits: Float[Tensor, " G"]
    coactivation: Int[Tensor, "G E E"] | None = None

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        routing: Routing,
        groups: Int[Tensor, " T"] | None = None,
        *,
        num_groups: int = 1,
        coactivation: bool = False,
    ) -> "RoutingSums":
        """Add up one layer's routing.

        Args:
            routing: what its router decided.
            groups: for each token the number of its group, arbitrary for padding; one group without it.
            num_groups: number of groups.
            coactivation: also count which experts serve a token together: E^2 numbers a group.
        """
        num_experts = routing.num_experts
        if groups is None:
            groups = torch.zeros_like(routing.segments)
        # Padding falls into a group past the last one, which is cut off.
        of_token = torch.where(routing.valid, groups, num_groups)
        of_pair = of_token[routing.token_ids]

        def by_group(values: Tensor) -> Tensor:
            sums = values.new_zeros(num_groups + 1, *values.shape[1:])
            return sums.index_add_(0, of_token, values)[:num_groups]

        def by_expert(weights: Tensor | None) -> Tensor:
            cells = of_pair * num_experts + routing.expert_ids
            size = (num_groups + 1) * num_experts
            counts = torch.bincount(cells, weights=weights, minlength=size)
            return counts.view(-1, num_experts)[:num_groups]

        served = torch.zeros_like(routing.valid)
        served[routing.token_ids] = True
        asked = by_group(routing.choices.asked.sum(dim=1))
        assignments = by_expert(None)
        probabilities = router_probabilities(routing.logits)
        logits = routing.logits.to(probabilities.dtype)
        centred = logits - logits.mean(dim=1, keepdim=True)
        return cls(
            tokens=by_group(routing.valid.long()),
            asked=asked,
            # Where experts choose, nobody asked.
            dropped=asked - assignments.sum(dim=1) if routing.choices.asked.shape[1] else asked,
            unserved=by_group((routing.valid & ~served).long()),
            assignments=assignments,
            gate_mass=by_expert(routing.gates.double()),
            entropy=by_group(_entropies(probabilities)),
            confidence=by_group(probabilities.amax(dim=1).double()),
            squared_logits=by_group(centred.square().mean(dim=1).double()),
            coactivation=_coactivation(routing, of_token, num_groups) if coactivation else None,
        )

    @classmethod
    def none(
        cls, num_groups: int, num_experts: int, *, coactivation: bool = False
    ) -> "RoutingSums":
        """Return the sums over no tokens."""
        counts = torch.zeros(num_groups, dtype=torch.long)
        sums = torch.zeros(num_groups, dtype=torch.double)
        by_expert = torch.zeros(num_groups, num_experts, dtype=torch.long)
        pairs = torch.zeros(num_groups, num_experts, num_experts, dtype=torch.long)
        return cls(
            tokens=counts,
            asked=counts,
            dropped=counts,
            unserved=counts,
            assignments=by_expert,
            gate_mass=by_expert.double(),
            entropy=sums,
            confidence=sums,
            squared_logits=sums,
            coactivation=pairs if coactivation else None,
        )

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        return self.assignments.shape[0]

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return self.assignments.shape[1]

    def together(self) -> "RoutingSums":
        """Return the sums over all groups, as one group."""
        return self.changed(lambda values: values.sum(dim=0, keepdim=True))

    def __add__(self, other: "RoutingSums") -> "RoutingSums":
        return self._with(lambda name, own: own + getattr(other, name).to(own.device))

    def changed(self, change: Callable[[Tensor], Tensor]) -> "RoutingSums":
        """Return the sums with `change` made to each tensor, such as a sum over processes."""
        return self._with(lambda _, own: change(own))

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name, those that were not asked for left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def _with(self, change: Callable[[str, Tensor], Tensor]) -> "RoutingSums":
        changed: dict[str, Any] = {name: change(name, own) for name, own in self.tensors().items()}
        return replace(self, **changed)


def _entropies(probabilities: Float[Tensor, "T E"]) -> Float[Tensor, " T"]:
    return -torch.xlogy(probabilities, probabilities).sum(dim=1).double()


def _coactivation(
    routing: Routing, of_token: Int[Tensor, " T"], num_groups: int
) -> Int[Tensor, "G E E"]:
    has = torch.zeros(routing.num_tokens, routing.num_experts, device=routing.logits.device)
    has[routing.token_ids, routing.expert_ids] = 1
    # Products of zeros and ones: exact in float32 up to 2^24 tokens of a batch.
    together = [has[of_token == group].T @ has[of_token == group] for group in range(num_groups)]
    return torch.stack(together).round().long()
