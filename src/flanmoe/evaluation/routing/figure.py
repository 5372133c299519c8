"""The picture of a routing report: tasks by experts for some layers, and distances between tasks."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure, SubFigure

from flanmoe.evaluation.routing.report import Distances, Grouping, RoutingReport
from flanmoe.evaluation.routing.style import (
    AMOUNT,
    INK,
    MOST_LAYERS,
    PAPER,
    RELATIVE,
    bar_aspect,
    headline,
    heat_map,
    limit_of,
    number_columns,
    stacked,
    svg_of,
    times_bar,
)

_EXPERTS_SIDE_BY_SIDE = 16
_MOST_NUMBERS = 36


def routing_svg(report: RoutingReport) -> str:
    """Draw a report as SVG; the same report gives the same text.

    Rows are tasks, or clusters where there are more than `MOST_ROWS` tasks. Of many layers the first, the
    middle one, the last, and the one that tells rows apart most are shown.

    Args:
        report: with at least one row.
    """
    return svg_of(lambda: routing_figure(report), title="Expert load by task")


def routing_figure(report: RoutingReport) -> Figure:
    """Draw a report with matplotlib (see `routing_svg`)."""
    shown = report.shown
    num_rows = len(shown.rows)
    layers = layers_shown(report)
    columns = (
        len(layers) if max(report.num_experts) <= _EXPERTS_SIDE_BY_SIDE else min(2, len(layers))
    )
    lines = -(-len(layers) // columns)
    heights = [lines * (0.28 * num_rows + 0.9) + 0.9]
    if num_rows > 1:
        heights.append(0.3 * num_rows + 1.9)
    figure, (upper, *lower) = stacked(heights)
    _draw_layers(upper, report, layers, shape=(lines, columns))
    for below in lower:
        _draw_distances(below, shown)
    return figure


def layers_shown(report: RoutingReport) -> list[int]:
    """Return the places of the sparse layers that stand for all: of many the first, the middle one, the last,
    and the one that tells rows apart most."""
    num_layers = len(report.layers)
    if num_layers <= MOST_LAYERS:
        return list(range(num_layers))
    return sorted({0, num_layers // 2, num_layers - 1, *_most_specialised(report)})


def times_usual(report: RoutingReport, place: int) -> Float[np.ndarray, "G E"]:
    """Return the loads of one sparse layer, row by row, as multiples of what is usual.

    That is the expert's mean over the rows, or of a single row the even share.
    """
    layers = [row.layers[place] for row in report.shown.rows]
    if len(layers) == 1:
        return np.array([layer.load for layer in layers]) * report.num_experts[place]
    return np.array([layer.relative_load for layer in layers])


def usual(report: RoutingReport) -> str:
    """Say what `times_usual` gives multiples of."""
    return "the even share" if len(report.shown.rows) == 1 else "its mean over the rows"


def _most_specialised(report: RoutingReport) -> list[int]:
    means = report.shown.distances.layer_means
    return [int(np.argmax(means))] if means else []


def _draw_layers(
    panel: SubFigure, report: RoutingReport, layers: Sequence[int], *, shape: tuple[int, int]
) -> None:
    rows = report.shown.rows
    headline(
        panel,
        f"Share of assignments that an expert gets, as a multiple of {usual(report)} (x: no token)",
    )
    values = {place: np.log2(np.maximum(times_usual(report, place), 1e-9)) for place in layers}
    limit = limit_of(list(values.values()))
    grid = panel.subplots(*shape, squeeze=False, sharey=True)
    meshes: list[QuadMesh] = []
    for axes, place in zip(grid.flat, layers, strict=False):
        meshes.append(heat_map(axes, values[place], cmap=RELATIVE, vmin=-limit, vmax=limit))
        _mark_unused(axes, report, place)
        most = " (tells rows apart most)" if place in _most_specialised(report) else ""
        axes.set_title(f"layer {report.layers[place]}{most}")
        axes.set_xlabel("expert")
        number_columns(axes, range(report.num_experts[place]))
    for axes in grid.flat[len(layers) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_yticks(np.arange(len(rows)) + 0.5, row_labels(report.shown))
    times_bar(panel, meshes[0], list(grid.flat), limit=limit, rows=len(rows) * shape[0])


def _mark_unused(axes: Axes, report: RoutingReport, place: int) -> None:
    counts = np.array([row.layers[place].counts for row in report.shown.rows])
    rows, experts = np.nonzero(counts == 0)
    axes.plot(experts + 0.5, rows + 0.5, linestyle="none", marker="x", color=INK, markersize=4)


def _draw_distances(panel: SubFigure, shown: Grouping) -> None:
    distances = np.array(shown.distances.mean)
    headline(
        panel,
        "Distance between rows by the experts that they use, mean over layers (Jensen-Shannon, 0 to 1)\n"
        "in brackets: no larger than between rows that use experts alike (`noise` in the JSON), or not known",
    )
    axes = panel.subplots()
    num_rows = len(distances)
    mesh = axes.pcolormesh(distances, cmap=AMOUNT, vmin=0)
    places = np.arange(num_rows) + 0.5
    axes.set_yticks(places, row_labels(shown))
    axes.set_xticks(places, [str(number + 1) for number in range(num_rows)])
    axes.set_ylim(num_rows, 0)
    if num_rows <= _MOST_NUMBERS:
        _write_numbers(axes, shown.distances)
    panel.colorbar(mesh, ax=axes, pad=0.01, aspect=bar_aspect(num_rows))


def _write_numbers(axes: Axes, distances: Distances) -> None:
    darkest = max(map(max, distances.mean))
    for row, (values, expected) in enumerate(zip(distances.mean, distances.noise, strict=True)):
        for column, (value, floor) in enumerate(zip(values, expected, strict=True)):
            if row == column:
                continue
            text = f"{value:.2f}".removeprefix("0")
            if floor is None or value <= floor:
                text = f"({text})"
            colour = PAPER if value > 0.75 * darkest else INK
            axes.text(
                column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=9, color=colour
            )


def row_labels(shown: Grouping) -> list[str]:
    """Return the name and number of each row, of a cluster with its number of tasks."""
    return [
        f"{row.name}  {number}"
        if len(row.tasks) == 1
        else f"{row.name} ({len(row.tasks)} tasks)  {number}"
        for number, row in enumerate(shown.rows, start=1)
    ]
