"""The picture of a routing report: tasks by experts for some layers, and distances between tasks."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, SubFigure

from flanmoe.evaluation.routing.report import Distances, Grouping, RoutingReport

_WIDTH = 16.0
_MOST_LAYERS = 4
_EXPERTS_SIDE_BY_SIDE = 16
_MOST_NUMBERS = 36
_INK, _MUTED, _PAPER = "#1f2328", "#59636e", "#ffffff"

# From less to more than tasks do on average; orders of lightness tell the two apart without hue.
_RELATIVE = LinearSegmentedColormap.from_list(
    "relative", ["#2b5c8a", "#8fb4d3", "#f7f4ee", "#e0955a", "#8c2f1e"]
)
_DISTANCE = LinearSegmentedColormap.from_list(
    "distance", ["#f7f4ee", "#e3c58d", "#c98452", "#8c4a4a"]
)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    # Without it every run draws other ids.
    "svg.hashsalt": "routing",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": _INK,
    # Names of tasks are no formulas.
    "text.parse_math": False,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.titlesize": 11,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def routing_svg(report: RoutingReport) -> str:
    """Draw a report as SVG; the same report gives the same text.

    Rows are tasks, or clusters where there are more than `MOST_ROWS` tasks. Of many layers the first, the
    middle one, the last, and the one that tells rows apart most are shown.

    Args:
        report: with at least one row.
    """
    stream = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = routing_figure(report)
        metadata = {"Date": None, "Creator": None, "Title": "Expert load by task"}
        figure.savefig(stream, format="svg", metadata=metadata)
    return stream.getvalue()


def routing_figure(report: RoutingReport) -> Figure:
    """Draw a report with matplotlib (see `routing_svg`)."""
    shown = report.shown
    num_rows = len(shown.rows)
    layers = _layers_shown(report)
    columns = (
        len(layers) if max(report.num_experts) <= _EXPERTS_SIDE_BY_SIDE else min(2, len(layers))
    )
    lines = -(-len(layers) // columns)
    heights = [lines * (0.28 * num_rows + 0.9) + 0.9]
    if num_rows > 1:
        heights.append(0.3 * num_rows + 1.9)
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    figure.patch.set_facecolor(_PAPER)
    panels = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)
    upper, *lower = panels.flat
    _draw_layers(upper, report, layers, shape=(lines, columns))
    for below in lower:
        _draw_distances(below, shown)
    return figure


def _layers_shown(report: RoutingReport) -> list[int]:
    """Places of the sparse layers that are drawn, in their order."""
    num_layers = len(report.layers)
    if num_layers <= _MOST_LAYERS:
        return list(range(num_layers))
    return sorted({0, num_layers // 2, num_layers - 1, *_most_specialised(report)})


def _most_specialised(report: RoutingReport) -> list[int]:
    means = report.shown.distances.layer_means
    return [int(np.argmax(means))] if means else []


def _draw_layers(
    panel: SubFigure, report: RoutingReport, layers: Sequence[int], *, shape: tuple[int, int]
) -> None:
    rows = report.shown.rows
    alone = len(rows) == 1
    even = "the even share" if alone else "its mean over the rows"
    panel.suptitle(
        f"Share of assignments that an expert gets, as a multiple of {even} (x: no token)",
        x=0.01,
        ha="left",
    )
    values = {place: np.log2(np.maximum(_times(report, place, alone), 1e-9)) for place in layers}
    strongest = max(float(np.abs(one[one > -20]).max(initial=0)) for one in values.values())
    limit = min(max(np.ceil(2 * strongest) / 2, 0.5), 3.0)
    grid = panel.subplots(*shape, squeeze=False, sharey=True)
    meshes: list[QuadMesh] = []
    for axes, place in zip(grid.flat, layers, strict=False):
        mesh = axes.pcolormesh(values[place], cmap=_RELATIVE, vmin=-limit, vmax=limit)
        meshes.append(mesh)
        # A picture inside the picture where thousands of cells would make the file slow.
        mesh.set_rasterized(values[place].size > 4096)
        _mark_unused(axes, report, place)
        most = " (tells rows apart most)" if place in _most_specialised(report) else ""
        axes.set_title(f"layer {report.layers[place]}{most}")
        axes.set(xlim=(0, report.num_experts[place]), ylim=(len(rows), 0), xlabel="expert")
        _number(axes, report.num_experts[place])
    for axes in grid.flat[len(layers) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_yticks(np.arange(len(rows)) + 0.5, _labels(report.shown))
    bar = panel.colorbar(
        meshes[0], ax=list(grid.flat), pad=0.01, aspect=_aspect(len(rows) * shape[0])
    )
    ticks = np.linspace(-limit, limit, 5)
    bar.set_ticks(list(ticks), labels=[f"\N{MULTIPLICATION SIGN}{2**tick:.2g}" for tick in ticks])


def _times(report: RoutingReport, place: int, alone: bool) -> np.ndarray:
    layers = [row.layers[place] for row in report.shown.rows]
    if alone:
        # With nothing to compare with, the measure is the even share.
        return np.array([layer.load for layer in layers]) * report.num_experts[place]
    return np.array([layer.relative_load for layer in layers])


def _mark_unused(axes: Axes, report: RoutingReport, place: int) -> None:
    counts = np.array([row.layers[place].counts for row in report.shown.rows])
    rows, experts = np.nonzero(counts == 0)
    axes.plot(experts + 0.5, rows + 0.5, linestyle="none", marker="x", color=_INK, markersize=4)


def _number(axes: Axes, size: int) -> None:
    step = -(-size // 16)
    places = range(0, size, step)
    axes.set_xticks([place + 0.5 for place in places], [str(place) for place in places])


def _draw_distances(panel: SubFigure, shown: Grouping) -> None:
    distances = np.array(shown.distances.mean)
    panel.suptitle(
        "Distance between rows by the experts that they use, mean over layers (Jensen-Shannon, 0 to 1)\n"
        "in brackets: no larger than between rows that use experts alike (`noise` in the JSON), or not known",
        x=0.01,
        ha="left",
    )
    axes = panel.subplots()
    num_rows = len(distances)
    mesh = axes.pcolormesh(distances, cmap=_DISTANCE, vmin=0)
    places = np.arange(num_rows) + 0.5
    axes.set_yticks(places, _labels(shown))
    axes.set_xticks(places, [str(number + 1) for number in range(num_rows)])
    axes.set_ylim(num_rows, 0)
    if num_rows <= _MOST_NUMBERS:
        _write_numbers(axes, shown.distances)
    panel.colorbar(mesh, ax=axes, pad=0.01, aspect=_aspect(num_rows))


def _write_numbers(axes: Axes, distances: Distances) -> None:
    darkest = max(map(max, distances.mean))
    for row, (values, expected) in enumerate(zip(distances.mean, distances.noise, strict=True)):
        for column, (value, floor) in enumerate(zip(values, expected, strict=True)):
            if row == column:
                continue
            text = f"{value:.2f}".removeprefix("0")
            if floor is None or value <= floor:
                text = f"({text})"
            colour = _PAPER if value > 0.75 * darkest else _INK
            axes.text(
                column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=9, color=colour
            )


def _labels(shown: Grouping) -> list[str]:
    return [
        f"{row.name}  {number}"
        if len(row.tasks) == 1
        else f"{row.name} ({len(row.tasks)} tasks)  {number}"
        for number, row in enumerate(shown.rows, start=1)
    ]


def _aspect(num_rows: int) -> float:
    """Height of a colour bar over its width, which is the same beside any number of rows."""
    return max(2.0 * num_rows, 8.0)
