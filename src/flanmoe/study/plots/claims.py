"""Forest plot of the claims: estimate, interval, margin, and what the design would have found."""

import re
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from flanmoe.study.analysis.claim_result import ClaimResult
from flanmoe.study.plots.figure import BAD, GOOD, GRID, INK, MUTED, PAPER, Drawing, new_figure
from flanmoe.study.report_claims import (
    Tone,
    detectable_text,
    estimate_text,
    interval_text,
    margin_text,
    tone,
)

_LOOKS: dict[Tone, tuple[str, str, str]] = {
    "good": ("o", GOOD, GOOD),
    "bad": ("D", BAD, BAD),
    "open": ("o", INK, PAPER),
    "weak": ("o", MUTED, PAPER),
    "void": ("s", MUTED, PAPER),
}
_WORDS: dict[Tone, str] = {
    "good": "reproduced",
    "bad": "contradicted",
    "open": "inconclusive",
    "weak": "underpowered",
    "void": "not comparable",
}
_NAME_WIDTH = 25
_LINE_HEIGHT = 0.165
# A detectable effect far beyond everything else would flatten the rest of its panel.
_FARTHEST = 2.0


def claims(results: Sequence[ClaimResult]) -> Drawing | None:
    """Estimate of each claim with its interval, a panel a unit; None where there is no claim."""
    if not results:
        return None
    units = dict.fromkeys(result.metric.unit for result in results)
    groups = [[one for one in results if one.metric.unit == unit] for unit in units]
    heights = [sum(_row_height(one) for one in group) + 0.1 for group in groups]
    title = "Claims: estimates against margins"
    height = sum(heights) + 0.6 * len(groups) + 0.75
    with new_figure("claims", height=height) as (figure, finish):
        panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, group in zip(panels, groups, strict=True):
            _draw_group(axes, group)
        handles = _legend(results)
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8.5)
        alt = "; ".join(_in_words(one) for one in results)
        return finish(
            title,
            f"{title}. {alt}.",
            "Dot: estimate. Line: its 95 % interval, not corrected for the other claims. Upright tick: the "
            "margin, on the side that is claimed (on both for a claim of sameness). Grey bar: true differences "
            "that this design would miss in more than a fifth of studies; where it reaches beyond the tick, "
            "the claim is underpowered.",
        )


def _label(result: ClaimResult) -> str:
    """Break a name after its hyphens, underscores and dots."""
    lines = [""]
    for part in re.findall(r"[^-_.]*[-_.]?", result.name):
        if lines[-1] and len(lines[-1]) + len(part) > _NAME_WIDTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _row_height(result: ClaimResult) -> float:
    return _LINE_HEIGHT * (_label(result).count("\n") + 1) + 0.16


def _draw_group(axes: Axes, group: Sequence[ClaimResult]) -> None:
    reach = _reach(group)
    middles: list[float] = []
    top = 0.0
    for result in group:
        height = _row_height(result)
        middles.append(top + height / 2)
        top += height
        _draw_claim(axes, result, middles[-1], reach)
    axes.axvline(0, color=INK, linewidth=1.1, zorder=1.5)
    axes.set_yticks(middles, [_label(result) for result in group], fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(-reach, reach), ylim=(top, 0))
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", nbins=6)
    names = ", ".join(dict.fromkeys(one.metric.name.replace("_", " ") for one in group))
    unit = group[0].metric.unit
    axes.set_xlabel(unit if unit == names else f"{names} ({unit})", fontsize=9, loc="right")


def _reach(group: Sequence[ClaimResult]) -> float:
    """How far the axis reaches to either side of zero, so that no direction looks favoured."""
    ends = [result.margin * result.metric.scale for result in group]
    detectable = [0.0]
    for result in group:
        if (found := result.measurement) is not None:
            scale = result.metric.scale
            ends += [abs(found.low) * scale, abs(found.high) * scale]
            detectable.append((found.detectable or 0.0) * scale)
    farthest = max(ends)
    return 1.08 * max(farthest, min(max(detectable), _FARTHEST * farthest))


def _draw_claim(axes: Axes, result: ClaimResult, row: float, reach: float) -> None:
    found, scale = result.measurement, result.metric.scale
    sides = {"higher": (1,), "lower": (-1,), "same": (-1, 1)}[result.claimed]
    for side in sides:
        place = side * result.margin * scale
        axes.plot([place, place], [row - 0.11, row + 0.11], color=INK, linewidth=1.6, zorder=3)
    if found is None:
        # On the side without the margin's tick.
        style = {"va": "center", "ha": "left" if sides == (-1,) else "right", "fontsize": 8.5}
        axes.text(-0.03 * sides[-1] * reach, row, "not measured", color=MUTED, **style)
        return
    if found.detectable is not None:
        edge = min(found.detectable * scale, reach)
        axes.barh(row, 2 * edge, left=-edge, height=0.15, color=GRID, zorder=1)
    marker, colour, face = _LOOKS[tone(result.verdict)]
    ends = [found.low * scale, found.high * scale]
    axes.plot(ends, [row, row], color=colour, linewidth=2, solid_capstyle="butt", zorder=4)
    axes.plot(
        found.estimate * scale,
        row,
        marker=marker,
        markersize=6.5,
        color=colour,
        markerfacecolor=face,
        markeredgewidth=1.4,
        zorder=5,
    )


def _legend(results: Sequence[ClaimResult]) -> list[Line2D | Patch]:
    """One handle a kind of verdict that is there, and one each for margin and bar."""
    there = {tone(result.verdict) for result in results if result.measurement}
    handles: list[Line2D | Patch] = []
    for kind, (marker, colour, face) in _LOOKS.items():
        if kind in there:
            style = {"color": colour, "markerfacecolor": face, "markeredgewidth": 1.4}
            handles.append(
                Line2D([], [], marker=marker, markersize=6.5, label=_WORDS[kind], **style)
            )
    margin = {"marker": "|", "markersize": 9, "markeredgewidth": 1.6, "linestyle": "none"}
    handles.append(Line2D([], [], color=INK, label="margin", **margin))
    if any(one.measurement and one.measurement.detectable is not None for one in results):
        handles.append(Patch(color=GRID, label="would be missed"))
    return handles


def _in_words(result: ClaimResult) -> str:
    if result.measurement is None:
        return f"{result.name}: {result.verdict}, margin {margin_text(result)} {result.metric.unit}"
    return (
        f"{result.name}: {result.verdict}, estimate {estimate_text(result)} {result.metric.unit} (interval "
        f"{interval_text(result)}), detectable {detectable_text(result)}, margin {margin_text(result)}"
    )
