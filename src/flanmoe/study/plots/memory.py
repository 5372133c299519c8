"""Memory of training: estimate beside measurement."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from flanmoe.study.arm_report import ArmReport
from flanmoe.study.number_text import size
from flanmoe.study.plots.arm_groups import first_arms
from flanmoe.study.plots.figure import MUTED, PAPER, Drawing, new_figure
from flanmoe.study.report_data import ReportData

# Parts of the estimate: neither the colours of arms nor hue alone, and readable on light and dark.
_PART_COLOURS = ("#5b7083", "#8a9bab", "#a08458", "#6b8f71", "#9a7a94", "#7d7d7d", "#b5807a")
_HATCHES = ("", "//", "--", "xx", "\\\\", "++", "||")

_MOST_ARMS = 8


def memory(data: ReportData) -> Drawing | None:
    """Estimated memory, part by part, beside the measured peak; None where nothing was estimated.

    Of many arms the baseline, those that claims name, and those that need most.
    """
    there = [arm for arm in data.arms if arm.memory]
    if not there:
        return None
    arms, left_out = first_arms(
        data, _largest_first(there), _MOST_ARMS, what=lambda arm: arm.memory
    )
    more = f" {left_out} arms are left out; the table has all." if left_out else ""
    title = "Memory of training: estimate and measurement"
    with new_figure("memory", height=1.55 + 0.62 * len(arms)) as (figure, finish):
        axes = figure.subplots()
        parts = list(
            dict.fromkeys(part for arm in arms if arm.memory for part in arm.memory.estimate)
        )
        _draw_memory(axes, arms, parts)
        alt = "; ".join(_memory_in_words(arm) for arm in arms)
        return finish(
            title,
            f"{title}. {alt}.",
            "Upper bar: the estimate made before the run, by part. Lower bar: the peak that was measured."
            + more,
        )


def _largest_first(arms: Sequence[ArmReport]) -> Sequence[ArmReport]:
    if len(arms) <= _MOST_ARMS:
        return arms
    return sorted(arms, key=lambda arm: -arm.memory.estimate_total if arm.memory else 0)


def _draw_memory(axes: Axes, arms: Sequence[ArmReport], parts: Sequence[str]) -> None:
    for row, arm in enumerate(arms):
        if arm.memory is None:
            continue
        left = 0.0
        for number, part in enumerate(parts):
            width = arm.memory.estimate.get(part, 0) / 2**30
            axes.barh(
                row - 0.2,
                width,
                left=left,
                height=0.34,
                color=_PART_COLOURS[number % len(_PART_COLOURS)],
                hatch=_HATCHES[number % len(_HATCHES)],
                edgecolor=PAPER,
                linewidth=0.6,
                label=part if row == 0 else None,
            )
            left += width
        if arm.memory.measured:
            label = "measured peak" if row == 0 else None
            measured = arm.memory.measured / 2**30
            axes.barh(row + 0.2, measured, height=0.34, color=MUTED, label=label)
    axes.set_yticks(range(len(arms)), [arm.label for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("memory (GiB)")
    axes.figure.legend(loc="outside lower center", ncols=3, handlelength=1.6, columnspacing=1.2)


def _memory_in_words(arm: ArmReport) -> str:
    assert arm.memory is not None
    measured = size(arm.memory.measured) if arm.memory.measured else "not measured"
    return f"{arm.label}: estimate {size(arm.memory.estimate_total)}, measured {measured}"
