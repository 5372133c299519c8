"""The rule of the verdict, case by case and as a whole."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.study.analysis.budget import ArmCosts, BudgetMatch, budget_matches
from flanmoe.study.analysis.verdict import PValues, Verdict, decide

SMALL, LARGE = 0.001, 0.5


def _tests(p: float, p_margin: float) -> PValues:
    return PValues(p=p / 2, p_holm=p, p_margin=p_margin / 2, p_margin_holm=p_margin)


def _decide(mean: float, tests: PValues | None, **changes: Any) -> Verdict:
    given = {"claimed": "higher", "margin": 1.0, "detectable": 0.9, "num_seeds": 3, "budgets": ()}
    return decide(mean, tests, **{**given, **changes})


@pytest.mark.parametrize(
    ("mean", "p", "p_margin", "claimed", "verdict"),
    [
        (1.5, SMALL, LARGE, "higher", "reproduced"),
        (5.0, SMALL, SMALL, "higher", "reproduced"),
        (-1.5, SMALL, SMALL, "higher", "contradicted"),
        (0.0, LARGE, SMALL, "higher", "contradicted"),
        (0.5, SMALL, SMALL, "higher", "contradicted"),
        (0.5, LARGE, LARGE, "higher", "inconclusive"),
        (-0.2, LARGE, LARGE, "higher", "inconclusive"),
        (-1.5, SMALL, LARGE, "lower", "reproduced"),
        (1.5, SMALL, SMALL, "lower", "contradicted"),
        (0.1, SMALL, LARGE, "same", "reproduced"),
        (2.1, LARGE, SMALL, "same", "contradicted"),
        (0.9, LARGE, LARGE, "same", "inconclusive"),
    ],
)
def test_each_case(mean: float, p: float, p_margin: float, claimed: str, verdict: str) -> None:
    assert _decide(mean, _tests(p, p_margin), claimed=claimed) == verdict


@given(st.floats(-5, 5), st.floats(0, 1), st.floats(0, 1), st.floats(1.001, 99))
def test_a_design_too_small_for_its_margin_is_no_evidence(
    mean: float, p: float, p_margin: float, detectable: float
) -> None:
    assert _decide(mean, _tests(p, p_margin), detectable=detectable) == "underpowered"


@given(st.floats(-5, 5), st.floats(0, 1), st.floats(0, 1))
def test_turning_the_claim_round_never_keeps_a_reproduction(
    mean: float, p: float, p_margin: float
) -> None:
    tests = _tests(p, p_margin)
    verdicts = [_decide(mean, tests, claimed=claimed) for claimed in ("higher", "lower")]
    assert verdicts.count("reproduced") <= 1


def test_one_seed_is_underpowered_and_equal_differences_are_inconclusive() -> None:
    assert _decide(5.0, _tests(SMALL, SMALL), num_seeds=1, detectable=None) == "underpowered"
    assert _decide(5.0, None, detectable=None) == "inconclusive"


@pytest.mark.parametrize(
    ("budget", "verdict"),
    [
        ("flops_per_token", "not FLOP-matched"),
        ("training_flops", "not FLOP-matched"),
        ("tokens", "not token-matched"),
        ("active_parameters", "not parameter-matched"),
    ],
)
def test_a_budget_that_is_required_and_differs_comes_first(budget: Any, verdict: str) -> None:
    costs = {"a": ArmCosts(**{budget: 100.0}), "b": ArmCosts(**{budget: 110.0})}

    def matches(required: dict[Any, float]) -> tuple[BudgetMatch, ...]:
        return budget_matches([(("a",), ("b",))], costs, required)

    found = _tests(SMALL, LARGE)
    assert _decide(1.5, found, budgets=matches({budget: 0.05})) == verdict
    assert _decide(1.5, found, budgets=matches({budget: 0.05}), detectable=9.0) == verdict
    assert _decide(1.5, found, budgets=matches({budget: 0.1})) == "reproduced"
    assert _decide(1.5, found, budgets=matches({})) == "reproduced"
