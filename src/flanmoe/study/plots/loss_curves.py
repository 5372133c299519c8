"""Training loss over tokens."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from flanmoe.study.arm_report import ArmReport, CurvePoint
from flanmoe.study.plots.figure import ARM_COLOURS, MARKERS, Drawing, arm_colour, new_figure
from flanmoe.study.report_data import ReportData
from flanmoe.study.report_text import short

LINE_STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_POINTS_WITHOUT_SMOOTHING = 40
_MOST_ARMS_IN_AXES = 4
_LEGEND_COLUMNS = 3


def loss_curves(data: ReportData) -> Drawing | None:
    """Training loss of every arm over tokens; None where no arm has a finite loss."""
    arms = [arm for arm in data.arms if _finite_points(arm)]
    if not arms:
        return None
    title = "Training loss over tokens"
    is_crowded = len(arms) > _MOST_ARMS_IN_AXES
    legend_rows = -(-len(arms) // _LEGEND_COLUMNS) if is_crowded else 0
    with new_figure("loss-curves", height=3.5 + 0.22 * legend_rows) as (figure, finish):
        axes = figure.subplots()
        for arm in arms:
            _draw_curves(axes, arm, data.arms.index(arm))
        axes.set(ylabel="loss (nats per token)")
        tokens_axis(axes)
        if is_crowded:
            figure.legend(loc="outside lower center", ncols=_LEGEND_COLUMNS, fontsize=9)
        else:
            axes.legend(loc="upper right")
        alt = "; ".join(_curve_in_words(arm) for arm in arms)
        return finish(
            title,
            f"{title}. {alt}.",
            "Thin lines are single steps, thick ones a running mean (where there are enough steps for one). "
            "Router losses are left out.",
        )


def tokens_axis(axes: Axes) -> None:
    """Let the horizontal axis be that of tokens trained on."""
    axes.set(xlabel="real tokens trained on")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _draw_curves(axes: Axes, arm: ArmReport, number: int) -> None:
    # One style further each time the colours start again, so that no two of 24 arms look the same.
    line_style = LINE_STYLES[(number + number // len(ARM_COLOURS)) % len(LINE_STYLES)]
    style = {"color": arm_colour(number), "linestyle": line_style}
    for position, curve in enumerate(arm.curves):
        points = [(point.tokens, point.loss) for point in curve.points if point.loss is not None]
        if not points:
            continue
        tokens, losses = np.array(points, dtype=float).T
        label = arm.label if position == 0 else None
        smooth = len(points) > _POINTS_WITHOUT_SMOOTHING
        if smooth:
            axes.plot(tokens, losses, color=style["color"], linewidth=0.7, alpha=0.35)
            tokens, losses = _running_mean(tokens, losses)
        marker = None if smooth else MARKERS[number % len(MARKERS)]
        axes.plot(
            tokens, losses, **style, linewidth=1.8, marker=marker, markersize=3.5, label=label
        )


def _running_mean(tokens: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over a window of a fifteenth of the points, placed at the window's middle."""
    width = max(3, len(losses) // 15)
    window = np.ones(width) / width
    return np.convolve(tokens, window, mode="valid"), np.convolve(losses, window, mode="valid")


def _tick(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g} M"
    return f"{value / 1e3:g} k" if abs(value) >= 1e3 else f"{value:g}"


def _finite_points(arm: ArmReport) -> list[CurvePoint]:
    return [point for curve in arm.curves for point in curve.points if point.loss is not None]


def _curve_in_words(arm: ArmReport) -> str:
    finite = _finite_points(arm)
    first, last = finite[0], finite[-1]
    return (
        f"{arm.label}: from {first.loss:.3f} to {last.loss:.3f} after {short(last.tokens)} tokens"
    )
