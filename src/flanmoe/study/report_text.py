"""The sentences of a report about scores and paired differences.

A sentence about a difference follows from its interval: only one that excludes zero says better or worse.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from flanmoe.study.arm_report import ArmReport, Evaluation, Score
from flanmoe.study.number_text import (
    Metric,
    difference_scale,
    difference_unit,
    exact,
    listed,
    percent,
    ratio_text,
    signed,
)
from flanmoe.study.report_claims import claims_headline
from flanmoe.study.report_data import Comparison, ReportData

EVIDENCE_RULE = "Differences smaller than their interval are not evidence."

# Beyond these a reader wants what differs first, and the rest in a line.
_MOST_PAIRS_TOLD = 3
_MOST_TOLD = 12
_MOST_NAMES = 6


def loss_text(score: Score | None) -> str:
    """Format a loss: 1.842 ± 0.031."""
    if score is None:
        return "not evaluated"
    if score.mean is None:
        return "not finite"
    return f"{score.mean:.3f}" + _plus_minus(score.standard_error, 1, 3)


def accuracy_text(score: Score | None) -> str:
    """Format an accuracy: 41.3 % ± 3.1."""
    if score is None:
        return "no choices"
    if score.mean is None:
        return "not finite"
    return percent(score.mean) + _plus_minus(score.standard_error, 100, 1)


def difference_text(comparison: Comparison, value: float) -> str:
    """Format a difference of this comparison's metric without its unit."""
    return signed(value * difference_scale(comparison.metric), _digits(comparison.metric))


def interval_text(comparison: Comparison) -> str:
    """Format the interval: 95 % interval −0.033 to −0.009."""
    low, high = (difference_text(comparison, end) for end in (comparison.low, comparison.high))
    return f"{100 * comparison.confidence:g} % interval {low} to {high}"


def difference_sentence(comparison: Comparison) -> str:
    """Say what one paired comparison shows, and no more."""
    subject, reference = _sides(comparison)
    support = f"{interval_text(comparison)}; {_sample(comparison)}"
    if comparison.verdict == "unclear":
        return (
            f"No evidence of a difference: the {comparison.metric} of {subject} minus that of {reference} is "
            f"{_amount(comparison, signed_amount=True)}, and its interval includes zero ({support})."
        )
    direction = "lower" if comparison.mean < 0 else "higher"
    return (
        f"{comparison.verdict.capitalize()}: the {comparison.metric} of {subject} is {_amount(comparison)} "
        f"{direction} than that of {reference} ({support})."
    )


def difference_sentences(comparisons: Sequence[Comparison]) -> tuple[tuple[str, str], ...]:
    """Return verdict and sentence of each comparison; of many, those that show nothing are gathered.

    Where many show something, these are gathered too, by what they show.
    """
    if len(comparisons) <= _MOST_TOLD:
        return tuple((item.verdict, difference_sentence(item)) for item in comparisons)
    clear = [item for item in comparisons if item.verdict != "unclear"]
    if len(clear) <= _MOST_TOLD:
        told = [(item.verdict, difference_sentence(item)) for item in clear]
    else:
        told = _gathered(comparisons, "better") + _gathered(comparisons, "worse")
    return (*told, *_gathered(comparisons, "unclear"))


def _gathered(comparisons: Sequence[Comparison], shown: str) -> list[tuple[str, str]]:
    """One sentence for all comparisons of a metric with the same reference that show the same."""
    groups: dict[str, list[Comparison]] = {}
    for item in comparisons:
        if item.verdict == shown:
            groups.setdefault(_start(item), []).append(item)
    zero = "includes" if shown == "unclear" else "excludes"
    return [
        (
            shown,
            f"{start}, each interval {zero} zero: "
            f"{listed(_subjects(group, comparisons), most=_MOST_NAMES)}.",
        )
        for start, group in groups.items()
    ]


def _start(item: Comparison) -> str:
    reference = _sides(item)[1]
    if item.verdict == "unclear":
        return f"No evidence of a difference in {item.metric} from {reference}"
    direction = "lower" if item.mean < 0 else "higher"
    return f"{item.verdict.capitalize()}: {item.metric} {direction} than that of {reference}"


def _subjects(group: Sequence[Comparison], comparisons: Sequence[Comparison]) -> list[str]:
    """Name the subjects, with the seeds where not all of several seeds show the same."""
    seeds: dict[str, list[str]] = {}
    for item in group:
        found = seeds.setdefault(item.subject, [])
        if item.seed is not None:
            found.append(str(item.seed))
    like = group[0]
    of_all = Counter(
        item.subject for item in comparisons if (item.kind, item.metric) == (like.kind, like.metric)
    )
    return [
        subject
        if not found or 1 < len(found) == of_all[subject]
        else f"{subject} (seed{'s' if len(found) > 1 else ''} {', '.join(found)})"
        for subject, found in seeds.items()
    ]


def verdict(data: ReportData) -> str:
    """The first sentence of the report: what became of its claims.

    Without claims: what the paired differences between arms show, at which cost.
    """
    if data.claims:
        return claims_headline(data.claims)
    between = [comparison for comparison in data.comparisons if comparison.kind == "arms"]
    if between:
        return _verdict_between(data, between)
    if data.comparisons:
        subjects = dict.fromkeys(comparison.subject for comparison in data.comparisons)
        return " ".join(_tuning_sentence(data.comparisons, subject) for subject in subjects)
    return "No paired comparison was made, so this report claims no difference."


def _verdict_between(data: ReportData, between: Sequence[Comparison]) -> str:
    pairs = list(dict.fromkeys((item.subject, item.reference) for item in between))
    if len(pairs) <= _MOST_PAIRS_TOLD:
        return " ".join(_pair_sentence(data, between, pair) for pair in pairs)
    clear = [item for item in between if item.verdict != "unclear"]
    told = list(dict.fromkeys((item.subject, item.reference) for item in clear))
    if len(told) <= _MOST_PAIRS_TOLD:
        sentences = [_pair_sentence(data, between, pair) for pair in told]
    else:
        sentences = [_many_differ(clear, num_told=len(told), num_pairs=len(pairs))]
    if len(told) < len(pairs):
        metrics = " or ".join(dict.fromkeys(item.metric for item in between))
        alike = f"{len(pairs) - len(told)} {'other ' if told else ''}arms"
        sentences.append(
            f"Against {between[0].reference}, {alike} show no measurable difference in {metrics}."
        )
    return " ".join(sentences)


def _many_differ(clear: Sequence[Comparison], *, num_told: int, num_pairs: int) -> str:
    findings: dict[str, dict[str, None]] = {}
    for item in clear:
        findings.setdefault(f"{item.verdict} {item.metric}", {})[item.subject] = None
    parts = [f"{exact(len(names))} a {finding}" for finding, names in findings.items()]
    seeds = {item.seed for item in clear}
    return (
        f"Against {clear[0].reference}, {num_told} of {num_pairs} arms show a measurable difference"
        f"{' with at least one seed' if len(seeds) > 1 else ''}: {listed(parts)}."
    )


def _plus_minus(error: float | None, scale: float, digits: int) -> str:
    return "" if error is None else f" ± {error * scale:.{digits}f}"


def _digits(metric: Metric) -> int:
    return 4 if metric == "loss" else 1


def _amount(comparison: Comparison, *, signed_amount: bool = False) -> str:
    mean = comparison.mean if signed_amount else abs(comparison.mean)
    text = difference_text(comparison, mean)
    return f"{text if signed_amount else text.lstrip('+')} {difference_unit(comparison.metric)}"


def _sides(comparison: Comparison) -> tuple[str, str]:
    if comparison.kind == "arms":
        return f"{comparison.subject} after tuning", comparison.reference
    return f"{comparison.subject} after tuning", "the same model before it"


def _sample(comparison: Comparison) -> str:
    error = comparison.standard_error
    text = "" if error is None else f"standard error {_error_text(comparison, error)}, "
    seed = "" if comparison.seed is None else f", seed {comparison.seed}"
    return f"{text}n = {exact(comparison.num_examples)}{seed}"


def _error_text(comparison: Comparison, error: float) -> str:
    return f"{error * difference_scale(comparison.metric):.{_digits(comparison.metric)}f}"


def _finding(comparison: Comparison) -> str:
    seed = "" if comparison.seed is None else f"seed {comparison.seed}"
    if comparison.verdict == "unclear":
        return f"no measurable difference in {comparison.metric}" + (f" ({seed})" if seed else "")
    direction = "lower" if comparison.mean < 0 else "higher"
    details = f"{_amount(comparison)} {direction}" + (f", {seed}" if seed else "")
    return f"a {comparison.verdict} {comparison.metric} ({details})"


def _pair_sentence(
    data: ReportData, comparisons: Iterable[Comparison], pair: tuple[str, str]
) -> str:
    chosen = [item for item in comparisons if (item.subject, item.reference) == pair]
    findings = listed([_finding(item) for item in chosen])
    return f"Against {pair[1]}, {pair[0]} after tuning shows {findings}{_cost_clause(data, pair)}."


def _tuning_sentence(comparisons: Iterable[Comparison], subject: str) -> str:
    findings = listed([_finding(item) for item in comparisons if item.subject == subject])
    return f"After tuning, {subject} shows {findings} against the same model before it."


def _cost_clause(data: ReportData, pair: tuple[str, str]) -> str:
    subject, reference = (data.arm(label) for label in pair)
    if subject is None or reference is None:
        return ""
    costs = (
        ("the FLOPs per token", subject.flops.total, reference.flops.total),
        ("the tuning time", subject.ledger.seconds, reference.ledger.seconds),
        ("the peak memory", peak_memory(subject), peak_memory(reference)),
    )
    known = [
        f"{ratio_text(ours, theirs)} {what}" for what, ours, theirs in costs if ours and theirs
    ]
    return f"; it costs {listed(known)}" if known else ""


def peak_memory(arm: ArmReport) -> int:
    """Peak of tuning in bytes; 0 where the system could not tell."""
    measured = arm.memory.measured if arm.memory else None
    return measured or arm.ledger.peak_memory_bytes


def evaluated_examples(evaluation: Evaluation | None) -> str:
    """Format how many examples an evaluation is over."""
    if evaluation is None:
        return "not evaluated"
    parts = {"loss": evaluation.loss, "accuracy": evaluation.accuracy}
    return ", ".join(
        f"{exact(score.num_examples)} for {name}"
        for name, score in parts.items()
        if score is not None
    )
