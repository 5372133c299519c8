"""The verdict on a claim, from its numbers (DESIGN 8.5).

In this order:

1. `not measured`: an arm has no scores, or none that can be compared.
2. `not FLOP-matched` (`not token-matched`, `not parameter-matched`): a budget that the claim requires differs.
3. `underpowered`: the minimum detectable effect lies above the margin, or one seed gives none. It counts as
   no evidence, a significant difference included: where small effects are missed, those that are found are
   found too large (Gelman and Carlin 2014, Perspectives on Psychological Science 9).
4. `contradicted`: an effect as large as the margin in the claimed direction is ruled out. That holds for a
   difference the other way, for one that is nil, and for one that is there but too small to matter.
5. `reproduced`: the effect in the claimed direction is significant.
6. `inconclusive`: neither, or all differences are the same number.

4 and 5 are tests at the 5 % level after Holm's correction over the claims of the study. The margin and the
power ask for each other: where the minimum detectable effect equals the margin, a true effect of that size is
reproduced, and a true effect of zero contradicted, in 80 % of studies.
"""

from collections.abc import Sequence
from typing import Literal

from flanmoe.core.config import Config
from flanmoe.study.analysis.budget import Budget, BudgetMatch
from flanmoe.study.analysis.contrast import ContrastEstimate

ALPHA = 0.05

Verdict = Literal[
    "reproduced",
    "contradicted",
    "inconclusive",
    "underpowered",
    "not FLOP-matched",
    "not token-matched",
    "not parameter-matched",
    "not measured",
]
Claimed = Literal["higher", "lower", "same"]

_UNMATCHED: dict[Budget, Verdict] = {
    "flops_per_token": "not FLOP-matched",
    "training_flops": "not FLOP-matched",
    "tokens": "not token-matched",
    "active_parameters": "not parameter-matched",
}


class PValues(Config):
    """The two tests of a claim.

    Attributes:
        p: two-sided p-value of "no difference"; of "not the same" for a claim of sameness.
        p_holm: the same after Holm's correction over the claims of the study.
        p_margin: two-sided p-value of "a difference of exactly the margin"; for a claim of sameness, of "a
            difference no larger than the margin".
        p_margin_holm: the same after Holm's correction.
    """

    p: float
    p_holm: float
    p_margin: float
    p_margin_holm: float


def claimed_sign(claimed: Claimed) -> int:
    """Sign of the contrast that is claimed; 0 for a claim of sameness."""
    return {"higher": 1, "lower": -1, "same": 0}[claimed]


def p_values(estimate: ContrastEstimate, claimed: Claimed, margin: float) -> tuple[float, float]:
    """Return the p-values of the two tests of a claim, uncorrected; see `PValues`."""
    if claimed == "same":
        # Two one-sided tests (Schuirmann 1987, Journal of Pharmacokinetics and Biopharmaceutics 15).
        inside = max(estimate.p_above(-margin), estimate.p_below(margin))
        outside = min(estimate.p_above(margin), estimate.p_below(-margin))
        return min(1.0, 2 * inside), min(1.0, 2 * outside)
    return estimate.p_value(), estimate.p_value(claimed_sign(claimed) * margin)


def decide(
    mean: float,
    tests: PValues | None,
    *,
    claimed: Claimed,
    margin: float,
    detectable: float | None,
    num_seeds: int,
    budgets: Sequence[BudgetMatch],
) -> Verdict:
    """Return the verdict on a claim that was measured.

    Args:
        mean: the estimate, in the metric's own unit.
        tests: None where all differences are equal, so that there is nothing to test.
        claimed: the direction.
        margin: the smallest difference that matters.
        detectable: the minimum detectable effect, None where there is none.
        num_seeds: seeds behind the estimate.
        budgets: budget matches of the claim.
    """
    for match in budgets:
        if match.required and not match.matched:
            return _UNMATCHED[match.budget]
    if num_seeds < 2:
        return "underpowered"
    if tests is None or detectable is None:
        return "inconclusive"
    if detectable > margin:
        return "underpowered"
    sign = claimed_sign(claimed)
    if tests.p_margin_holm <= ALPHA and (claimed == "same" or sign * mean < margin):
        return "contradicted"
    if tests.p_holm <= ALPHA and (claimed == "same" or sign * mean > 0):
        return "reproduced"
    return "inconclusive"
