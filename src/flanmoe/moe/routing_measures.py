"""What people look at of routing, as ratios of `RoutingSums`: load, entropy, confidence, drops.

Every measure is one number a layer and group of tokens, and its name is the same in files, tables,
figures and trackers. docs/guide/routing_monitor.md has the formulas in one place.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from flanmoe.moe.routing_sums import RoutingSums, side_by_side

# The measures that are single numbers, in the order in which they are written.
MEASURES = (
    "entropy_nats",
    "entropy_share",
    "max_over_mean",
    "unused_share",
    "router_entropy_nats",
    "router_entropy_share",
    "confidence",
    "mean_gate",
    "dropped_share",
    "unserved_share",
    "logit_rms",
)


@dataclass(frozen=True, slots=True)
class RoutingMeasures:
    """What one layer's router did with one group of tokens. E experts.

    Where there were no tokens, everything is 0.

    Attributes:
        tokens: real tokens of the group.
        counts: assignments that each expert got.
        load: the same as shares, which sum to 1.
        entropy_nats: entropy of the load; ln E when all experts get the same.
        entropy_share: the same as a share of ln E; 1 where there is one expert.
        max_over_mean: load of the busiest expert over the even share; 1 when even, E at most.
        unused_share: share of the experts that got nothing.
        router_entropy_nats: mean over tokens of the entropy of the router's probabilities.
        router_entropy_share: the same as a share of ln E.
        confidence: mean over tokens of the largest probability, of tokens without an expert too.
        mean_gate: mean gate of the kept assignments. Flaxformer, and T5X with it, log this one as
            `router_confidence` (combine weights over dispatches): it moves with drops, with
            renormalised gates it is 1 / top_k, and it does not see tokens that were dropped.
        dropped_share: choices that did not fit, over all that were asked for; 0 where experts choose,
            since nobody asks.
        unserved_share: tokens that no expert took, over all tokens. Flaxformer calls it
            `fraction_tokens_left_behind`.
        logit_rms: root of the mean square of the router's logits, each less the token's mean.
        coactivation: row e, column f: of the tokens that had e the share that had f too. None where
            it was not counted.
    """

    tokens: int
    counts: tuple[int, ...]
    load: tuple[float, ...]
    entropy_nats: float
    entropy_share: float
    max_over_mean: float
    unused_share: float
    router_entropy_nats: float
    router_entropy_share: float
    confidence: float
    mean_gate: float
    dropped_share: float
    unserved_share: float
    logit_rms: float
    coactivation: tuple[tuple[float, ...], ...] | None = None

    def scalars(self) -> dict[str, float]:
        """Return the measures that are single numbers, by their names (`MEASURES`)."""
        return {name: getattr(self, name) for name in MEASURES}

    def to_mapping(self) -> dict[str, Any]:
        """Return all measures as plain JSON types."""
        found: dict[str, Any] = {
            "tokens": self.tokens,
            "counts": list(self.counts),
            "load": list(self.load),
            **self.scalars(),
        }
        if self.coactivation is not None:
            found["coactivation"] = [list(row) for row in self.coactivation]
        return found


def routing_measures(sums: RoutingSums) -> list[RoutingMeasures]:
    """Return the measures of each group of one layer."""
    load = sums.assignments / _at_least_one(sums.assignments.sum(dim=1, keepdim=True))
    columns = _listed(torch.stack(list(_scalars(sums, load).values()), dim=1))
    counts, loads = _listed(sums.assignments), _listed(load)
    together: list[Any] = [None] * len(columns)
    if sums.coactivation is not None:
        rates = cast("list[list[list[float]]]", _listed(_rates(sums.coactivation)))
        together = [tuple(tuple(row) for row in rows) for rows in rates]
    return [
        RoutingMeasures(
            tokens=tokens,
            counts=tuple(counts[group]),
            load=tuple(loads[group]),
            **dict(zip(MEASURES, columns[group], strict=True)),
            coactivation=together[group],
        )
        for group, tokens in enumerate(_listed(sums.tokens))
    ]


def measures_of_layers(layers: Sequence[RoutingSums]) -> list[list[RoutingMeasures]]:
    """Return the measures of each group of each layer; layers with as many experts in one computation."""
    places: dict[int, list[int]] = {}
    for place, layer in enumerate(layers):
        places.setdefault(layer.num_experts, []).append(place)
    found: list[list[RoutingMeasures]] = [[] for _ in layers]
    for alike in places.values():
        measured = iter(routing_measures(side_by_side([layers[place] for place in alike])))
        for place in alike:
            found[place] = list(islice(measured, layers[place].num_groups))
    return found


def _listed(values: Tensor) -> list[Any]:
    return cast("list[Any]", values.tolist())  # pyright: ignore[reportUnknownMemberType]


def _scalars(sums: RoutingSums, load: Float[Tensor, "G E"]) -> dict[str, Tensor]:
    """The single numbers, each for all groups, in the order of `MEASURES`."""
    num_experts = sums.num_experts
    tokens = _at_least_one(sums.tokens)
    kept = sums.assignments.sum(dim=1)
    entropy = torch.xlogy(load, load).sum(dim=1).abs()
    router_entropy = sums.entropy / tokens
    unused = (sums.assignments == 0).double().mean(dim=1)
    found = {
        "entropy_nats": entropy,
        "entropy_share": _share_of_most(entropy, num_experts, is_there=kept > 0),
        "max_over_mean": load.amax(dim=1) * num_experts,
        "unused_share": torch.where(kept > 0, unused, torch.zeros_like(unused)),
        "router_entropy_nats": router_entropy,
        "router_entropy_share": _share_of_most(
            router_entropy, num_experts, is_there=sums.tokens > 0
        ),
        "confidence": sums.confidence / tokens,
        "mean_gate": sums.gate_mass.sum(dim=1) / _at_least_one(kept),
        "dropped_share": sums.dropped / _at_least_one(sums.asked),
        "unserved_share": sums.unserved / tokens,
        "logit_rms": (sums.squared_logits / tokens).sqrt(),
    }
    return {name: found[name] for name in MEASURES}


def _share_of_most(entropy: Tensor, num_experts: int, *, is_there: Tensor) -> Tensor:
    """Entropy over ln E, no more than 1 by rounding; one expert is used evenly by itself."""
    most = math.log(num_experts)
    share = (entropy / most).clamp(max=1) if most else torch.ones_like(entropy)
    return torch.where(is_there, share, torch.zeros_like(share))


def _rates(coactivation: Tensor) -> Tensor:
    had = coactivation.diagonal(dim1=1, dim2=2).unsqueeze(2)
    return coactivation.double() / _at_least_one(had)


def _at_least_one(counts: Tensor) -> Tensor:
    return counts.double().clamp(min=1)
