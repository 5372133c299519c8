"""The picture of co-activation: which experts serve tokens together more often than loads would have it."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from flanmoe.evaluation.routing.coactivation import (
    LEAST_EXPECTED,
    log_times,
    strongest_layers,
)
from flanmoe.evaluation.routing.style import (
    MOST_LAYERS,
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

_NOT_KNOWN = "#c9cdd2"


def coactivation_svg(tables: Sequence[Int[np.ndarray, "_ _"]], layers: Sequence[int]) -> str:
    """Draw co-activation as SVG; the same numbers give the same text.

    Of many layers those are drawn whose pairs stand out most.

    Args:
        tables: for each layer the tokens that had both experts.
        layers: number of the transformer layer of each.
    """
    return svg_of(lambda: coactivation_figure(tables, layers), title="Co-activation of experts")


def coactivation_figure(tables: Sequence[Int[np.ndarray, "_ _"]], layers: Sequence[int]) -> Figure:
    """Draw co-activation with matplotlib (see `coactivation_svg`)."""
    shown = strongest_layers(tables, most=MOST_LAYERS)
    columns = min(len(shown), 4 if max(len(one) for one in tables) <= 32 else 2)
    lines = -(-len(shown) // columns)
    side = 14.0 / columns
    figure, (panel,) = stacked([lines * min(side + 0.4, 6.4) + 0.9])
    of = f" ({len(shown)} of {len(layers)} layers: those that stand out most)"
    headline(
        panel,
        "How often two experts serve a token together, as a multiple of what their loads alone would give"
        f"{of if len(shown) < len(layers) else ''}\ngrey: the expert itself, and pairs of which fewer than "
        f"{LEAST_EXPECTED} tokens would be expected",
    )
    values = [log_times(tables[place]) for place in shown]
    limit = limit_of(values, share=USUAL_SHARE)
    grid = panel.subplots(lines, columns, squeeze=False)
    meshes: list[QuadMesh] = []
    for axes, place, one in zip(grid.flat, shown, values, strict=False):
        meshes.append(
            heat_map(axes, np.ma.masked_invalid(one), cmap=RELATIVE, vmin=-limit, vmax=limit)
        )
        axes.set_facecolor(_NOT_KNOWN)
        axes.set_aspect("equal")
        axes.set(title=f"layer {layers[place]}", xlabel="expert", ylabel="expert")
        number_columns(axes, range(len(one)))
        number_rows(axes, range(len(one)))
    for axes in list(grid.flat)[len(shown) :]:
        axes.set_visible(False)
    times_bar(panel, meshes[0], list(grid.flat), limit=limit, rows=14 * lines, goes_on=True)
    return figure
