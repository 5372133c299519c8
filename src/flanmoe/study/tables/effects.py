"""Tables of the effects of arms' factors, with both readings of relative gain."""

from collections.abc import Sequence

from flanmoe.study.analysis.factorial import EffectResult, FactorialTable
from flanmoe.study.number_text import listed, p_text, signed
from flanmoe.study.report_data import ReportData
from flanmoe.study.tables.base import Section, TextTable

_MOST_INTERACTIONS = 60
_HEADER = ("effect", "estimate", "95 % interval", "p", "p (Holm)", "detectable")


def effects_section(data: ReportData) -> Section:
    """Main effects and interactions of two factors, metric by metric."""
    tables = [table for found in data.effects for table in (_mains(found), _interactions(found))]
    failed = list(dict.fromkeys(arm for found in data.effects for arm in found.failed))
    sentences = ["Means over matched pairs of arms, which differ in nothing else. p is two-sided."]
    if failed:
        sentences.append(
            f"Left out with what they alone are matched with, for want of scores: {listed(failed)}."
        )
    sentences += dict.fromkeys(one for found in data.effects for one in found.left_out)
    return Section("Effects of factors", tuple(tables), tuple(sentences))


def _mains(table: FactorialTable) -> TextTable:
    mains = table.mains
    reasons = list(
        dict.fromkeys(
            reason for effect in mains if effect.relative for reason in effect.relative.reasons
        )
    )
    rows = tuple((*_row(effect), *_gains(effect, reasons)) for effect in mains)
    note = " ".join(
        [
            "Relative gains are over cells of task and pair of arms: ratio of means, (mean with \N{MINUS SIGN} "
            "mean without) / mean without; mean of ratios, the mean over cells of (with \N{MINUS SIGN} "
            "without) / without.",
            *(f"[{number}] {reason}" for number, reason in enumerate(reasons, start=1)),
        ]
    )
    header = (*_HEADER, "ratio of means", "mean of ratios")
    return TextTable(header, rows, note=note, title=f"Main effects: {_what(table)}")


def _interactions(table: FactorialTable) -> TextTable:
    every = table.interactions
    by_p = sorted(every, key=lambda effect: 1.0 if effect.p is None else effect.p)
    kept = {effect.name for effect in by_p[:_MOST_INTERACTIONS]}
    shown = [effect for effect in every if effect.name in kept]
    note = (
        "How much larger the first effect is where the second factor has the first of its two levels: mean of "
        "differences of differences, not halved."
    )
    if len(shown) < len(every):
        note += (
            f" The {len(shown)} of {len(every)} with the smallest p-values; report.json has all."
        )
    rows = tuple(map(_row, shown))
    return TextTable(_HEADER, rows, note=note, title=f"Interactions: {_what(table)}")


def _what(table: FactorialTable) -> str:
    metric = table.metric
    return f"{metric.name.replace('_', ' ')} ({metric.unit})"


def _row(effect: EffectResult) -> tuple[str, ...]:
    text = effect.metric.text
    return (
        effect.name,
        text(effect.estimate),
        f"{text(effect.low)} to {text(effect.high)}",
        "n/a" if effect.p is None else p_text(effect.p),
        "n/a" if effect.p_holm is None else p_text(effect.p_holm),
        "n/a" if effect.detectable is None else text(effect.detectable, sign=False),
    )


def _gains(effect: EffectResult, reasons: Sequence[str]) -> tuple[str, str]:
    relative = effect.relative
    if relative is None:
        return "n/a", "n/a"
    return (
        _gain(relative.ratio_of_means, "ratio of means", relative.reasons, reasons),
        _gain(relative.mean_of_ratios, "mean of ratios", relative.reasons, reasons),
    )


def _gain(value: float | None, reading: str, own: Sequence[str], every: Sequence[str]) -> str:
    """Format a gain, or point to the reason why it has no meaning."""
    if value is not None:
        return f"{signed(100 * value, 1)} %"
    numbers = [every.index(reason) + 1 for reason in own if reason.startswith(f"{reading}: ")]
    return " ".join(["none", *(f"[{number}]" for number in numbers)])
