"""The sentences and number formats of a report.

A sentence about a difference follows from its interval: only one that excludes zero says better or worse.
"""

import math
from collections.abc import Iterable, Sequence

from flanmoe.study.arm_report import ArmReport, Evaluation, Score
from flanmoe.study.report_data import Comparison, Metric, ReportData

EVIDENCE_RULE = "Differences smaller than their interval are not evidence."

_MINUTES_A_DAY = 24 * 60
_DAYS_A_YEAR = 365.25
_SUFFIXES = ("", " k", " M", " G", " T", " P", " E")
# Routers add their own products, and an FFN beside experts can be made narrow but not left out.
_TOLERATED_FLOPS = 0.05
# Rows of one size hold a little more or less padding.
_TOLERATED_TOKENS = 0.02
# Beyond these a reader wants what differs first, and the rest in a line.
_MOST_PAIRS_TOLD = 3
_MOST_CLAIMS_TOLD = 12


def exact(number: int) -> str:
    """Format a count in full: 134,515,008."""
    return f"{number:,}"


def short(number: float) -> str:
    """Format a count to four digits with a suffix: 134.5 M. Below 1000 it stays as it is."""
    magnitude = float(number)
    for suffix in _SUFFIXES:
        # Compared after rounding, so that 999,960 reads 1.000 M and not 1000 k.
        if abs(float(f"{magnitude:.4g}")) < 1000 or suffix == _SUFFIXES[-1]:
            break
        magnitude /= 1000
    return f"{number:g}" if not suffix else f"{magnitude:#.4g}{suffix}"


def size(num_bytes: int) -> str:
    """Format a size in GiB, small ones in MiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Format seconds: 8.4 s, 5 min 12 s, 2 h 05 min, 12.5 days, 340 years."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    if minutes < _MINUTES_A_DAY:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    days = minutes / _MINUTES_A_DAY
    if days < 2 * _DAYS_A_YEAR:
        return f"{days:,.1f} days"
    return f"{days / _DAYS_A_YEAR:,.0f} years"


def percent(share: float, digits: int = 1) -> str:
    """Format a share between 0 and 1."""
    return f"{100 * share:.{digits}f} %"


def signed(number: float, digits: int) -> str:
    """Format with its sign, minus as a minus sign, and no sign at zero."""
    text = f"{number:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
    return text[1:] if not float(f"{number:.{digits}f}") else text


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


def ratio_text(arm: float, baseline: float) -> str:
    """Format how many times the baseline something is: 2.10×."""
    return f"{arm / baseline:.2f}×" if baseline else "n/a"


def listed(words: Sequence[str]) -> str:
    """Join words: a, b and c."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def difference_unit(metric: Metric) -> str:
    """Unit that differences of a metric are shown in."""
    return "nats per token" if metric == "loss" else "percentage points"


def difference_scale(metric: Metric) -> float:
    """Factor that turns a difference into its shown unit."""
    return 1.0 if metric == "loss" else 100.0


def difference_text(comparison: Comparison, value: float) -> str:
    """Format a difference of this comparison's metric without its unit."""
    return signed(value * difference_scale(comparison.metric), _digits(comparison.metric))


def interval_text(comparison: Comparison) -> str:
    """Format the interval: 95 % interval −0.033 to −0.009."""
    low, high = (difference_text(comparison, end) for end in (comparison.low, comparison.high))
    return f"{100 * comparison.confidence:g} % interval {low} to {high}"


def claim_sentence(comparison: Comparison) -> str:
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


def claims(comparisons: Sequence[Comparison]) -> tuple[tuple[str, str], ...]:
    """Return verdict and sentence of each comparison; of many, those that show nothing are gathered."""
    if len(comparisons) <= _MOST_CLAIMS_TOLD:
        return tuple((item.verdict, claim_sentence(item)) for item in comparisons)
    told = [
        (item.verdict, claim_sentence(item)) for item in comparisons if item.verdict != "unclear"
    ]
    gathered: dict[str, list[str]] = {}
    for item in comparisons:
        if item.verdict == "unclear":
            start = f"No evidence of a difference in {item.metric} from {_sides(item)[1]}"
            seed = "" if item.seed is None else f" (seed {item.seed})"
            gathered.setdefault(start, []).append(f"{item.subject}{seed}")
    return (
        *told,
        *(
            ("unclear", f"{start}, each interval includes zero: {listed(subjects)}.")
            for start, subjects in gathered.items()
        ),
    )


def verdict(data: ReportData) -> str:
    """The first sentence of the report: what the paired differences between arms show, at which cost."""
    between = [comparison for comparison in data.comparisons if comparison.kind == "arms"]
    if between:
        return _verdict_between(data, between)
    if data.comparisons:
        subjects = dict.fromkeys(comparison.subject for comparison in data.comparisons)
        return " ".join(_tuning_sentence(data.comparisons, subject) for subject in subjects)
    return "No paired comparison was made, so this report claims no difference."


def _verdict_between(data: ReportData, between: Sequence[Comparison]) -> str:
    pairs = dict.fromkeys((item.subject, item.reference) for item in between)
    told = list(pairs)
    if len(pairs) > _MOST_PAIRS_TOLD:
        clear = {(item.subject, item.reference) for item in between if item.verdict != "unclear"}
        told = [pair for pair in pairs if pair in clear]
    sentences = [_pair_sentence(data, between, pair) for pair in told]
    if len(told) < len(pairs):
        metrics = " or ".join(dict.fromkeys(item.metric for item in between))
        alike = f"{len(pairs) - len(told)} {'other ' if told else ''}arms"
        sentences.append(
            f"Against {between[0].reference}, {alike} show no measurable difference in {metrics}."
        )
    return " ".join(sentences)


def limits(data: ReportData) -> tuple[str, ...]:
    """What the run cannot show: the sentences that follow from the data, then those that it brings."""
    found = [*_scale_limit(data), *_seed_limit(data), *_interval_limit(data), *_seen_limit(data)]
    return (*found, *_compute_limits(data), *data.limits)


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


def _scale_limit(data: ReportData) -> list[str]:
    largest = max(arm.parameters.total for arm in data.arms)
    tokens = max(arm.ledger.real_tokens for arm in data.arms)
    if not largest or not tokens:
        return []
    return [
        f"This is {short(largest)} parameters at most, tuned on {short(tokens)} tokens: what holds here need "
        "not hold for larger models, more data or longer training."
    ]


def _seed_limit(data: ReportData) -> list[str]:
    if any(len(arm.seeds) > 1 for arm in data.arms) or not data.was_tuned:
        return []
    return [
        "Every arm ran with one seed: the intervals cover the choice of questions, not the luck of training, "
        "so another seed could turn a narrow result round."
    ]


def _interval_limit(data: ReportData) -> list[str]:
    if len(data.comparisons) < 2:
        return []
    expected = math.fsum(1 - comparison.confidence for comparison in data.comparisons)
    return [
        f"{len(data.comparisons)} intervals are shown, uncorrected: if nothing differed at all, "
        f"{expected:.2g} of them would still be expected to exclude zero."
    ]


def _seen_limit(data: ReportData) -> list[str]:
    labels_by_count: dict[int, list[str]] = {}
    for arm in data.arms:
        if arm.after is not None and arm.after.num_seen:
            labels_by_count.setdefault(arm.after.num_seen, []).append(arm.label)
    return [
        f"{exact(num_seen)} of the examples that {listed(labels)} answered were seen in training; scores on "
        "them say nothing about new questions."
        for num_seen, labels in labels_by_count.items()
    ]


def _compute_limits(data: ReportData) -> list[str]:
    """Say so where arms differ in what a fair comparison holds equal."""
    baseline = data.baseline_arm
    sentences: list[str] = []
    for arm in data.arms:
        if _differ(arm.flops.total, baseline.flops.total, tolerated=_TOLERATED_FLOPS):
            ratio = ratio_text(arm.flops.total, baseline.flops.total)
            sentences.append(
                f"{arm.label} spends {ratio} the FLOPs per token of {baseline.label}: this is no comparison at "
                "equal compute."
            )
        tokens = (arm.ledger.real_tokens, baseline.ledger.real_tokens)
        if _differ(*tokens, tolerated=_TOLERATED_TOKENS):
            sentences.append(
                f"{arm.label} was tuned on {exact(arm.ledger.real_tokens)} tokens, {baseline.label} on "
                f"{exact(baseline.ledger.real_tokens)}: this is no comparison at equal data."
            )
    drawn_from = {
        arm.label: {
            number for number, one in enumerate(data.data.mixtures) if arm.label in one.arms
        }
        for arm in data.arms
        if arm.was_tuned
    }
    if len({frozenset(numbers) for numbers in drawn_from.values()}) > 1:
        sentences.append(
            f"{listed(list(drawn_from))} were not tuned on the same data: a difference between them is also "
            "one in the form of answer that the data teach."
        )
    return sentences


def _differ(number: float, baseline: float, *, tolerated: float) -> bool:
    if not baseline:
        return bool(number)
    return abs(number / baseline - 1) > tolerated


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
