"""`StackedSums`: the sums of all layers of a model, made of several layers at a time.

A model has dozens of routers, and what is computed of each is small: one after the other, calling the
operations would cost more than they do. Layers that see the same tokens are therefore put one after the other
as if they were one, with groups of their own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from flanmoe.moe.routing import Choices, Routing
from flanmoe.moe.routing_sums import RoutingSums

# Logits that are looked at together: 16 MiB in float32, and a few times that in between.
_MOST_LOGITS = 2**22


@dataclass(frozen=True, slots=True)
class StackedSums:
    """Sums of several layers.

    Attributes:
        places: for each part the layers that it is of.
        parts: their sums, groups of one layer after those of another.
    """

    places: tuple[tuple[int, ...], ...]
    parts: tuple[RoutingSums, ...]

    @classmethod
    def of(
        cls,
        layers: Sequence[Routing],
        groups: Sequence[Int[Tensor, " _"]],
        *,
        num_groups: int,
        coactivation: bool = False,
    ) -> "StackedSums":
        """Add up the routing of every layer.

        Args:
            layers: what the routers decided.
            groups: for each layer the number of the group of each token; one tensor for all layers that
                see the same tokens.
            num_groups: number of groups.
            coactivation: as in `RoutingSums.of`.
        """
        places = _alike(layers, groups)
        parts = [
            RoutingSums.of(
                _joined([layers[place] for place in own]),
                _apart(groups[own[0]], len(own), num_groups),
                num_groups=len(own) * num_groups,
                coactivation=coactivation,
            )
            for own in places
        ]
        return cls(places, tuple(parts))

    def layers(self) -> list[RoutingSums]:
        """Return the sums of each layer."""
        found = {
            place: sums
            for own, part in zip(self.places, self.parts, strict=True)
            for place, sums in zip(own, part.split(len(own)), strict=True)
        }
        return [found[place] for place in sorted(found)]

    def __add__(self, other: "StackedSums") -> "StackedSums":
        if self.places != other.places:
            return self._unstacked() + other._unstacked()
        pairs = zip(self.parts, other.parts, strict=True)
        return StackedSums(self.places, tuple(own + theirs for own, theirs in pairs))

    def changed(self, change: Callable[[Tensor], Tensor]) -> "StackedSums":
        """Return the sums with `change` made to each tensor, such as a sum over processes."""
        return StackedSums(self.places, tuple(part.changed(change) for part in self.parts))

    def _unstacked(self) -> "StackedSums":
        parts = tuple(self.layers())
        return StackedSums(tuple((place,) for place in range(len(parts))), parts)


def _alike(
    layers: Sequence[Routing], groups: Sequence[Int[Tensor, " _"]]
) -> tuple[tuple[int, ...], ...]:
    """Layers that see the same tokens and choose alike, not too many together."""
    found: dict[tuple[int, int, int], list[int]] = {}
    for place, (layer, own) in enumerate(zip(layers, groups, strict=True)):
        key = (layer.num_experts, layer.choices.expert_ids.shape[1], id(own))
        found.setdefault(key, []).append(place)
    chunks: list[tuple[int, ...]] = []
    for alike in found.values():
        most = max(1, _MOST_LOGITS // max(layers[alike[0]].logits.numel(), 1))
        chunks += [tuple(alike[start : start + most]) for start in range(0, len(alike), most)]
    return tuple(chunks)


def _joined(layers: Sequence[Routing]) -> Routing:
    """Tokens of one layer after those of another; their examples are not kept apart."""
    if len(layers) == 1:
        return layers[0]
    first = layers[0]
    return Routing(
        token_ids=torch.cat(
            [layer.token_ids + place * first.num_tokens for place, layer in enumerate(layers)]
        ),
        expert_ids=torch.cat([layer.expert_ids for layer in layers]),
        gates=torch.cat([layer.gates for layer in layers]),
        logits=torch.cat([layer.logits.detach() for layer in layers]),
        valid=torch.cat([layer.valid for layer in layers]),
        segments=first.segments.repeat(len(layers)),
        choices=Choices(
            expert_ids=torch.cat([layer.choices.expert_ids for layer in layers]),
            asked=torch.cat([layer.choices.asked for layer in layers]),
        ),
    )


def _apart(groups: Int[Tensor, " _"], number: int, num_groups: int) -> Int[Tensor, " _"]:
    """Groups of each layer by themselves."""
    offsets = torch.arange(0, number * num_groups, num_groups, device=groups.device)
    return (groups + offsets.unsqueeze(1)).reshape(-1)
