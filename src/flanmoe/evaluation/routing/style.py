"""How pictures of routing look: fonts, colours, heat maps; and how a figure becomes SVG."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, SubFigure

WIDTH = 16.0
MOST_LAYERS = 4
INK, MUTED, PAPER = "#1f2328", "#59636e", "#ffffff"
# Where many cells are drawn, the scale is made for all but the most extreme.
USUAL_SHARE = 0.98
# Above so many cells a heat map is a picture inside the picture: thousands of shapes make a file slow.
_MOST_CELLS = 4096

# From less to more than usual; orders of lightness tell the two apart without hue.
RELATIVE = LinearSegmentedColormap.from_list(
    "relative", ["#2b5c8a", "#8fb4d3", "#f7f4ee", "#e0955a", "#8c2f1e"]
)
AMOUNT = LinearSegmentedColormap.from_list("amount", ["#f7f4ee", "#e3c58d", "#c98452", "#8c4a4a"])
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    # Without it every run draws other ids.
    "svg.hashsalt": "routing",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    # Names of tasks are no formulas.
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def svg_of(draw: Callable[[], Figure], *, title: str) -> str:
    """Return a figure as SVG; the same figure gives the same text.

    Args:
        draw: makes the figure, in the style of this file.
        title: what the file says it is.
    """
    stream = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        metadata = {"Date": None, "Creator": None, "Title": title}
        draw().savefig(stream, format="svg", metadata=metadata, dpi=150)
    return stream.getvalue()


def stacked(heights: Sequence[float]) -> tuple[Figure, list[SubFigure]]:
    """Return an empty figure of the usual width and its panels, one below the other.

    Args:
        heights: of the panels, in inches.
    """
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    figure.patch.set_facecolor(PAPER)
    panels = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)
    return figure, list(panels.flat)


def headline(panel: SubFigure, text: str) -> None:
    """Write what a panel shows above it."""
    panel.suptitle(text, x=0.01, ha="left")


def heat_map(axes: Axes, values: Float[np.ndarray, "Y X"], **options: Any) -> QuadMesh:
    """Draw a matrix, its first row on top."""
    mesh = axes.pcolormesh(values, **options)
    mesh.set_rasterized(values.size > _MOST_CELLS)
    axes.set(xlim=(0, values.shape[1]), ylim=(values.shape[0], 0))
    return mesh


def number_columns(axes: Axes, names: Sequence[Any], *, most: int = 16) -> None:
    """Label the columns of a heat map, every second or third where there are many."""
    places = range(0, len(names), max(-(-len(names) // most), 1))
    axes.set_xticks([place + 0.5 for place in places], [str(names[place]) for place in places])


def number_rows(axes: Axes, names: Sequence[Any], *, most: int = 16) -> None:
    """Label the rows of a heat map, every second or third where there are many."""
    places = range(0, len(names), max(-(-len(names) // most), 1))
    axes.set_yticks([place + 0.5 for place in places], [str(names[place]) for place in places])


def times_bar(
    panel: SubFigure,
    mesh: QuadMesh,
    axes: Sequence[Axes],
    *,
    limit: float,
    rows: int,
    goes_on: bool = False,
) -> None:
    """Draw the scale of a heat map of logarithms to base 2, as multiples.

    Args:
        panel: that holds the axes.
        mesh: one of its heat maps.
        axes: those that the scale stands beside.
        limit: the scale goes from -limit to limit.
        rows: about as many rows as stand above each other.
        goes_on: whether there are values beyond the scale, which then ends in points.
    """
    extend = "both" if goes_on else "neither"
    bar = panel.colorbar(
        mesh, ax=list(axes), pad=0.01, aspect=bar_aspect(rows), extend=extend, extendfrac=0.03
    )
    ticks = np.linspace(-limit, limit, 5)
    bar.set_ticks(list(ticks), labels=[f"\N{MULTIPLICATION SIGN}{2**tick:.2g}" for tick in ticks])


def bar_aspect(rows: int) -> float:
    """Height of a colour bar over its width, which is the same beside any number of rows."""
    return max(2.0 * rows, 8.0)


def limit_of(values: Sequence[Float[np.ndarray, "_ _"]], *, share: float = 1.0) -> float:
    """Return how far a scale of logarithms to base 2 has to go, between 0.5 and 3.

    Args:
        values: what is drawn. Those below -20 stand for a share of nothing and are left out, and so is NaN.
        share: of the values that are to lie on the scale; below 1 a few extreme ones do not flatten the rest.
    """
    known = np.concatenate([np.abs(one[one > -20]).ravel() for one in values])
    strongest = float(np.quantile(known, share)) if len(known) else 0.0
    return float(min(max(np.ceil(2 * strongest) / 2, 0.5), 3.0))
