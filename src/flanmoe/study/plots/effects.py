"""Main effects of the arms' factors with their intervals."""

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes

from flanmoe.study.analysis.factorial import EffectResult, FactorialTable
from flanmoe.study.analysis.verdict import ALPHA
from flanmoe.study.number_text import p_text
from flanmoe.study.plots.figure import INK, PAPER, Drawing, new_figure

_MOST_ROWS = 20
_MOST_PANELS = 4
_NAME_WIDTH = 27


def effects(tables: Sequence[FactorialTable]) -> Drawing | None:
    """Main effects, a panel a metric; None where there is none. Of many those of the smallest p-values."""
    found = [table.mains for table in tables if table.mains]
    if not found:
        return None
    panels = [_shown(mains, min(len(found), _MOST_PANELS)) for mains in found[:_MOST_PANELS]]
    num_rows = sum(map(len, panels))
    title = "Main effects of the factors"
    height = 0.36 * num_rows + 0.65 * len(panels) + 0.2
    with new_figure("effects", height=height) as (figure, finish):
        ratios = [len(panel) + 0.5 for panel in panels]
        for axes, panel in zip(
            figure.subplots(len(panels), 1, squeeze=False, height_ratios=ratios)[:, 0],
            panels,
            strict=True,
        ):
            _draw(axes, panel)
        left_out = sum(map(len, found)) - num_rows
        more = f" {left_out} effects of larger p-values or further metrics are in the table."
        alt = "; ".join(_in_words(effect) for panel in panels for effect in panel)
        return finish(
            title,
            f"{title}. {alt}.",
            "Mean over matched pairs of arms of the first level minus the second, with its 95 % interval. A "
            "filled dot marks an effect that is significant after Holm's correction over all effects of its "
            f"metric.{more if left_out else ''}",
        )


def _shown(mains: Sequence[EffectResult], num_panels: int) -> list[EffectResult]:
    most = _MOST_ROWS // num_panels
    by_p = sorted(mains, key=lambda effect: 1.0 if effect.p is None else effect.p)[:most]
    kept = {effect.name for effect in by_p}
    return [effect for effect in mains if effect.name in kept]


def _draw(axes: Axes, panel: Sequence[EffectResult]) -> None:
    metric = panel[0].metric
    axes.axvline(0, color=INK, linewidth=1.1)
    for row, effect in enumerate(panel):
        ends = [effect.low * metric.scale, effect.high * metric.scale]
        axes.plot(ends, [row, row], color=INK, linewidth=2, solid_capstyle="butt")
        significant = effect.p_holm is not None and effect.p_holm <= ALPHA
        face = INK if significant else PAPER
        middle = effect.estimate * metric.scale
        axes.plot(middle, row, marker="o", markersize=6.5, color=INK, markerfacecolor=face)
    labels = ["\n".join(textwrap.wrap(effect.name, _NAME_WIDTH)) for effect in panel]
    axes.set_yticks(range(len(panel)), labels, fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(panel) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", nbins=6)
    reach = max(max(abs(effect.low), abs(effect.high)) for effect in panel) * metric.scale
    axes.set_xlim(-1.1 * reach or -1.0, 1.1 * reach or 1.0)
    better = {True: ", right is better", False: ", left is better", None: ""}
    name = metric.name.replace("_", " ")
    axes.set_xlabel(
        f"{name} ({metric.unit}){better[metric.higher_is_better]}", fontsize=9, loc="right"
    )


def _in_words(effect: EffectResult) -> str:
    text = effect.metric.text
    p_value = "" if effect.p_holm is None else f", p by Holm {p_text(effect.p_holm)}"
    return (
        f"{effect.name}: {text(effect.estimate)} {effect.metric.unit} (interval {text(effect.low)} to "
        f"{text(effect.high)}{p_value})"
    )
