"""What a study found about one claim, as plain data for JSON, and the tables of a report."""

from collections.abc import Sequence

from flanmoe.core.config import Config
from flanmoe.study.analysis.budget import BUDGETS, BudgetMatch
from flanmoe.study.analysis.control import Control
from flanmoe.study.analysis.metric import Metric
from flanmoe.study.analysis.power import Scale
from flanmoe.study.analysis.verdict import Claimed, PValues, Verdict
from flanmoe.study.report_text import exact, percent
from flanmoe.study.tables.base import TextTable


class Measurement(Config):
    """The numbers behind a verdict; all differences are in the metric's own unit.

    Attributes:
        estimate: the contrast.
        standard_error: its standard error over seeds and examples.
        degrees_of_freedom: of the standard error.
        low, high: interval at 95 %, for this claim alone: not corrected for the other claims.
        t_interval, bootstrap_interval: the two intervals that it reaches over.
        tests: p-values; None where all differences are equal.
        detectable: minimum detectable effect at 80 % power; None with one seed, or where all are equal.
        sufficient: scales at which it would fall to the margin; empty where it has, and where none would do.
        control: what planted effects showed; None where there is no minimum detectable effect.
        seeds: seeds that all arms ran with.
        num_tasks, num_examples: tasks, and examples in all of them, that all arms have.
    """

    estimate: float
    standard_error: float
    degrees_of_freedom: float
    low: float
    high: float
    t_interval: tuple[float, float]
    bootstrap_interval: tuple[float, float]
    tests: PValues | None
    detectable: float | None
    sufficient: tuple[Scale, ...]
    control: Control | None
    seeds: tuple[int, ...]
    num_tasks: int
    num_examples: int


class ClaimResult(Config):
    """A claim with its verdict.

    Attributes:
        name, statement: as the study's file has them.
        metric: what was compared.
        contrast: what was subtracted from what.
        claimed: the direction that the claim gives the contrast.
        margin: the smallest difference that matters, in the metric's own unit.
        verdict: the outcome.
        sentence: why, with the numbers.
        measurement: the numbers; None where nothing could be compared.
        budgets: every budget of the arms that stand for each other.
        num_claims: claims that were tested together.
        left_out: sentences about what not all arms have.
    """

    name: str
    statement: str
    metric: Metric
    contrast: str
    claimed: Claimed
    margin: float
    verdict: Verdict
    sentence: str
    measurement: Measurement | None = None
    budgets: tuple[BudgetMatch, ...] = ()
    num_claims: int
    left_out: tuple[str, ...] = ()


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


def p_text(p_value: float) -> str:
    """Format a p-value."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _row(result: ClaimResult) -> tuple[str, ...]:
    start = (result.name, result.statement, result.verdict)
    margin = result.metric.text(result.margin, sign=False)
    found = result.measurement
    if found is None:
        return (*start, *[""] * 5, margin, result.metric.unit, *[""] * 4)
    text = result.metric.text
    return (
        *start,
        text(found.estimate),
        f"{text(found.low)} to {text(found.high)}",
        p_text(found.tests.p) if found.tests else "",
        p_text(found.tests.p_holm) if found.tests else "",
        "" if found.detectable is None else text(found.detectable, sign=False),
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
