"""Loss and accuracy before and after tuning."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from flanmoe.study.arm_report import ArmReport, Evaluation, Score
from flanmoe.study.number_text import Metric, difference_scale, listed
from flanmoe.study.plots.figure import MARKERS, MUTED, PAPER, Drawing, arm_colour, new_figure
from flanmoe.study.report_data import ReportData
from flanmoe.study.report_text import accuracy_text, loss_text

# More arms share one colour and one row each.
_MOST_ARMS_APART = 8
_LONGEST_LABEL = 26


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
    is_crowded = len(arms) > _MOST_ARMS_APART
    with new_figure("scores", height=_height(len(arms), len(metrics))) as (figure, finish):
        if is_crowded:
            # Names once, at the left of panels side by side.
            panels = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
        else:
            panels = figure.subplots(len(metrics), 1, squeeze=False)[:, 0]
        for axes, metric in zip(panels, metrics, strict=True):
            _draw_scores(axes, arms, data, metric)
            if is_crowded:
                _crowd(axes, arms, data, metric)
        alt = "; ".join(_scores_in_words(arm) for arm in arms)
        return finish(
            title,
            f"{title}. {alt}.",
            "Hollow: before tuning. Filled: after. Bars reach 1.96 standard errors to either side. They are "
            "wider than the paired intervals, because both models answer the same questions."
            + (" Dashed: the baseline after tuning." if is_crowded else ""),
        )


def _height(num_arms: int, num_metrics: int) -> float:
    if num_arms > _MOST_ARMS_APART:
        return 0.9 + 0.27 * num_arms
    return 1.2 + 0.62 * num_arms * num_metrics


def _crowd(axes: Axes, arms: Sequence[ArmReport], data: ReportData, metric: Metric) -> None:
    """Make room for many rows, and draw the baseline through all of them."""
    axes.set_yticks(range(len(arms)), [_shortened(arm.label) for arm in arms], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.set_xlabel("loss (nats per token)" if metric == "loss" else "accuracy (%)", fontsize=8.5)
    baseline = _score(data.baseline_arm.after, metric)
    if baseline is not None and baseline.mean is not None:
        at = baseline.mean * difference_scale(metric)
        axes.axvline(at, color=MUTED, linewidth=1.0, linestyle=(0, (5, 3)), zorder=1)


def _shortened(label: str) -> str:
    """Cut a long name in its middle: arms are often told apart by how they end."""
    if len(label) <= _LONGEST_LABEL:
        return label
    half = _LONGEST_LABEL // 2
    return f"{label[:half]}\N{HORIZONTAL ELLIPSIS}{label[-half + 1 :]}"


def _score(evaluation: Evaluation | None, metric: Metric) -> Score | None:
    if evaluation is None:
        return None
    score = evaluation.loss if metric == "loss" else evaluation.accuracy
    return score if score is not None and score.mean is not None else None


def _draw_scores(axes: Axes, arms: Sequence[ArmReport], data: ReportData, metric: Metric) -> None:
    scale = difference_scale(metric)
    is_crowded = len(arms) > _MOST_ARMS_APART
    for row, arm in enumerate(arms):
        number = 0 if is_crowded else data.arms.index(arm)
        for offset, evaluation in ((-0.15, arm.before), (0.15, arm.after)):
            score = _score(evaluation, metric)
            if score is None or score.mean is None:
                continue
            axes.errorbar(
                score.mean * scale,
                row + offset,
                xerr=1.96 * scale * (score.standard_error or 0),
                fmt=MARKERS[number % len(MARKERS)],
                color=MUTED if is_crowded and evaluation is arm.before else arm_colour(number),
                markerfacecolor=PAPER if evaluation is arm.before else arm_colour(number),
                markersize=4.5 if is_crowded else 6.5,
                markeredgewidth=1.4,
                capsize=2 if is_crowded else 3,
                linewidth=1.1 if is_crowded else 1.4,
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
        axes.axvline(100 * chance, color=MUTED, linestyle=(0, (2, 2)), linewidth=1.2)
        axes.annotate(
            "chance",
            (100 * chance, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            va="bottom",
            ha="center",
            color=MUTED,
            fontsize=9.5,
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
