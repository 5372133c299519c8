"""Tables of claims: their numbers, and the budgets of the arms that they compare."""

from collections.abc import Sequence

from flanmoe.study.analysis.budget import BUDGETS, BudgetMatch
from flanmoe.study.analysis.claim_result import ClaimResult
from flanmoe.study.number_text import exact, p_text, percent
from flanmoe.study.report_claims import (
    detectable_text,
    estimate_text,
    interval_text,
    margin_text,
)
from flanmoe.study.report_data import ReportData
from flanmoe.study.tables.base import Section, TextTable


def claims_section(data: ReportData) -> Section:
    """Every number behind every claim; nothing where the study makes none."""
    if not data.claims:
        return Section("Claims in numbers", ())
    tables = (claims_table(data.claims), budgets_table(data.claims))
    return Section("Claims in numbers", tables)


def claims_table(results: Sequence[ClaimResult]) -> TextTable:
    """One row a claim: numbers in the unit that the metric is shown in."""
    header = (
        "claim",
        "statement",
        "verdict",
        "estimate",
        "95 % interval",
        "p",
        "p (Holm)",
        "detectable",
        "margin",
        "unit",
        "seeds",
        "examples",
        "planted effect found",
        "found in nothing",
    )
    return TextTable(
        header,
        tuple(_row(result) for result in results),
        note="detectable: the smallest true difference that 80 % of studies of this design would find; above "
        "the margin a claim is underpowered and counts as no evidence.",
        title="Claims",
    )


def budgets_table(results: Sequence[ClaimResult]) -> TextTable:
    """One row a pair of arms that a claim lets stand for each other: the ratio of each budget."""
    rows = [
        (
            result.name,
            f"{arm} / {twin}",
            *(_ratio(result.budgets, budget, (arm, twin)) for budget in BUDGETS),
        )
        for result in results
        for arm, twin in dict.fromkeys((match.arm, match.twin) for match in result.budgets)
    ]
    header = ("claim", "arms", *(budget.replace("_", " ") for budget in BUDGETS))
    note = "The first arm's budget over the second's; * where the claim requires a match, ! where it fails."
    return TextTable(header, tuple(rows), note=note, title="Budgets")


def _row(result: ClaimResult) -> tuple[str, ...]:
    start = (result.name, result.statement, result.verdict)
    margin = margin_text(result)
    found = result.measurement
    if found is None:
        return (*start, *[""] * 5, margin, result.metric.unit, *[""] * 4)
    return (
        *start,
        estimate_text(result),
        interval_text(result),
        p_text(found.tests.p) if found.tests else "",
        p_text(found.tests.p_holm) if found.tests else "",
        detectable_text(result),
        margin,
        result.metric.unit,
        exact(len(found.seeds)),
        exact(found.num_examples),
        percent(found.control.found_share, 0) if found.control else "",
        percent(found.control.false_share, 0) if found.control else "",
    )


def _ratio(matches: Sequence[BudgetMatch], budget: str, pair: tuple[str, str]) -> str:
    match = next(one for one in matches if (one.budget, one.arm, one.twin) == (budget, *pair))
    text = "unknown" if match.ratio is None else f"{match.ratio:.3f}"
    return text + ("" if not match.required else "*" if match.matched else "*!")
