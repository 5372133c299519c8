"""Which questions a limited evaluation asks."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from flanmoe.core.errors import ConfigError
from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import Example
from flanmoe.data.tasks import without_format


class Drawable(Protocol):
    """A named sequence of examples: a `Task`, the questions of a few-shot task."""

    @property
    def name(self) -> str:
        """Name that draws depend on."""
        ...

    @property
    def size(self) -> int:
        """Number of examples."""
        ...

    @property
    def examples(self) -> Sequence[Example]:
        """The examples."""
        ...


def limited(
    tasks: Sequence[Drawable], limit: int | None, *, seeds: SeedTree
) -> list[list[Example]]:
    """Return the examples of each task that a limited evaluation uses, in the order of the task.

    Raises:
        ConfigError: if the limit is below the number of tasks.
    """
    if limit is None:
        return [list(task.examples) for task in tasks]
    check_limit(len(tasks), limit)
    counts = shares([task.size for task in tasks], limit)
    return [
        [task.examples[index] for index in drawn_rows(task.name, task.size, count, seeds=seeds)]
        for task, count in zip(tasks, counts, strict=True)
    ]


def shares(sizes: Sequence[int], limit: int) -> list[int]:
    """Share `limit` out evenly: what a small task cannot use goes to the others, larger ones first.

    No share is larger than its size; shares below their size differ by at most one; none shrinks
    when the limit grows.
    """
    counts = [0] * len(sizes)
    left = limit
    for place, index in enumerate(sorted(range(len(sizes)), key=lambda index: sizes[index])):
        counts[index] = min(sizes[index], left // (len(sizes) - place))
        left -= counts[index]
    return counts


def drawn_rows(name: str, size: int, count: int, *, seeds: SeedTree) -> list[int]:
    """Draw rows of a task, ascending; a larger count keeps the rows of a smaller one.

    However the task is put, the rows are the same, so that models and prompts can be compared on them.
    """
    # The head of one fixed order.
    order = seeds.child("limit").child(without_format(name)).numpy().permutation(size)
    return np.sort(order[:count]).tolist()


def check_limit(num_tasks: int, limit: int | None, *, group: str = "") -> None:
    """Refuse a limit that leaves a task without an example.

    Args:
        num_tasks: tasks that share it.
        limit: most examples, None for all.
        group: the group whose tasks they are, for the message.

    Raises:
        ConfigError: if there are more tasks than examples.
    """
    if limit is not None and limit < num_tasks:
        of_group = f" of `{group}`" if group else ""
        raise ConfigError(
            f"`limit` must be at least one example for each of the {num_tasks} tasks{of_group}, but is "
            f"{limit}. Raise it, or name fewer tasks."
        )
