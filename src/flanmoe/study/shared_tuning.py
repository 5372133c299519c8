"""Arms that are the same in something, since they share the stages that made it, are shown once."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from flanmoe.study.arm_report import ArmReport

_Item = TypeVar("_Item")


def alike(items: Sequence[_Item], what: Callable[[_Item], object]) -> list[list[_Item]]:
    """Put items together that are the same in `what`, in the order of the first of each."""
    found: list[tuple[object, list[_Item]]] = []
    for item in items:
        own = what(item)
        group = next((group for other, group in found if other == own), None)
        if group is None:
            found.append((own, [item]))
        else:
            group.append(item)
    return [group for _, group in found]


def counting(group: Sequence[ArmReport]) -> ArmReport:
    """Return the first arm of a group under a label that counts the others: `dense-zero_shot + 3`."""
    first, *others = group
    return first.model_copy(update={"label": f"{first.label} + {len(others)}"}) if others else first
