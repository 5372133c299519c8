"""What became of the claims of a study: the headline of its report, and an entry for each claim."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from flanmoe.study.analysis.budget import Budget
from flanmoe.study.analysis.claim_result import ClaimResult, Measurement
from flanmoe.study.analysis.verdict import Verdict
from flanmoe.study.number_text import listed, p_text, percent

Tone = Literal["good", "bad", "open", "weak", "void"]

_VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
_TONES: dict[Verdict, Tone] = {
    "reproduced": "good",
    "contradicted": "bad",
    "inconclusive": "open",
    "underpowered": "weak",
}
_MOST_NAMES = 3


@dataclass(frozen=True, slots=True)
class ClaimEntry:
    """One claim as a reader meets it first.

    Attributes:
        name, statement, verdict, sentence: those of the claim.
        tone: how its badge looks; the badge says the verdict in words.
        numbers: what and how much; what was not measured is left out.
        remarks: sentences about what was left out, and about controls that failed.
    """

    name: str
    statement: str
    verdict: Verdict
    tone: Tone
    sentence: str
    numbers: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...]


def tone(verdict: Verdict) -> Tone:
    """Return how a verdict looks; all that were not compared look alike."""
    return _TONES.get(verdict, "void")


def claims_headline(results: Sequence[ClaimResult]) -> str:
    """Say how many claims got which verdict, and which claims these are."""
    by_verdict = {
        verdict: [one.name for one in results if one.verdict == verdict] for verdict in _VERDICTS
    }
    if len(results) == 1:
        return f"Claim {results[0].verdict}: {results[0].name}."
    reproduced = by_verdict.pop("reproduced")
    start = f"{len(reproduced) or 'None'} of {len(results)} claims reproduced"
    parts = [f"{start}: {listed(reproduced, most=_MOST_NAMES)}" if reproduced else start]
    parts += [
        f"{len(names)} {verdict}: {listed(names, most=_MOST_NAMES)}"
        for verdict, names in by_verdict.items()
        if names
    ]
    return f"{'; '.join(parts)}."


def claim_entries(results: Sequence[ClaimResult]) -> tuple[ClaimEntry, ...]:
    """Return an entry a claim, in their order."""
    return tuple(
        ClaimEntry(
            name=result.name,
            statement=result.statement,
            verdict=result.verdict,
            tone=tone(result.verdict),
            sentence=result.sentence,
            numbers=_numbers(result),
            remarks=(*result.left_out, *_failed_control(result.measurement)),
        )
        for result in results
    )


def estimate_text(result: ClaimResult) -> str:
    """Format the estimate without its interval and unit; empty where nothing was compared."""
    found = result.measurement
    return result.metric.text(found.estimate) if found else ""


def interval_text(result: ClaimResult) -> str:
    """Format the interval without its unit; empty where nothing was compared."""
    found = result.measurement
    text = result.metric.text
    return f"{text(found.low)} to {text(found.high)}" if found else ""


def detectable_text(result: ClaimResult) -> str:
    """Format the smallest difference that the design would find; `n/a` where it has no measure."""
    found = result.measurement
    if found is None or found.detectable is None:
        return "n/a"
    return result.metric.text(found.detectable, sign=False)


def margin_text(result: ClaimResult) -> str:
    """Format the margin without its unit."""
    return result.metric.text(result.margin, sign=False)


def _numbers(result: ClaimResult) -> tuple[tuple[str, str], ...]:
    found = result.measurement
    unit = result.metric.unit
    if found is None:
        return (("margin", f"{margin_text(result)} {unit}"), *_budgets(result))
    tests = found.tests
    return (
        ("estimate", f"{estimate_text(result)} {unit}"),
        ("95 % interval", interval_text(result)),
        *([("p (Holm)", p_text(tests.p_holm))] if tests else []),
        ("detectable", detectable_text(result)),
        ("margin", margin_text(result)),
        *_budgets(result),
    )


def _budgets(result: ClaimResult) -> list[tuple[str, str]]:
    """Say of each budget that the claim requires whether it is the same for all arms."""
    required: dict[Budget, bool] = {}
    for one in result.budgets:
        if one.required:
            required[one.budget] = required.get(one.budget, True) and one.matched
    return [
        (f"same {budget.replace('_', ' ').replace('flops', 'FLOPs')}", "yes" if matched else "no")
        for budget, matched in required.items()
    ]


def _failed_control(found: Measurement | None) -> list[str]:
    control = found.control if found else None
    if control is None or control.passed:
        return []
    return [
        f"The control failed: a planted effect was found in {percent(control.found_share, 0)} of the copies "
        f"with it, and one in {percent(control.false_share, 0)} of the copies without. The numbers of this "
        "claim cannot be trusted."
    ]
