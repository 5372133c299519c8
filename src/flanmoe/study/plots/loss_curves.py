"""Training loss over tokens, and over floating-point operations where these were counted."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from flanmoe.study.arm_report import ArmReport, CurvePoint, LossCurve
from flanmoe.study.number_text import short
from flanmoe.study.plots.arm_groups import MOST_TOGETHER, arm_groups, first_arms
from flanmoe.study.plots.curve_series import Cost, Series, series
from flanmoe.study.plots.figure import MARKERS, MUTED, Drawing, Finish, arm_colour, new_figure
from flanmoe.study.report_data import ReportData

LINE_STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_MOST_ARMS = 6 * MOST_TOGETHER
_MOST_ARMS_IN_AXES = 4
_LEGEND_COLUMNS = 3
_MOST_MARKERS = 6
_LONGEST_IN_THREE, _LONGEST_IN_TWO = 21, 34


def loss_curves(data: ReportData) -> Drawing | None:
    """Training loss of every arm over what it cost; None where no arm has a finite loss.

    Of several seeds the mean, with a band over all. More arms than colours have a row of panels a group.
    """
    there = [arm for arm in data.arms if _finite_points(arm)]
    if not there:
        return None
    arms, left_out = first_arms(data, there, _MOST_ARMS, what=_curves)
    counted = any(series(arm, "flops") for arm in arms)
    costs: tuple[Cost, ...] = ("tokens", "flops") if counted else ("tokens",)
    draw = _together if len(arms) <= MOST_TOGETHER else _in_groups
    is_shared = len(arms) + left_out < len(there)
    return draw(data, arms, costs, _caption(arms, left_out, is_shared=is_shared))


def _together(
    data: ReportData, arms: Sequence[ArmReport], costs: Sequence[Cost], caption: str
) -> Drawing:
    is_crowded = len(arms) > _MOST_ARMS_IN_AXES
    legend_rows = -(-len(arms) // _LEGEND_COLUMNS) if is_crowded else 0
    height = (3.5 if len(costs) == 1 else 5.4) + 0.22 * legend_rows
    with new_figure("loss-curves", height=height) as (figure, finish):
        panels = figure.subplots(len(costs), 1, squeeze=False, sharey=True)[:, 0]
        every = list(map(_curves, data.arms))
        numbers = [every.index(arm.curves) for arm in arms]
        for axes, cost in zip(panels, costs, strict=True):
            for arm, number in zip(arms, numbers, strict=True):
                _draw_arm(axes, arm, cost, number)
            _name_axes(axes, cost)
        if is_crowded:
            handles, labels = panels[0].get_legend_handles_labels()
            style = {"ncols": _LEGEND_COLUMNS, "fontsize": 9}
            figure.legend(handles, labels, loc="outside lower center", **style)
        else:
            panels[0].legend(loc="upper right")
        return _finish(finish, arms, costs, caption)


def _in_groups(
    data: ReportData, arms: Sequence[ArmReport], costs: Sequence[Cost], caption: str
) -> Drawing:
    groups = arm_groups(arms)
    legends = [legend_columns(group) for group in groups]
    heights = [
        1.7 + 0.17 * -(-(len(group) + 1) // columns)
        for group, columns in zip(groups, legends, strict=True)
    ]
    with new_figure("loss-curves", height=sum(heights)) as (figure, finish):
        rows = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
        left: list[Axes] = []
        for row, group, columns in zip(rows, groups, legends, strict=True):
            panels = row.subplots(1, len(costs), squeeze=False, sharey=True)[0]
            left.append(panels[0])
            for axes, cost in zip(panels, costs, strict=True):
                _draw_group(axes, data, group, cost)
                _name_axes(axes, cost, narrow=True)
            panels[-1].yaxis.label.set_visible(len(panels) == 1)
            handles, labels = panels[0].get_legend_handles_labels()
            style = {"ncols": columns, "fontsize": 7.5, "columnspacing": 1.0}
            row.legend(handles, labels, loc="outside lower center", handlelength=1.6, **style)
        # Set, not shared: matplotlib draws a figure anew for each axis that parts of it share.
        ends = [axes.get_ylim() for axes in left]
        for axes in left:
            axes.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
        caption += " Grey, in every group: the baseline."
        return _finish(finish, arms, costs, caption)


def legend_columns(group: Sequence[ArmReport]) -> int:
    """Return how many names stand side by side in a legend: long ones need wide columns."""
    longest = max(len(arm.label) for arm in group)
    return (
        _LEGEND_COLUMNS if longest <= _LONGEST_IN_THREE else 2 if longest <= _LONGEST_IN_TWO else 1
    )


def _finish(
    finish: Finish, arms: Sequence[ArmReport], costs: Sequence[Cost], caption: str
) -> Drawing:
    title = "Training loss over tokens" + (" and training FLOPs" if "flops" in costs else "")
    alt = "; ".join(_curve_in_words(arm) for arm in arms)
    return finish(title, f"{title}. {alt}.", caption)


def _caption(arms: Sequence[ArmReport], left_out: int, *, is_shared: bool) -> str:
    found = [one for arm in arms if (one := series(arm, "tokens"))]
    words: list[str] = []
    if any(one.low is not None for one in found):
        words.append(
            "Lines are means over seeds, bands reach from the lowest to the highest; they end where the first "
            "seed has no finite loss any more."
        )
    if any(one.steps is not None for one in found):
        words.append("Thin lines are single steps, thick ones a running mean.")
    elif any(one.smoothed for one in found):
        words.append("Losses of single steps are smoothed by a running mean.")
    words.append("Router losses are left out.")
    if is_shared:
        words.append("Arms that share their training are one line (+ 3: of three more arms).")
    if left_out:
        words.append(f"{left_out} arms that no claim names are left out.")
    return " ".join(words)


def tokens_axis(axes: Axes) -> None:
    """Let the horizontal axis be that of tokens trained on."""
    _cost_axis(axes, "real tokens trained on")


def _cost_axis(axes: Axes, label: str) -> None:
    axes.set(xlabel=label)
    axes.xaxis.set_major_formatter(EngFormatter())


def _name_axes(axes: Axes, cost: Cost, *, narrow: bool = False) -> None:
    labels: dict[Cost, str] = {"tokens": "real tokens trained on", "flops": "training FLOPs"}
    _cost_axis(axes, labels[cost])
    axes.set(ylabel="loss (nats per token)")
    if narrow:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_fontsize(8.5)
        axes.yaxis.label.set_fontsize(8.5)


def _draw_group(axes: Axes, data: ReportData, group: Sequence[ArmReport], cost: Cost) -> None:
    baseline = data.baseline_arm
    line = series(baseline, cost)
    if baseline.curves not in map(_curves, group) and line is not None:
        style = {"color": MUTED, "linewidth": 1.2, "linestyle": LINE_STYLES[1]}
        axes.plot(line.spent, line.loss, label=baseline.label, **style)
    for number, arm in enumerate(group):
        _draw_arm(axes, arm, cost, number, width=1.4)


def _draw_arm(axes: Axes, arm: ArmReport, cost: Cost, number: int, *, width: float = 1.8) -> None:
    line = series(arm, cost)
    if line is None:
        return
    colour = arm_colour(number)
    if line.steps is not None:
        axes.plot(*line.steps, color=colour, linewidth=0.7, alpha=0.35)
    if line.low is not None and line.high is not None:
        axes.fill_between(line.spent, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(
        line.spent,
        line.loss,
        color=colour,
        linestyle=LINE_STYLES[number % len(LINE_STYLES)],
        linewidth=width,
        marker=_marker(line, number),
        markevery=max(len(line.spent) // _MOST_MARKERS, 1),
        markersize=3.5,
        label=arm.label,
    )


def _curves(arm: ArmReport) -> tuple[LossCurve, ...]:
    return arm.curves


def _marker(line: Series, number: int) -> str | None:
    return None if line.smoothed else MARKERS[number % len(MARKERS)]


def _finite_points(arm: ArmReport) -> list[CurvePoint]:
    return [point for curve in arm.curves for point in curve.points if point.loss is not None]


def _curve_in_words(arm: ArmReport) -> str:
    curves = [[point for point in curve.points if point.loss is not None] for curve in arm.curves]
    ends = [(points[0], points[-1]) for points in curves if points]
    first, last = (sum(pair[place].loss or 0.0 for pair in ends) / len(ends) for place in (0, 1))
    tokens = short(max(end.tokens for _, end in ends))
    flops = [end.flops for _, end in ends if end.flops is not None]
    spent = f"{tokens} tokens" + (f" and {short(max(flops))} FLOPs" if flops else "")
    seeds = f", mean of {len(ends)} seeds" if len(ends) > 1 else ""
    return f"{arm.label}: from {first:.3f} to {last:.3f} after {spent}{seeds}"
