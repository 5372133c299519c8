"""Paired differences with their intervals."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from flanmoe.study.plots.figure import INK, PAPER, Drawing, new_figure
from flanmoe.study.report_data import Comparison, ReportData
from flanmoe.study.report_text import claim_sentence, difference_scale, difference_unit


def paired_differences(data: ReportData) -> Drawing | None:
    """Paired differences with their intervals; None where nothing was compared."""
    if not data.comparisons:
        return None
    # Apart by kind as well: what tuning changed is often ten times what two arms differ by.
    kinds = dict.fromkeys((item.kind, item.metric) for item in data.comparisons)
    groups = [
        [item for item in data.comparisons if (item.kind, item.metric) == kind] for kind in kinds
    ]
    title = "Paired differences on the same questions"
    height = 0.9 * len(groups) + 0.42 * len(data.comparisons) + 0.3
    with new_figure("differences", height=height) as (figure, finish):
        panels = figure.subplots(
            len(groups), 1, squeeze=False, height_ratios=[len(group) + 1 for group in groups]
        )[:, 0]
        for axes, group in zip(panels, groups, strict=True):
            _draw_differences(axes, group)
        return finish(
            title,
            f"{title}. " + " ".join(claim_sentence(item) for item in data.comparisons),
            "Dot: mean difference. Bar: its interval. A filled dot marks an interval that excludes zero; a "
            "hollow one is no evidence of a difference.",
        )


def _draw_differences(axes: Axes, group: Sequence[Comparison]) -> None:
    metric = group[0].metric
    scale = difference_scale(metric)
    axes.axvline(0, color=INK, linewidth=1.1)
    for row, item in enumerate(group):
        mean, low, high = item.mean * scale, item.low * scale, item.high * scale
        axes.plot([low, high], [row, row], color=INK, linewidth=2, solid_capstyle="butt")
        face = PAPER if item.verdict == "unclear" else INK
        axes.plot(mean, row, marker="o", markersize=7, color=INK, markerfacecolor=face)
    axes.set_yticks(range(len(group)), [_pair_label(item) for item in group])
    axes.set_ylim(len(group) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    # Zero in the middle: the eye must not take an off-centre axis for a direction.
    reach = max(max(abs(item.low), abs(item.high)) for item in group) * scale * 1.12 or 1.0
    axes.set_xlim(-reach, reach)
    better = "left is better" if metric == "loss" else "right is better"
    axes.set_xlabel(f"{metric} ({difference_unit(metric)}), {better}")


def _pair_label(item: Comparison) -> str:
    seed = "" if item.seed is None else f", seed {item.seed}"
    if item.kind == "tuning":
        return f"{item.subject}{seed}:\nafter \N{MINUS SIGN} before"
    return f"{item.subject} \N{MINUS SIGN}\n{item.reference}{seed}"
