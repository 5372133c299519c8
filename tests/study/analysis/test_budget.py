"""Budget matches: within the tolerance, or by how much not."""

import pytest

from flanmoe.study.analysis.budget import ArmCosts, budget_matches

COSTS = {
    "dense": ArmCosts(tokens=1e6, flops_per_token=1e8, training_flops=3e14),
    "near": ArmCosts(tokens=1e6, flops_per_token=1.049e8, training_flops=3.147e14),
    "far": ArmCosts(tokens=0, flops_per_token=1.06e8, training_flops=0),
    "none": ArmCosts(tokens=0),
}


@pytest.mark.parametrize(
    ("arm", "twin", "budget", "ratio", "matched"),
    [
        ("near", "dense", "flops_per_token", 1.049, True),
        ("far", "dense", "flops_per_token", 1.06, False),
        ("dense", "near", "flops_per_token", 1 / 1.049, True),
        ("far", "dense", "tokens", 0.0, False),
        ("far", "none", "tokens", 1.0, True),
        ("dense", "none", "tokens", None, False),
        ("dense", "near", "active_parameters", None, False),
        ("dense", "absent", "tokens", None, False),
    ],
)
def test_one_match(arm: str, twin: str, budget: str, ratio: float | None, matched: bool) -> None:
    found = budget_matches([((arm,), (twin,))], COSTS, {})
    (match,) = [one for one in found if one.budget == budget]
    assert match.ratio == (None if ratio is None else pytest.approx(ratio))
    assert match.matched == matched
    assert not match.required


def test_each_arm_of_a_side_is_a_twin_of_each_of_the_other() -> None:
    found = budget_matches([(("near", "far"), ("dense",))], COSTS, {"flops_per_token": 0.02})
    assert {(one.arm, one.twin, one.budget) for one in found if one.required} == {
        ("near", "dense", "flops_per_token"),
        ("far", "dense", "flops_per_token"),
    }
    assert len(found) == 8
    assert not any(one.matched for one in found if one.required)


def test_sentences() -> None:
    found = budget_matches([(("far",), ("dense",))], COSTS, {"flops_per_token": 0.05})
    assert [one.sentence for one in found] == [
        "`far` has 0 training tokens and `dense` 1.000 M, 100.0 % fewer (5 % allowed)",
        "`far` has 0 training FLOPs and `dense` 300.0 T, 100.0 % fewer (5 % allowed)",
        "`far` has 106.0 M FLOPs per token and `dense` 100.0 M, 6.0 % more (5 % allowed)",
        "the active parameters of `far` were not counted",
    ]
