"""What a run cannot show, in sentences that follow from its data."""

import math
from collections.abc import Callable, Sequence

from flanmoe.study.arm_report import ArmReport
from flanmoe.study.number_text import exact, listed, ratio_text, short
from flanmoe.study.report_data import ReportData

# Routers add their own products, and an FFN beside experts can be made narrow but not left out.
_TOLERATED_FLOPS = 0.05
# Rows of one size hold a little more or less padding.
_TOLERATED_TOKENS = 0.02
# Beyond these one sentence for all arms says what a reader needs.
_MOST_ARMS_TOLD = 3
_MOST_NAMES = 8


def limits(data: ReportData) -> tuple[str, ...]:
    """What the run cannot show: the sentences that follow from the data, then those that it brings."""
    found = [*_scale_limit(data), *_seed_limit(data), *_interval_limit(data), *_seen_limit(data)]
    # Claims name the budgets that their arms must share and say where they do not; arms that no claim compares
    # may cost what they like.
    compute = [] if data.claims else _compute_limits(data)
    return (*found, *compute, *data.limits)


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
        f"{exact(num_seen)} of the examples that {listed(labels, most=_MOST_NAMES)} answered were seen in "
        "training; scores on them say nothing about new questions."
        for num_seen, labels in labels_by_count.items()
    ]


def _compute_limits(data: ReportData) -> list[str]:
    """Say so where arms differ in what a fair comparison holds equal."""
    return [*_flops_limits(data), *_token_limits(data), *_mixture_limits(data)]


def _flops_limits(data: ReportData) -> list[str]:
    baseline = data.baseline_arm
    unequal = _unequal(data, lambda arm: arm.flops.total, tolerated=_TOLERATED_FLOPS)
    if len(unequal) <= _MOST_ARMS_TOLD:
        return [
            f"{arm.label} spends {ratio_text(arm.flops.total, baseline.flops.total)} the FLOPs per token of "
            f"{baseline.label}: this is no comparison at equal compute."
            for arm in unequal
        ]
    flops = [arm.flops.total for arm in unequal]
    ends = [ratio_text(end, baseline.flops.total) for end in (min(flops), max(flops))]
    span = " to ".join(dict.fromkeys(ends))
    return [
        f"{exact(len(unequal))} arms spend {span} the FLOPs per token of {baseline.label}: "
        f"{_names(unequal)}. With these there is no comparison at equal compute."
    ]


def _token_limits(data: ReportData) -> list[str]:
    baseline = data.baseline_arm
    theirs = baseline.ledger.real_tokens
    unequal = _unequal(data, lambda arm: arm.ledger.real_tokens, tolerated=_TOLERATED_TOKENS)
    if len(unequal) <= _MOST_ARMS_TOLD:
        return [
            f"{arm.label} was tuned on {exact(arm.ledger.real_tokens)} tokens, {baseline.label} on "
            f"{exact(theirs)}: this is no comparison at equal data."
            for arm in unequal
        ]
    tokens = [arm.ledger.real_tokens for arm in unequal]
    return [
        f"{baseline.label} was tuned on {exact(theirs)} tokens, and {exact(len(unequal))} arms on "
        f"{exact(min(tokens))} to {exact(max(tokens))}: {_names(unequal)}. With these there is no comparison "
        "at equal data."
    ]


def _mixture_limits(data: ReportData) -> list[str]:
    drawn_from = {
        arm.label: {
            number for number, one in enumerate(data.data.mixtures) if arm.label in one.arms
        }
        for arm in data.arms
        if arm.was_tuned
    }
    if len({frozenset(numbers) for numbers in drawn_from.values()}) < 2:
        return []
    return [
        f"{listed(list(drawn_from), most=_MOST_NAMES)} were not tuned on the same data: a difference between "
        "them is also one in the form of answer that the data teach."
    ]


def _names(arms: Sequence[ArmReport]) -> str:
    return listed([arm.label for arm in arms], most=_MOST_NAMES)


def _unequal(
    data: ReportData, cost: Callable[[ArmReport], float], *, tolerated: float
) -> list[ArmReport]:
    """Return the arms whose cost differs from the baseline's by more than is tolerated."""
    theirs = cost(data.baseline_arm)
    return [arm for arm in data.arms if abs(cost(arm) - theirs) > tolerated * theirs]
