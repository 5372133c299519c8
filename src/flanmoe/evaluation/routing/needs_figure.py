"""The picture of which experts tasks need: by layer and expert, how many, and how many they share."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from flanmoe.evaluation.routing.needs import Needs
from flanmoe.evaluation.routing.style import (
    AMOUNT,
    INK,
    PAPER,
    bar_aspect,
    headline,
    heat_map,
    number_columns,
    number_rows,
    stacked,
    svg_of,
)

_MOST_NUMBERED = 32
_MOST_TICKS = 12


def needs_svg(needs: Needs, *, layers: Sequence[int], num_experts: Sequence[int]) -> str:
    """Draw what tasks need as SVG; the same numbers give the same text.

    Args:
        needs: of at least one task.
        layers: number of the transformer layer of each sparse layer.
        num_experts: of each sparse layer.
    """
    return svg_of(
        lambda: needs_figure(needs, layers=layers, num_experts=num_experts),
        title="Experts that tasks need",
    )


def needs_figure(needs: Needs, *, layers: Sequence[int], num_experts: Sequence[int]) -> Figure:
    """Draw what tasks need with matplotlib (see `needs_svg`)."""
    num_tasks = len(needs.names)
    heights = [min(max(0.2 * len(layers), 0.9), 5.0) + 1.1, 0.3 * num_tasks + 1.3]
    if num_tasks > 1:
        heights.append(0.3 * num_tasks + 1.7)
    figure, (experts, numbers, *lower) = stacked(heights)
    _draw_experts(experts, needs, layers, num_experts)
    _draw_numbers(numbers, needs, layers)
    for below in lower:
        _draw_overlap(below, needs)
    return figure


def _draw_experts(
    panel: SubFigure, needs: Needs, layers: Sequence[int], num_experts: Sequence[int]
) -> None:
    headline(
        panel,
        f"How many of the {len(needs.names)} tasks need an expert: it is among the fewest that hold "
        f"{100 * needs.share:g} % of a task's gate mass in its layer",
    )
    axes = panel.subplots()
    values = np.full((len(layers), max(num_experts)), np.nan)
    for place, experts in enumerate(num_experts):
        values[place, :experts] = needs.times_needed(place, experts)
    most = len(needs.names)
    # One colour a number.
    norm = BoundaryNorm(np.arange(-0.5, most + 1), AMOUNT.N)
    mesh = heat_map(axes, values, cmap=AMOUNT, norm=norm)
    number_columns(axes, range(values.shape[1]), most=_MOST_NUMBERED)
    number_rows(axes, layers)
    axes.set(xlabel="expert", ylabel="layer")
    step = -(-most // _MOST_TICKS)
    bar = panel.colorbar(mesh, ax=axes, pad=0.01, aspect=bar_aspect(len(layers) // 2))
    bar.set_ticks(list(range(0, most + 1, step)))
    bar.ax.minorticks_off()


def _draw_numbers(panel: SubFigure, needs: Needs, layers: Sequence[int]) -> None:
    headline(panel, "How many experts each task needs in a layer")
    axes = panel.subplots()
    values = np.array(needs.numbers, dtype=np.float64).T
    mesh = heat_map(axes, values, cmap=AMOUNT)
    axes.set_yticks(np.arange(len(needs.names)) + 0.5, list(needs.names))
    number_columns(axes, layers, most=_MOST_NUMBERED)
    axes.set_xlabel("layer")
    if len(layers) <= _MOST_NUMBERED:
        _write(axes, mesh, values, [[f"{value:.0f}" for value in row] for row in values])
    whole = MaxNLocator(integer=True)
    panel.colorbar(mesh, ax=axes, pad=0.01, aspect=bar_aspect(len(needs.names)), ticks=whole)


def _draw_overlap(panel: SubFigure, needs: Needs) -> None:
    headline(
        panel,
        "Of the experts that the task of the row needs, the percentage that the task of the column needs too\n"
        "in brackets: what the two random halves of the task's own examples share",
    )
    axes = panel.subplots()
    values = np.array(
        [[np.nan if one is None else 100 * one for one in row] for row in needs.overlap]
    )
    mesh = heat_map(axes, values, cmap=AMOUNT, vmin=0, vmax=100)
    numbers = range(1, len(needs.names) + 1)
    labels = [f"{name}  {number}" for name, number in zip(needs.names, numbers, strict=True)]
    axes.set_yticks(np.arange(len(labels)) + 0.5, labels)
    axes.set_xticks(np.arange(len(labels)) + 0.5, [str(number) for number in numbers])
    texts = [
        [_percent(value, own=row == column) for column, value in enumerate(line)]
        for row, line in enumerate(values)
    ]
    if len(labels) <= _MOST_NUMBERED:
        _write(axes, mesh, values, texts)
    panel.colorbar(mesh, ax=axes, pad=0.01, aspect=bar_aspect(len(labels)))


def _percent(value: float, *, own: bool) -> str:
    if np.isnan(value):
        return ""
    return f"({value:.0f})" if own else f"{value:.0f}"


def _write(axes: Axes, mesh: QuadMesh, values: np.ndarray, texts: Sequence[Sequence[str]]) -> None:
    colours = np.asarray(mesh.cmap(mesh.norm(values)))
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            # What luminance the eye makes of the cell (ITU-R BT.601).
            is_light = colours[row, column, :3] @ (0.299, 0.587, 0.114) > 0.55
            place = (column + 0.5, row + 0.5)
            colour = INK if is_light else PAPER
            axes.text(*place, text, ha="center", va="center", fontsize=9, color=colour)
