"""Budget matches: whether the arms of a claim had the same to spend, and by how much not.

A difference between arms is one between methods only where the budget that the claim names is the same.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from flanmoe.core.config import Config
from flanmoe.study.number_text import short

Budget = Literal["tokens", "training_flops", "flops_per_token", "active_parameters"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)
TOLERANCE = 0.05
_WORDS: Mapping[Budget, str] = {
    "tokens": "training tokens",
    "training_flops": "training FLOPs",
    "flops_per_token": "FLOPs per token",
    "active_parameters": "active parameters",
}

Side = tuple[str, ...]


class ArmCosts(Config):
    """What an arm cost, the mean over its seeds; None where it was not counted.

    Attributes:
        tokens: real tokens that it was trained on, all stages together.
        training_flops: floating-point operations of its training.
        flops_per_token: operations of one token's forward pass.
        active_parameters: parameters that one token passes through.
    """

    tokens: float | None = None
    training_flops: float | None = None
    flops_per_token: float | None = None
    active_parameters: float | None = None


class BudgetMatch(Config):
    """One budget of an arm beside that of its twin.

    Attributes:
        budget: which.
        arm, twin: the arms.
        value, twin_value: what each had; None where it was not counted.
        ratio: the arm's over its twin's; None where one of them is missing, or only the twin's is 0.
        tolerance: how far the ratio may be from 1.
        required: whether the claim asks for this match.
    """

    budget: Budget
    arm: str
    twin: str
    value: float | None
    twin_value: float | None
    ratio: float | None
    tolerance: float
    required: bool

    @property
    def matched(self) -> bool:
        """Whether the two lie within the tolerance."""
        return self.ratio is not None and abs(self.ratio - 1) <= self.tolerance

    @property
    def sentence(self) -> str:
        """What was compared, in words."""
        what = _WORDS[self.budget]
        if self.value is None or self.twin_value is None:
            unknown = self.arm if self.value is None else self.twin
            return f"the {what} of `{unknown}` were not counted"
        apart = (
            ""
            if self.ratio is None
            else f", {100 * abs(self.ratio - 1):.1f} % {'more' if self.ratio > 1 else 'fewer'}"
        )
        return (
            f"`{self.arm}` has {short(self.value)} {what} and `{self.twin}` {short(self.twin_value)}{apart} "
            f"({100 * self.tolerance:g} % allowed)"
        )


def budget_matches(
    sides: Sequence[tuple[Side, Side]],
    costs: Mapping[str, ArmCosts],
    required: Mapping[Budget, float],
) -> tuple[BudgetMatch, ...]:
    """Compare every budget of the arms of a claim.

    Args:
        sides: which arms stand for which: each arm of a left side is a twin of each arm of the right side.
        costs: by arm; what is missing counts as unknown, and unknown is not matched.
        required: the budgets that have to match, with their tolerances.
    """
    pairs = dict.fromkeys(
        (arm, twin) for left, right in sides for arm in left for twin in right if arm != twin
    )
    return tuple(_match(budget, pair, costs, required) for budget in BUDGETS for pair in pairs)


def _match(
    budget: Budget,
    pair: tuple[str, str],
    costs: Mapping[str, ArmCosts],
    required: Mapping[Budget, float],
) -> BudgetMatch:
    value, twin_value = (getattr(costs.get(arm, ArmCosts()), budget) for arm in pair)
    ratio = None
    if value is not None and twin_value is not None:
        # Two arms that spent nothing spent the same.
        ratio = value / twin_value if twin_value else (None if value else 1.0)
    return BudgetMatch(
        budget=budget,
        arm=pair[0],
        twin=pair[1],
        value=value,
        twin_value=twin_value,
        ratio=ratio,
        tolerance=required.get(budget, TOLERANCE),
        required=budget in required,
    )
