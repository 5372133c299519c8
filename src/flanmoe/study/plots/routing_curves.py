"""How even the load of the experts was in the course of training."""

import numpy as np
from matplotlib.axes import Axes

from flanmoe.study.arm_report import ArmReport
from flanmoe.study.number_text import percent
from flanmoe.study.plots.figure import MUTED, Drawing, arm_colour, new_figure
from flanmoe.study.plots.loss_curves import LINE_STYLES, legend_columns, tokens_axis
from flanmoe.study.report_data import ReportData
from flanmoe.study.shared_tuning import alike, counting

_MOST_ARMS = 6


def routing_curves(data: ReportData) -> Drawing | None:
    """Entropy of the load over tokens; None where no arm is sparse. Of many arms the most uneven."""
    numbers = {arm.label: number for number, arm in enumerate(data.arms)}
    there = {
        numbers[group[0].label]: counting(group)
        for group in alike(data.arms, lambda arm: arm.routing_curve)
        if group[0].routing_curve
    }
    if not there:
        return None
    worst = sorted(there, key=lambda number: there[number].routing_curve[-1].worst)[:_MOST_ARMS]
    shown = {number: there[number] for number in sorted(worst)}
    title = "Evenness of the expert load over tokens"
    columns = legend_columns(list(shown.values()))
    height = 3.0 + 0.22 * -(-len(shown) // columns)
    with new_figure("routing-curves", height=height) as (figure, finish):
        axes = figure.subplots()
        for number, arm in shown.items():
            _draw_arm(axes, arm, number)
        axes.axhline(100, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)))
        axes.set(ylabel="entropy of the load (% of even)")
        tokens_axis(axes)
        figure.legend(loc="outside lower center", ncols=columns, fontsize=9)
        alt = "; ".join(_in_words(arm) for arm in shown.values())
        left_out = len(there) - len(shown)
        more = f" {left_out} more even arms are left out." if left_out else ""
        return finish(
            title,
            f"{title}. {alt}.",
            "Thick: mean over layers. Thin: the most uneven layer of each step. 100 % is even use; a single "
            f"step of few tokens lies below it by chance.{more}",
        )


def _draw_arm(axes: Axes, arm: ArmReport, number: int) -> None:
    points = [(point.tokens, point.mean, point.worst) for point in arm.routing_curve]
    tokens, mean, worst = np.array(points, dtype=float).T
    style = {"color": arm_colour(number), "linestyle": LINE_STYLES[number % len(LINE_STYLES)]}
    axes.plot(tokens, 100 * mean, linewidth=1.8, label=arm.label, **style)
    axes.plot(tokens, 100 * worst, linewidth=0.8, color=style["color"], alpha=0.8)


def _in_words(arm: ArmReport) -> str:
    first, last = arm.routing_curve[0], arm.routing_curve[-1]
    return (
        f"{arm.label}: mean over layers from {percent(first.mean)} to {percent(last.mean)}, most uneven layer "
        f"from {percent(first.worst)} to {percent(last.worst)}"
    )
