"""Which of many arms are one line or picture, share a panel, and come first where not all can be shown."""

import re
from collections.abc import Callable, Sequence

from flanmoe.study.arm_report import ArmReport
from flanmoe.study.plots.figure import ARM_COLOURS
from flanmoe.study.report_data import ReportData
from flanmoe.study.shared_tuning import alike, counting

# As many as there are colours: one more, and two lines of a panel look alike.
MOST_TOGETHER = len(ARM_COLOURS)


def arm_groups(arms: Sequence[ArmReport]) -> list[list[ArmReport]]:
    """Split arms into groups of at most `MOST_TOGETHER`.

    Arms whose labels begin with the same word (`dense-direct`, `dense-flan`) stay together where they fit, and
    are split evenly where they do not.
    """
    families: dict[str, list[ArmReport]] = {}
    for arm in arms:
        families.setdefault(_first_word(arm), []).append(arm)
    groups: list[list[ArmReport]] = []
    for family in families.values():
        if groups and len(groups[-1]) + len(family) <= MOST_TOGETHER:
            groups[-1] += family
            continue
        num_parts = -(-len(family) // MOST_TOGETHER)
        size = -(-len(family) // num_parts)
        groups += [family[start : start + size] for start in range(0, len(family), size)]
    return groups


def first_arms(
    data: ReportData, arms: Sequence[ArmReport], most: int, *, what: Callable[[ArmReport], object]
) -> tuple[list[ArmReport], int]:
    """Return at most so many of these arms, in their order, and how many are left out.

    The baseline comes first, then those that claims name.

    Args:
        data: the report.
        arms: some of its arms.
        most: how many can be shown.
        what: what is shown of an arm; arms that are the same in it are one (`shared_tuning`).
    """
    named = {
        name for claim in data.claims for match in claim.budgets for name in (match.arm, match.twin)
    }
    baseline = data.baseline_arm.label
    ranked = sorted(arms, key=lambda arm: (arm.label != baseline, arm.label not in named))
    distinct = alike(ranked, what)
    kept = {group[0].label: counting(group) for group in distinct[:most]}
    left_out = sum(map(len, distinct[most:]))
    return [kept[arm.label] for arm in arms if arm.label in kept], left_out


def _first_word(arm: ArmReport) -> str:
    return re.split(r"[-_/. ]", arm.label, maxsplit=1)[0]
