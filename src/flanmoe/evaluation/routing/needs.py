"""Which experts tasks need, and how many of them other tasks need too.

A task needs the fewest experts of a layer that hold a given share of its gate mass, as in expert-specialised
fine-tuning (`flanmoe.tuners.expert_selection`). Where router gates of the chosen experts are not renormalised,
tokens that the router is sure of weigh more. G tasks, E experts.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from flanmoe.core.config import Config
from flanmoe.tuners.expert_selection import smallest_set

_DIGITS = 5

DEFINITIONS = {
    "experts": "for each sparse layer and task the fewest experts that hold `share` of the task's gate mass, "
    "the largest first (as ESFT-Gate chooses, arXiv 2407.01906, section 3.3, with means over tokens)",
    "numbers": "how many these are",
    "overlap": "of the experts that the task of the row needs, over all layers, the share that the task of the "
    "column needs too; on the diagonal: of those that one random half of the task's examples needs, the share "
    "that the other half needs too, mean of both ways; null where a half is empty",
    "alone": "of the experts that the task needs, the share that no other task needs",
}

# The experts that each task needs, layer by layer.
_Sets = list[list[frozenset[int]]]


class Needs(Config):
    """Which experts each task needs; see `DEFINITIONS`.

    Attributes:
        share: of the gate mass that the needed experts hold.
        names: the tasks.
        experts: for each sparse layer and task.
        numbers: for each sparse layer and task.
        overlap: task by task.
        alone: for each task.
    """

    share: float
    names: tuple[str, ...]
    experts: tuple[tuple[tuple[int, ...], ...], ...]
    numbers: tuple[tuple[int, ...], ...]
    overlap: tuple[tuple[float | None, ...], ...]
    alone: tuple[float, ...]

    def times_needed(self, place: int, num_experts: int) -> list[int]:
        """Return for each expert of a sparse layer how many tasks need it."""
        wanted = [expert for task in self.experts[place] for expert in task]
        return np.bincount(wanted, minlength=num_experts).tolist()


def needs(
    names: Sequence[str], gate_mass: Sequence[Float[np.ndarray, "G 2 _"]], *, share: float
) -> Needs:
    """Return what tasks need.

    Args:
        names: of the tasks.
        gate_mass: for each sparse layer the gates of each task's halves, summed by expert.
        share: above 0 and at most 1.
    """
    whole = [layer.sum(axis=1) for layer in gate_mass]
    needed = [[needed_experts(task, share) for task in layer] for layer in whole]
    halves = [
        [[frozenset(needed_experts(half, share)) for half in task] for task in layer]
        for layer in gate_mass
    ]
    sets = [[frozenset(experts) for experts in layer] for layer in needed]
    return Needs(
        share=share,
        names=tuple(names),
        experts=tuple(map(tuple, needed)),
        numbers=tuple(tuple(map(len, layer)) for layer in needed),
        overlap=tuple(
            tuple(
                _overlap_of_halves([layer[row] for layer in halves])
                if row == column
                else _shared(sets, row, column)
                for column in range(len(names))
            )
            for row in range(len(names))
        ),
        alone=tuple(_alone(sets, row) for row in range(len(names))),
    )


def needed_experts(gate_mass: Float[np.ndarray, " E"], share: float) -> tuple[int, ...]:
    """Return the fewest experts that hold a share of gate mass, the largest first; none where there is none."""
    total = gate_mass.sum()
    if not total > 0:
        return ()
    chosen = smallest_set(torch.from_numpy(gate_mass / total), share)
    return tuple(sorted(chosen, key=lambda expert: -gate_mass[expert]))


def _shared(sets: _Sets, row: int, column: int) -> float:
    both = sum(len(layer[row] & layer[column]) for layer in sets)
    return round(both / max(sum(len(layer[row]) for layer in sets), 1), _DIGITS)


def _overlap_of_halves(layers: Sequence[Sequence[frozenset[int]]]) -> float | None:
    sizes = [sum(len(layer[half]) for layer in layers) for half in (0, 1)]
    if not all(sizes):
        return None
    both = sum(len(first & second) for first, second in layers)
    return round(both * (1 / sizes[0] + 1 / sizes[1]) / 2, _DIGITS)


def _alone(sets: _Sets, row: int) -> float:
    alone = 0
    for layer in sets:
        others = frozenset().union(*(own for task, own in enumerate(layer) if task != row))
        alone += len(layer[row] - others)
    return round(alone / max(sum(len(layer[row]) for layer in sets), 1), _DIGITS)
