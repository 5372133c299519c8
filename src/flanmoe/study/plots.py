"""The figures of a report as SVG strings.

Each is drawn with matplotlib without global state, and is the same for the same data on every run. Text stays
text and colours become CSS variables with the drawn colour as fall-back (`var(--ink, #1f2328)`), so that a
page can restyle them for a dark screen while a figure alone still reads. Arms differ in marker and line
style as well as in colour.
"""

import io
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from flanmoe.study.report_data import (
    ArmReport,
    Comparison,
    CurvePoint,
    Evaluation,
    ExpertLoadReport,
    Metric,
    ReportData,
    Score,
)
from flanmoe.study.report_text import (
    accuracy_text,
    claim_sentence,
    difference_scale,
    difference_unit,
    listed,
    loss_text,
    percent,
    short,
    size,
)

_INK, _MUTED, _GRID, _PAPER = "#1f2328", "#59636e", "#d8dee4", "#ffffff"
_ARM_COLOURS = ("#0f62a8", "#c2410c", "#0b7a5a", "#7c3aad", "#8a6d00", "#b02a6f")
# Parts of the memory estimate: neither the colours of arms nor hue alone, and readable on light and dark.
_PART_COLOURS = ("#5b7083", "#8a9bab", "#a08458", "#6b8f71", "#9a7a94", "#7d7d7d")
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _GRID: "--grid",
    _PAPER: "--paper",
    **{colour: f"--arm-{number}" for number, colour in enumerate(_ARM_COLOURS)},
}
_LINE_STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_HATCHES = ("", "//", "--", "xx", "\\\\", "++")
# From light to dark all the way, so that the order survives without any hue.
_LOAD_COLOURS = LinearSegmentedColormap.from_list(
    "load", ["#f4efe3", "#e3c58d", "#c98452", "#8c4a4a", "#3b2340"]
)
_WIDTH = 4.7
_POINTS_WITHOUT_SMOOTHING = 40


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


def drawings(data: ReportData) -> tuple[Drawing, ...]:
    """Draw every figure that the data has something for, in the order in which they are shown."""
    drawn = (
        loss_curves(data),
        scores(data),
        paired_differences(data),
        memory(data),
        *(expert_load(data, number) for number in range(len(data.arms))),
    )
    return tuple(drawing for drawing in drawn if drawing is not None)


def loss_curves(data: ReportData) -> Drawing | None:
    """Training loss of every arm over tokens; None where no arm has a finite loss."""
    arms = [arm for arm in data.arms if _finite_points(arm)]
    if not arms:
        return None
    title = "Training loss over tokens"
    with _figure("loss-curves", height=3.5) as (figure, finish):
        axes = figure.subplots()
        for arm in arms:
            _draw_curves(axes, arm, data.arms.index(arm))
        axes.set(xlabel="real tokens trained on", ylabel="loss (nats per token)")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        axes.legend(loc="upper right")
        alt = "; ".join(_curve_in_words(arm) for arm in arms)
        return finish(
            title,
            f"{title}. {alt}.",
            "Thin lines are single steps, thick ones a running mean (where there are enough steps for one). "
            "Router losses are left out.",
        )


def scores(data: ReportData) -> Drawing | None:
    """Loss and accuracy before and after tuning, with error bars; None where nothing was evaluated."""
    arms = [arm for arm in data.arms if arm.before or arm.after]
    if not arms:
        return None
    metrics: list[Metric] = ["loss"]
    if any(
        _score(evaluation, "accuracy") for arm in arms for evaluation in (arm.before, arm.after)
    ):
        metrics.append("accuracy")
    title = "Held-out scores before and after tuning"
    with _figure("scores", height=1.2 + 0.62 * len(arms) * len(metrics)) as (figure, finish):
        panels = figure.subplots(len(metrics), 1, squeeze=False)[:, 0]
        for axes, metric in zip(panels, metrics, strict=True):
            _draw_scores(axes, arms, data, metric)
        alt = "; ".join(_scores_in_words(arm) for arm in arms)
        return finish(
            title,
            f"{title}. {alt}.",
            "Hollow: before tuning. Filled: after. Bars reach 1.96 standard errors to either side. They are "
            "wider than the paired intervals, because both models answer the same questions.",
        )


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
    with _figure("differences", height=height) as (figure, finish):
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


def memory(data: ReportData) -> Drawing | None:
    """Estimated memory, part by part, beside the measured peak; None where nothing was estimated."""
    arms = [arm for arm in data.arms if arm.memory]
    if not arms:
        return None
    title = "Memory of training: estimate and measurement"
    with _figure("memory", height=1.55 + 0.62 * len(arms)) as (figure, finish):
        axes = figure.subplots()
        parts = list(
            dict.fromkeys(part for arm in arms if arm.memory for part in arm.memory.estimate)
        )
        _draw_memory(axes, arms, parts)
        alt = "; ".join(_memory_in_words(arm) for arm in arms)
        return finish(
            title,
            f"{title}. {alt}.",
            "Upper bar: the estimate made before the run, by part. Lower bar: the peak that was measured.",
        )


def expert_load(data: ReportData, number: int) -> Drawing | None:
    """Heat map of the share of every expert in every layer of one arm; None for a dense model."""
    arm = data.arms[number]
    load = arm.expert_load
    if load is None:
        return None
    title = f"Expert load per layer: {arm.label}"
    height = 1.3 + min(6.0, max(1.2, 0.14 * len(load.layers)))
    with _figure(f"expert-load-{number}", height=height) as (figure, finish):
        _draw_load(figure, figure.subplots(), load)
        return finish(
            title,
            f"{title}. {_load_in_words(load)}.",
            "1 on the scale is the even share, 1 / number of experts. A white dot marks an expert with at "
            "least twice that share, a cross one that no token was sent to.",
        )


Finish = Callable[[str, str, str], Drawing]


@contextmanager
def _figure(name: str, *, height: float) -> Generator[tuple[Figure, Finish]]:
    """Give a figure in the house style and the function that turns it into a `Drawing`."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": _INK,
        "axes.edgecolor": _MUTED,
        "axes.labelcolor": _INK,
        "axes.labelsize": 10,
        "axes.linewidth": 0.8,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": _GRID,
        "grid.linewidth": 0.7,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "xtick.labelcolor": _INK,
        "ytick.labelcolor": _INK,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "hatch.linewidth": 0.6,
        "hatch.color": _PAPER,
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


def _themed(colour: re.Match[str]) -> str:
    variable = _VARIABLES.get(colour[0])
    return f"var({variable}, {colour[0]})" if variable else colour[0]


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _tick(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g} M"
    return f"{value / 1e3:g} k" if abs(value) >= 1e3 else f"{value:g}"


def _colour(number: int) -> str:
    return _ARM_COLOURS[number % len(_ARM_COLOURS)]


def _draw_curves(axes: Axes, arm: ArmReport, number: int) -> None:
    style = {"color": _colour(number), "linestyle": _LINE_STYLES[number % len(_LINE_STYLES)]}
    for position, curve in enumerate(arm.curves):
        points = [(point.tokens, point.loss) for point in curve.points if point.loss is not None]
        if not points:
            continue
        tokens, losses = np.array(points, dtype=float).T
        label = arm.label if position == 0 else None
        smooth = len(points) > _POINTS_WITHOUT_SMOOTHING
        if smooth:
            axes.plot(tokens, losses, color=style["color"], linewidth=0.7, alpha=0.35)
            tokens, losses = _running_mean(tokens, losses)
        marker = None if smooth else _MARKERS[number % len(_MARKERS)]
        axes.plot(
            tokens, losses, **style, linewidth=1.8, marker=marker, markersize=3.5, label=label
        )


def _running_mean(tokens: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over a window of a fifteenth of the points, placed at the window's middle."""
    width = max(3, len(losses) // 15)
    window = np.ones(width) / width
    return np.convolve(tokens, window, mode="valid"), np.convolve(losses, window, mode="valid")


def _score(evaluation: Evaluation | None, metric: Metric) -> Score | None:
    if evaluation is None:
        return None
    score = evaluation.loss if metric == "loss" else evaluation.accuracy
    return score if score is not None and score.mean is not None else None


def _draw_scores(axes: Axes, arms: Sequence[ArmReport], data: ReportData, metric: Metric) -> None:
    scale = difference_scale(metric)
    for row, arm in enumerate(arms):
        number = data.arms.index(arm)
        for offset, evaluation in ((-0.15, arm.before), (0.15, arm.after)):
            score = _score(evaluation, metric)
            if score is None or score.mean is None:
                continue
            axes.errorbar(
                score.mean * scale,
                row + offset,
                xerr=1.96 * scale * (score.standard_error or 0),
                fmt=_MARKERS[number % len(_MARKERS)],
                color=_colour(number),
                markerfacecolor=_PAPER if evaluation is arm.before else _colour(number),
                markersize=6.5,
                markeredgewidth=1.4,
                capsize=3,
                linewidth=1.4,
            )
    _mark_chance(axes, arms, metric)
    axes.set_yticks(range(len(arms)), [arm.label for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.08)
    axes.set_xlabel(
        "loss (nats per token), lower is better" if metric == "loss" else "accuracy (%)"
    )


def _mark_chance(axes: Axes, arms: Sequence[ArmReport], metric: Metric) -> None:
    found = [_score(evaluation, metric) for arm in arms for evaluation in (arm.before, arm.after)]
    chances = {score.chance for score in found if score is not None and score.chance is not None}
    for chance in sorted(chances):
        axes.axvline(100 * chance, color=_MUTED, linestyle=(0, (2, 2)), linewidth=1.2)
        axes.annotate(
            "chance",
            (100 * chance, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, -2),
            textcoords="offset points",
            va="top",
            color=_MUTED,
            fontsize=9.5,
        )


def _draw_differences(axes: Axes, group: Sequence[Comparison]) -> None:
    metric = group[0].metric
    scale = difference_scale(metric)
    axes.axvline(0, color=_INK, linewidth=1.1)
    for row, item in enumerate(group):
        mean, low, high = item.mean * scale, item.low * scale, item.high * scale
        axes.plot([low, high], [row, row], color=_INK, linewidth=2, solid_capstyle="butt")
        face = _PAPER if item.verdict == "unclear" else _INK
        axes.plot(mean, row, marker="o", markersize=7, color=_INK, markerfacecolor=face)
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


def _draw_memory(axes: Axes, arms: Sequence[ArmReport], parts: Sequence[str]) -> None:
    for row, arm in enumerate(arms):
        if arm.memory is None:
            continue
        left = 0.0
        for number, part in enumerate(parts):
            width = arm.memory.estimate.get(part, 0) / 2**30
            axes.barh(
                row - 0.2,
                width,
                left=left,
                height=0.34,
                color=_PART_COLOURS[number % len(_PART_COLOURS)],
                hatch=_HATCHES[number % len(_HATCHES)],
                edgecolor=_PAPER,
                linewidth=0.6,
                label=part if row == 0 else None,
            )
            left += width
        if arm.memory.measured:
            label = "measured peak" if row == 0 else None
            measured = arm.memory.measured / 2**30
            axes.barh(row + 0.2, measured, height=0.34, color=_MUTED, label=label)
    axes.set_yticks(range(len(arms)), [arm.label for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("memory (GiB)")
    axes.figure.legend(loc="outside lower center", ncols=3, handlelength=1.6, columnspacing=1.2)


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
    _label_cells(axes, [str(layer) for layer in load.layers], vertical=True)
    _label_cells(axes, [str(expert) for expert in range(num_experts)], vertical=False)
    axes.grid(visible=False)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=26)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.set_label("load (times the even share)")
    bar.ax.axhline(1.0, color=_INK, linewidth=1.6)
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    bar.ax.grid(visible=False)


def _label_cells(axes: Axes, labels: Sequence[str], *, vertical: bool) -> None:
    step = -(-len(labels) // 16)
    places = [index + 0.5 for index in range(0, len(labels), step)]
    if vertical:
        axes.set_yticks(places, list(labels[::step]))
    else:
        axes.set_xticks(places, list(labels[::step]))


def _finite_points(arm: ArmReport) -> list[CurvePoint]:
    return [point for curve in arm.curves for point in curve.points if point.loss is not None]


def _curve_in_words(arm: ArmReport) -> str:
    finite = _finite_points(arm)
    first, last = finite[0], finite[-1]
    return (
        f"{arm.label}: from {first.loss:.3f} to {last.loss:.3f} after {short(last.tokens)} tokens"
    )


def _scores_in_words(arm: ArmReport) -> str:
    words: list[str] = []
    for name, evaluation in (("before", arm.before), ("after", arm.after)):
        if evaluation is None:
            continue
        text = f"{name} loss {loss_text(evaluation.loss)}"
        if evaluation.accuracy is not None:
            text += f" and accuracy {accuracy_text(evaluation.accuracy)}"
        words.append(text)
    return f"{arm.label}: {listed(words)}"


def _memory_in_words(arm: ArmReport) -> str:
    assert arm.memory is not None
    measured = size(arm.memory.measured) if arm.memory.measured else "not measured"
    return f"{arm.label}: estimate {size(arm.memory.estimate_total)}, measured {measured}"


def _load_in_words(load: ExpertLoadReport) -> str:
    return (
        f"{len(load.layers)} layers of {load.num_experts} experts; the even share is "
        f"{percent(1 / load.num_experts)}, the busiest expert has {load.max_over_mean:.2f} times that, "
        f"{load.num_unused} experts are unused"
    )
