"""A figure in the house style, and how it becomes an SVG string.

Text stays text and colours become CSS variables with the drawn colour as fall-back
(`var(--ink, #1f2328)`), so that a page can restyle them for a dark screen while a figure alone still
reads. Arms differ in marker and line style as well as in colour.
"""

import io
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1f2328", "#59636e", "#d8dee4", "#ffffff"
# A green of its own: that of the third arm is the same to the eye, and means an arm.
GOOD, BAD = "#0b7a5b", "#b42318"
ARM_COLOURS = ("#0f62a8", "#c2410c", "#0b7a5a", "#7c3aad", "#8a6d00", "#b02a6f")
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
    GOOD: "--good",
    BAD: "--bad",
    **{colour: f"--arm-{number}" for number, colour in enumerate(ARM_COLOURS)},
}
MARKERS = ("o", "s", "^", "D", "v", "P")
_WIDTH = 4.7


@dataclass(frozen=True, slots=True)
class Drawing:
    """One figure.

    Attributes:
        name: short identifier, unique on the page.
        title: what it shows.
        alt: the same and its main values in words, for who cannot see it.
        caption: what the marks mean.
        svg: the picture, an `<svg>` element without outside references.
    """

    name: str
    title: str
    alt: str
    caption: str
    svg: str


Finish = Callable[[str, str, str], Drawing]


@contextmanager
def new_figure(name: str, *, height: float) -> Generator[tuple[Figure, Finish]]:
    """Give a figure in the house style and the function that turns it into a `Drawing`."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.labelsize": 10,
        "axes.linewidth": 0.8,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "hatch.linewidth": 0.6,
        "hatch.color": PAPER,
        "legend.frameon": False,
        "legend.fontsize": 10,
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        figure.patch.set_visible(False)

        def finish(title: str, alt: str, caption: str) -> Drawing:
            return Drawing(name, title, alt, caption, _svg(figure, name, title, alt))

        yield figure, finish


def _svg(figure: Figure, name: str, title: str, alt: str) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # Ids are unique within one figure only, and a page holds several.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'\bd="[^"]*"', _rounded, text)
    text = re.sub(r"#[0-9a-f]{6}\b", _themed, text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px inherit", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} '
        f'role="img" aria-labelledby="{name}-title {name}-desc">\n'
        f'<title id="{name}-title">{_escaped(title)}</title>\n<desc id="{name}-desc">{_escaped(alt)}</desc>'
    )
    return opening + text[text.index(">") + 1 :]


def _rounded(path: re.Match[str]) -> str:
    """Hundredths of a point are finer than any screen, and half the size of what matplotlib writes."""
    return re.sub(r"(\.\d\d)\d+", r"\1", path[0])


def _themed(colour: re.Match[str]) -> str:
    variable = _VARIABLES.get(colour[0])
    return f"var({variable}, {colour[0]})" if variable else colour[0]


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def arm_colour(number: int) -> str:
    """Return the colour of an arm by its number."""
    return ARM_COLOURS[number % len(ARM_COLOURS)]
