"""`RoutingSums`: what a router did with some tokens, as sums that add up over batches and processes.

Everything that is shown or judged of routing (shares, entropy, confidence, drops, unused experts,
co-activation) is a ratio of these sums (`moe/routing_measures.py`), so that micro-batches, steps and ranks
put together say the same as one large batch. G groups of tokens (tasks), T tokens, N assignments,
E experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flanmoe.moe.losses import at_least_float32
from flanmoe.moe.routing import Routing

_COUNTED = ("tokens", "asked", "dropped", "unserved", "assignments", "coactivation")


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
        if groups is None:
            groups = torch.zeros_like(routing.segments)
        # Padding falls into a group past the last one, which is cut off.
        of_token = torch.where(routing.valid, groups, num_groups)
        counts, sums = _by_group(routing, of_token, num_groups)
        assignments, gate_mass = _by_expert(routing, of_token, num_groups)
        tokens, asked, unserved = counts
        entropy, confidence, squared_logits = sums
        return cls(
            tokens=tokens,
            asked=asked,
            # Where experts choose, nobody asked.
            dropped=asked - assignments.sum(dim=1) if routing.choices.asked.shape[1] else asked,
            unserved=unserved,
            assignments=assignments,
            gate_mass=gate_mass,
            entropy=entropy,
            confidence=confidence,
            squared_logits=squared_logits,
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
        if self.num_groups == 1:
            return self
        return self.changed(lambda values: values.sum(dim=0, keepdim=True))

    def of_groups(self, groups: Int[Tensor, " K"]) -> "RoutingSums":
        """Return the sums of some groups only, in the order in which they are named."""
        return self.changed(lambda values: values[groups.to(values.device)])

    def __add__(self, other: "RoutingSums") -> "RoutingSums":
        return self._with(lambda name, own: own + getattr(other, name).to(own.device))

    def changed(self, change: Callable[[Tensor], Tensor]) -> "RoutingSums":
        """Return the sums with `change` made to each tensor, such as a sum over processes."""
        return self._with(lambda _, own: change(own))

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name, those that were not asked for left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as plain JSON types."""
        return {name: cast(Any, value).tolist() for name, value in self.tensors().items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "RoutingSums":
        """Return the sums that `state_dict` gave, on the CPU."""
        kinds = {name: torch.long if name in _COUNTED else torch.double for name in state}
        tensors: dict[str, Any] = {
            name: torch.tensor(values, dtype=kinds[name]) for name, values in state.items()
        }
        return cls(**tensors)

    def split(self, number: int) -> list["RoutingSums"]:
        """Return the sums of so many layers that were put side by side."""
        size = self.num_groups // number
        pieces = {name: torch.split(value, size) for name, value in self.tensors().items()}
        found: list[dict[str, Any]] = [
            {name: values[place] for name, values in pieces.items()} for place in range(number)
        ]
        return [RoutingSums(**values) for values in found]

    def _with(self, change: Callable[[str, Tensor], Tensor]) -> "RoutingSums":
        changed: dict[str, Any] = {name: change(name, own) for name, own in self.tensors().items()}
        return replace(self, **changed)


def side_by_side(layers: Sequence[RoutingSums]) -> RoutingSums:
    """Return the sums of layers with as many experts each as those of one, with the groups of all of them."""
    tensors = [layer.tensors() for layer in layers]
    joined: dict[str, Any] = {
        name: torch.cat([own[name] for own in tensors]) for name in tensors[0]
    }
    return RoutingSums(**joined)


def added_layers(one: Sequence[RoutingSums], other: Sequence[RoutingSums]) -> list[RoutingSums]:
    """Return the sums of each layer over both, in one call: there are hundreds of small tensors."""
    names = [list(layer.tensors()) for layer in one]
    tensors = [[x for layer in layers for x in layer.tensors().values()] for layers in (one, other)]
    total = iter(torch._foreach_add(*tensors))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    return [
        replace(layer, **{name: next(total) for name in own})
        for layer, own in zip(one, names, strict=True)
    ]


def _by_group(
    routing: Routing, of_token: Int[Tensor, " T"], num_groups: int
) -> tuple[Int[Tensor, "3 G"], Float[Tensor, "3 G"]]:
    """Tokens, asked and unserved; entropy, confidence and squared logits.

    All columns go through one addition: on an accelerator the number of small operations is the cost. The
    logarithm of the probabilities is the logits but for a constant a token.
    """
    logits = at_least_float32(routing.logits).log_softmax(dim=1)
    centred = logits - logits.mean(dim=1, keepdim=True)
    tokens = torch.ones_like(logits[:, 0])
    columns = torch.stack(
        [
            tokens,
            routing.choices.asked.sum(dim=1, dtype=tokens.dtype),
            tokens.index_fill(0, routing.token_ids, 0),
            (logits.exp() * logits).sum(dim=1).neg_(),
            logits.amax(dim=1).exp_(),
            centred.square_().mean(dim=1),
        ]
    ).double()
    sums = columns.new_zeros(len(columns), num_groups + 1)
    sums = sums.scatter_add_(1, of_token.expand(len(columns), -1), columns)[:, :num_groups]
    # Whole numbers are exact in float64 up to 2^53.
    return sums[:3].long(), sums[3:]


def _by_expert(
    routing: Routing, of_token: Int[Tensor, " T"], num_groups: int
) -> tuple[Int[Tensor, "G E"], Float[Tensor, "G E"]]:
    """Kept assignments and the mass of their gates."""
    num_experts = routing.num_experts
    cells = of_token[routing.token_ids] * num_experts + routing.expert_ids
    gates = routing.gates.double()
    sums = gates.new_zeros(2, (num_groups + 1) * num_experts)
    sums[0].scatter_add_(0, cells, torch.ones_like(gates))
    sums[1].scatter_add_(0, cells, gates)
    counts, mass = sums.view(2, -1, num_experts)[:, :num_groups]
    return counts.long(), mass


def _coactivation(
    routing: Routing, of_token: Int[Tensor, " T"], num_groups: int
) -> Int[Tensor, "G E E"]:
    num_experts = routing.num_experts
    has = torch.zeros(routing.num_tokens, num_experts, device=routing.logits.device)
    has[routing.token_ids, routing.expert_ids] = 1
    found = torch.zeros(num_groups, num_experts, num_experts, device=has.device, dtype=torch.long)
    there: list[int] = cast(Any, of_token).tolist()
    for group in set(there) - {num_groups}:
        own = has[of_token == group]
        # Products of zeros and ones: exact in float32 up to 2^24 tokens of a batch.
        found[group] = (own.T @ own).round().long()
    return found
