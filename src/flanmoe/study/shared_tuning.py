"""Arms that are the same in something, since they share the stages that made it, are shown once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flanmoe.study.arm_report import ArmReport


@dataclass(frozen=True, slots=True)
class Alike:
    """Arms that have the same.

    Attributes:
        arm: the first of them.
        others: labels of the others.
    """

    arm: ArmReport
    others: tuple[str, ...]

    @property
    def counting(self) -> ArmReport:
        """The first arm under a label that counts the others: `dense-zero_shot + 3`."""
        if not self.others:
            return self.arm
        return self.arm.model_copy(update={"label": f"{self.arm.label} + {len(self.others)}"})


def alike(arms: Sequence[ArmReport], what: Callable[[ArmReport], object]) -> list[Alike]:
    """Put arms together that are the same in `what`, in the order of the first of each."""
    found: list[Alike] = []
    for arm in arms:
        same = next((place for place, one in enumerate(found) if what(one.arm) == what(arm)), None)
        if same is None:
            found.append(Alike(arm, ()))
        else:
            found[same] = Alike(found[same].arm, (*found[same].others, arm.label))
    return found
