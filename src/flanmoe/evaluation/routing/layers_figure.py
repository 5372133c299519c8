"""The picture of every sparse layer: for each task the load of all experts, and how far tasks lie apart."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure, SubFigure

from flanmoe.evaluation.routing.figure import row_labels, times_usual, usual
from flanmoe.evaluation.routing.report import RoutingReport
from flanmoe.evaluation.routing.style import (
    INK,
    MUTED,
    RELATIVE,
    USUAL_SHARE,
    headline,
    heat_map,
    limit_of,
    number_columns,
    number_rows,
    stacked,
    svg_of,
    times_bar,
)

_APART = "#8c2f1e"
_LEAST_SCALE = 0.1


def layers_svg(report: RoutingReport) -> str:
    """Draw a report layer by layer as SVG; the same report gives the same text.

    Rows of the report are tasks, or clusters where there are too many tasks.

    Args:
        report: with at least one row.
    """
    return svg_of(lambda: layers_figure(report), title="Expert load by task and layer")


def layers_figure(report: RoutingReport) -> Figure:
    """Draw a report with matplotlib (see `layers_svg`)."""
    num_rows, num_layers = len(report.shown.rows), len(report.layers)
    columns = min(_columns(max(report.num_experts)), num_rows)
    lines = math.ceil(num_rows / columns)
    height = min(max(0.16 * num_layers, 0.9), 3.6) + 0.75
    heights = [lines * height + 0.6]
    if num_rows > 1:
        heights.append(3.2)
    figure, (upper, *lower) = stacked(heights)
    _draw_tasks(upper, report, shape=(lines, columns))
    for below in lower:
        _draw_distances(below, report)
    return figure


def _columns(num_experts: int) -> int:
    if num_experts <= 16:
        return 4
    return 3 if num_experts <= 64 else 2


def _draw_tasks(panel: SubFigure, report: RoutingReport, *, shape: tuple[int, int]) -> None:
    headline(
        panel,
        f"Share of a layer's assignments that an expert gets, as a multiple of {usual(report)}",
    )
    by_layer = [np.log2(np.maximum(one, 1e-9)) for one in _all_times(report)]
    limit = limit_of(by_layer, share=USUAL_SHARE)
    grid = panel.subplots(*shape, squeeze=False, sharex=True, sharey=True)
    meshes: list[QuadMesh] = []
    for place, (axes, label) in enumerate(zip(grid.flat, row_labels(report.shown), strict=False)):
        values = _task(by_layer, place)
        meshes.append(heat_map(axes, values, cmap=RELATIVE, vmin=-limit, vmax=limit))
        axes.set_title(_short(label), fontsize=10)
        number_columns(axes, range(values.shape[1]))
        number_rows(axes, report.layers, most=12)
    for axes in list(grid.flat)[len(meshes) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("layer")
    for column in range(shape[1]):
        _last_visible(grid[:, column]).set_xlabel("expert")
        _last_visible(grid[:, column]).tick_params(labelbottom=True)
    times_bar(panel, meshes[0], list(grid.flat), limit=limit, rows=8 * shape[0], goes_on=True)


def _last_visible(column: np.ndarray) -> Axes:
    return [axes for axes in column if axes.get_visible()][-1]


def _all_times(report: RoutingReport) -> list[np.ndarray]:
    return [times_usual(report, place) for place in range(len(report.layers))]


def _task(by_layer: list[np.ndarray], place: int) -> np.ndarray:
    """Return one task's values, layers by experts; layers with fewer experts end in nothing."""
    values = np.full((len(by_layer), max(one.shape[1] for one in by_layer)), np.nan)
    for layer, one in enumerate(by_layer):
        values[layer, : one.shape[1]] = one[place]
    return values


def _draw_distances(panel: SubFigure, report: RoutingReport) -> None:
    headline(
        panel,
        "Distance between rows by the experts that they use, mean over pairs (Jensen-Shannon, 0 to 1)",
    )
    axes = panel.subplots()
    distances = report.shown.distances
    places = np.arange(len(report.layers))
    axes.plot(places, distances.layer_means, color=_APART, marker="o", markersize=4, label="rows")
    expected = [np.nan if one is None else one for one in distances.layer_noise]
    axes.plot(
        places,
        expected,
        color=MUTED,
        linestyle="--",
        label="to be expected of rows that use experts alike",
    )
    # A scale that begins so wide does not make something of rounding.
    highest = max(_LEAST_SCALE, 1.05 * np.nanmax([*distances.layer_means, *expected, 0]))
    axes.set(ylim=(0, highest), xlim=(-0.5, len(places) - 0.5), xlabel="layer")
    step = math.ceil(len(places) / 24)
    axes.set_xticks(places[::step], [str(layer) for layer in report.layers[::step]])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=INK, alpha=0.12)
    axes.legend(frameon=False, loc="best")


def _short(label: str, *, most: int = 44) -> str:
    return label if len(label) <= most else f"\N{HORIZONTAL ELLIPSIS}{label[1 - most :]}"
