"""Heat map of which expert gets how much."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flanmoe.study.arm_report import ArmReport, ExpertLoadReport
from flanmoe.study.number_text import listed, percent
from flanmoe.study.plots.figure import INK, Drawing, new_figure
from flanmoe.study.report_data import ReportData
from flanmoe.study.shared_tuning import alike

# From light to dark all the way, so that the order survives without any hue.
_LOAD_COLOURS = LinearSegmentedColormap.from_list(
    "load", ["#f4efe3", "#e3c58d", "#c98452", "#8c4a4a", "#3b2340"]
)

# A page of a dozen maps that hardly differ helps nobody; the tables hold the loads of all arms.
_MOST_SHOWN = 4
_MOST_NAMES = 8


def expert_loads(data: ReportData) -> list[Drawing | None]:
    """Heat maps of the sparse arms; of many, the baseline's and those of the most uneven load."""
    firsts = [group[0] for group in alike(data.arms, load_of)]
    sparse = [arm for arm in firsts if arm.expert_load is not None]
    ranked = sorted(sparse, key=lambda arm: _standing_out(data, arm), reverse=True)
    shown = {arm.label for arm in ranked[:_MOST_SHOWN]}
    return [expert_load(data, number) for number, arm in enumerate(data.arms) if arm.label in shown]


def _standing_out(data: ReportData, arm: ArmReport) -> tuple[bool, float]:
    uneven = arm.expert_load.max_over_mean if arm.expert_load else 0.0
    return arm.label == data.baseline, uneven


def expert_load(data: ReportData, number: int) -> Drawing | None:
    """Heat map of the share of every expert in every layer of one arm; None for a dense model."""
    arm = data.arms[number]
    load = arm.expert_load
    if load is None:
        return None
    title = f"Expert load per layer: {arm.label}"
    height = 1.3 + min(6.0, max(1.2, 0.14 * len(load.layers)))
    with new_figure(f"expert-load-{number}", height=height) as (figure, finish):
        _draw_load(figure, figure.subplots(), load)
        return finish(
            title,
            f"{title}. {_load_in_words(load)}.",
            "1 on the scale is the even share, 1 / number of experts. A white dot marks an expert with at "
            "least twice that share, a cross one that no token was sent to." + same_in(data, arm),
        )


def same_in(data: ReportData, arm: ArmReport) -> str:
    """Say which other arms have the same load, since they share the arm's tuning; empty for none."""
    others = [
        other.label
        for other in data.arms
        if other.label != arm.label and other.expert_load == arm.expert_load
    ]
    return f" The same in {listed(others, most=_MOST_NAMES)}." if others else ""


def load_of(arm: ArmReport) -> ExpertLoadReport | None:
    """Return how experts were used, which arms that share their tuning share."""
    return arm.expert_load


def _draw_load(figure: Figure, axes: Axes, load: ExpertLoadReport) -> None:
    relative = np.array(load.shares) * load.num_experts
    num_layers, num_experts = relative.shape
    mesh = axes.pcolormesh(
        relative, cmap=_LOAD_COLOURS, vmin=0, vmax=max(2.0, float(relative.max())), linewidth=0
    )
    # A picture inside the picture where thousands of cells would make the page slow.
    mesh.set_rasterized(relative.size > 4096)
    for mask, marker, colour in ((relative >= 2, ".", "#fffffe"), (relative == 0, "x", "#1f2329")):
        rows, columns = np.nonzero(mask)
        axes.plot(
            columns + 0.5, rows + 0.5, linestyle="none", marker=marker, color=colour, markersize=5
        )
    axes.set(xlim=(0, num_experts), ylim=(num_layers, 0), xlabel="expert", ylabel="layer")
    _label_cells(axes, load.names, vertical=True)
    _label_cells(axes, [str(expert) for expert in range(num_experts)], vertical=False)
    axes.grid(visible=False)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=26)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.set_label("load (times the even share)")
    bar.ax.axhline(1.0, color=INK, linewidth=1.6)
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    bar.ax.grid(visible=False)


def _label_cells(axes: Axes, labels: Sequence[str], *, vertical: bool) -> None:
    step = -(-len(labels) // 16)
    places = [index + 0.5 for index in range(0, len(labels), step)]
    if vertical:
        axes.set_yticks(places, list(labels[::step]))
    else:
        axes.set_xticks(places, list(labels[::step]))


def _load_in_words(load: ExpertLoadReport) -> str:
    return (
        f"{len(load.layers)} layers of {load.num_experts} experts; the even share is "
        f"{percent(1 / load.num_experts)}, the busiest expert has {load.max_over_mean:.2f} times that, "
        f"{load.num_unused} experts are unused"
    )
