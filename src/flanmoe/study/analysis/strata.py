"""The layout of examples: which tasks they belong to, what each counts, and what is drawn anew together.

Tasks count alike (a macro-average) and are taken as given, so examples are drawn anew within their
task. A task of one example leaves nothing to draw from; such tasks are drawn anew together (collapsed strata,
Cochran 1977, section 5A.12), which errs on the side of a wider interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, slots=True)
class Strata:
    """Where the strata lie in a row of N examples. H strata, one after the other.

    Attributes:
        starts: index of the first example of each.
        sizes: examples of each; at least two, unless there is one example in all.
        weights: what each example counts in the average, 1 / (tasks x examples of its task).
    """

    starts: Int[np.ndarray, " H"]
    sizes: Int[np.ndarray, " H"]
    weights: Float[np.ndarray, " N"]

    @property
    def of_example(self) -> Int[np.ndarray, " N"]:
        """The stratum of each example."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where each stratum lies."""
        return tuple(
            slice(int(start), int(start + size))
            for start, size in zip(self.starts, self.sizes, strict=True)
        )

    def sums(self, values: Float[np.ndarray, "*any N"]) -> Float[np.ndarray, "*any H"]:
        """Sum over the examples of each stratum."""
        return np.add.reduceat(values, self.starts, axis=-1)

    def means(self, values: Float[np.ndarray, "*any N"]) -> Float[np.ndarray, "*any H"]:
        """Mean over the examples of each stratum."""
        return self.sums(values) / self.sizes


def stratify(task_sizes: Sequence[int]) -> tuple[tuple[int, ...], Strata]:
    """Lay out tasks of these sizes.

    Returns:
        The order in which the tasks have to stand, as indices, and their strata.
    """
    groups = _groups(task_sizes)
    order = tuple(task for group in groups for task in group)
    sizes = np.asarray([sum(task_sizes[task] for task in group) for group in groups])
    weights = [1 / (len(task_sizes) * task_sizes[task]) for task in order]
    return order, Strata(
        starts=np.concatenate([[0], np.cumsum(sizes)[:-1]]),
        sizes=sizes,
        weights=np.repeat(weights, [task_sizes[task] for task in order]),
    )


def _groups(task_sizes: Sequence[int]) -> list[list[int]]:
    groups = [[task] for task, size in enumerate(task_sizes) if size > 1]
    single = [task for task, size in enumerate(task_sizes) if size == 1]
    if len(single) == 1 and groups:
        min(groups, key=lambda group: task_sizes[group[0]]).extend(single)
    elif single:
        groups.append(single)
    return groups
