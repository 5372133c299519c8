"""What a study found about one claim, as plain data for JSON."""

from flanmoe.core.config import Config
from flanmoe.study.analysis.budget import BudgetMatch
from flanmoe.study.analysis.control import Control
from flanmoe.study.analysis.metric import Metric
from flanmoe.study.analysis.power import Scale
from flanmoe.study.analysis.verdict import Claimed, PValues, Verdict


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
