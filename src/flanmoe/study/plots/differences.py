"""Paired differences with their intervals."""

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes

from flanmoe.study.number_text import difference_scale, difference_unit
from flanmoe.study.plots.figure import INK, PAPER, Drawing, new_figure
from flanmoe.study.report_data import Comparison, ReportData
from flanmoe.study.report_text import difference_sentence

Row = list[Comparison]
# A figure of more rows is no longer looked at.
_MOST_SHOWN = 24


def paired_differences(data: ReportData) -> Drawing | None:
    """Paired differences with their intervals; None where nothing was compared.

    Of many, those between arms that differ most, all seeds of a pair in one row.
    """
    if not data.comparisons:
        return None
    # Apart by kind as well: what tuning changed is often ten times what two arms differ by.
    kinds = dict.fromkeys((item.kind, item.metric) for item in data.comparisons)
    groups = [
        _rows(item for item in data.comparisons if (item.kind, item.metric) == kind)
        for kind in kinds
    ]
    shown = groups
    if len(data.comparisons) > _MOST_SHOWN:
        between = [group for group in groups if group[0][0].kind == "arms"]
        shown = [_largest(group, _MOST_SHOWN // 2) for group in between or groups]
    num_rows = sum(map(len, shown))
    title = "Paired differences on the same questions"
    with new_figure("differences", height=0.9 * len(shown) + 0.42 * num_rows + 0.3) as (
        figure,
        finish,
    ):
        panels = figure.subplots(
            len(shown), 1, squeeze=False, height_ratios=[len(group) + 1 for group in shown]
        )[:, 0]
        for axes, group in zip(panels, shown, strict=True):
            _draw_differences(axes, group)
        items = [item for group in shown for row in group for item in row]
        return finish(
            title,
            f"{title}. " + " ".join(difference_sentence(item) for item in items),
            "Dot: mean difference. Bar: its interval. A filled dot marks an interval that excludes zero; a "
            f"hollow one is no evidence of a difference.{_left_out(items, data.comparisons)}",
        )


def _rows(items: Iterable[Comparison]) -> list[Row]:
    """Comparisons of the same two arms, all seeds together."""
    found: dict[tuple[str, str], Row] = {}
    for item in items:
        found.setdefault((item.subject, item.reference), []).append(item)
    return list(found.values())


def _largest(rows: Sequence[Row], most: int) -> list[Row]:
    by_size = sorted(rows, key=lambda row: -abs(sum(item.mean for item in row)) / len(row))
    kept = {id(row) for row in by_size[:most]}
    return [row for row in rows if id(row) in kept]


def _left_out(shown: Sequence[Comparison], every: Sequence[Comparison]) -> str:
    seeds = {item.seed for item in shown}
    several = " Seeds of a pair lie side by side." if len(seeds) > 1 else ""
    if len(shown) == len(every):
        return several
    return f"{several} Of {len(every)} differences the largest between arms; the table has all."


def _draw_differences(axes: Axes, group: Sequence[Row]) -> None:
    metric = group[0][0].metric
    scale = difference_scale(metric)
    axes.axvline(0, color=INK, linewidth=1.1)
    for number, row in enumerate(group):
        for place, item in enumerate(row):
            # Seeds share the middle 0.6 of their row.
            height = number + 0.6 * ((place + 0.5) / len(row) - 0.5)
            mean, low, high = item.mean * scale, item.low * scale, item.high * scale
            width = 2 if len(row) == 1 else 1.3
            axes.plot([low, high], [height] * 2, color=INK, lw=width, solid_capstyle="butt")
            face = PAPER if item.verdict == "unclear" else INK
            size = 7 if len(row) == 1 else 4
            axes.plot(mean, height, marker="o", markersize=size, color=INK, markerfacecolor=face)
    axes.set_yticks(range(len(group)), [_pair_label(row) for row in group])
    axes.set_ylim(len(group) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    # Zero in the middle: the eye must not take an off-centre axis for a direction.
    items = [item for row in group for item in row]
    reach = max(max(abs(item.low), abs(item.high)) for item in items) * scale * 1.12 or 1.0
    axes.set_xlim(-reach, reach)
    better = "left is better" if metric == "loss" else "right is better"
    axes.set_xlabel(f"{metric} ({difference_unit(metric)}), {better}", loc="right")


def _pair_label(row: Row) -> str:
    first = row[0]
    seed = "" if first.seed is None or len(row) > 1 else f", seed {first.seed}"
    if first.kind == "tuning":
        return f"{first.subject}{seed}:\nafter \N{MINUS SIGN} before"
    return f"{first.subject} \N{MINUS SIGN}\n{first.reference}{seed}"
