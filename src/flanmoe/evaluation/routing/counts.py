"""How often the tokens of each task went to each expert."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

# Requests of a task are counted in two random halves: how far these are apart says how far two samples of the
# same task are, and so what a distance between two tasks means.
HALVES = 2


@dataclass(frozen=True, slots=True)
class RoutingCounts:
    """Tokens and assignments by task, half of its requests, and expert. G tasks, E experts.

    Attributes:
        names: the tasks, or the groups of tasks.
        layers: number of the transformer layer of each sparse layer.
        top_k: experts of a token in each sparse layer.
        tokens: tokens that the model read, padding left out.
        assignments: for each sparse layer the (token, expert) pairs that were computed.
    """

    names: tuple[str, ...]
    layers: tuple[int, ...]
    top_k: tuple[int, ...]
    tokens: Int[np.ndarray, "G 2"]
    assignments: tuple[Int[np.ndarray, "G 2 _"], ...]

    @property
    def num_experts(self) -> tuple[int, ...]:
        """Experts of each sparse layer."""
        return tuple(counts.shape[-1] for counts in self.assignments)

    def pooled(self, groups: Mapping[str, Sequence[str]]) -> "RoutingCounts":
        """Return the counts of groups of tasks, all tokens of a group together.

        Args:
            groups: the tasks of each group.
        """
        places = {name: place for place, name in enumerate(self.names)}
        members = [[places[name] for name in names] for names in groups.values()]

        def summed(counts: np.ndarray) -> np.ndarray:
            rows = [counts[rows].sum(axis=0) for rows in members]
            return np.stack(rows) if rows else counts[:0]

        return RoutingCounts(
            names=tuple(groups),
            layers=self.layers,
            top_k=self.top_k,
            tokens=summed(self.tokens),
            assignments=tuple(map(summed, self.assignments)),
        )
