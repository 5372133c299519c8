"""Effects of factors as contrasts: matched cells, incomplete grids, interactions."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.study.analysis.factors import Effect, interactions, main_effects, weights_of

Arms = dict[str, dict[str, Any]]


def _grid(**levels: list[Any]) -> Arms:
    return {
        "-".join(map(str, values)): dict(zip(levels, values, strict=True))
        for values in itertools.product(*levels.values())
    }


FULL = _grid(size=["small", "large"], general=[False, True], shots=[0, 4])


def test_a_main_effect_of_a_full_grid() -> None:
    (effect,) = [one for one in main_effects(FULL) if one.factor == "general"]
    weights = weights_of(effect.cells(FULL))
    assert weights == {
        arm: pytest.approx(0.25 if factors["general"] else -0.25) for arm, factors in FULL.items()
    }
    assert effect.text == "general on over off"


def test_a_level_left_out_takes_its_partner_with_it() -> None:
    arms = {arm: factors for arm, factors in FULL.items() if arm != "large-True-4"}
    (effect,) = [one for one in main_effects(arms) if one.factor == "general"]
    weights = weights_of(effect.cells(arms))
    assert "large-False-4" not in weights
    assert sum(weight > 0 for weight in weights.values()) == 3


def test_given_levels_choose_cells() -> None:
    effect = Effect(factor="general", of=True, over=False, given={"size": "large", "shots": 0})
    assert effect.cells(FULL) == (("large-True-0", "large-False-0"),)


def test_every_level_is_compared_with_the_first() -> None:
    arms = _grid(prompt=["none", "task", "instruction"])
    assert [one.text for one in main_effects(arms)] == [
        "prompt task over none",
        "prompt instruction over none",
    ]


def test_true_is_not_one() -> None:
    arms = {"a": {"f": True}, "b": {"f": 1}, "c": {"f": False}}
    assert Effect(factor="f", of=1, over=False).cells(arms) == (("b", "c"),)
    assert Effect(factor="f", of=True, over=False).cells(arms) == (("a", "c"),)


@given(st.lists(st.floats(-2, 2), min_size=7, max_size=7))
def test_effects_of_a_linear_model_are_its_coefficients(coefficients: list[float]) -> None:
    """Scores written as a sum of effects and two-way interactions, coded 0 and 1."""
    size, general, shots, both, s, g, _ = coefficients
    means = {
        arm: size * (f["size"] == "large")
        + general * f["general"]
        + shots * (f["shots"] == 4)
        + both * (f["size"] == "large") * f["general"]
        + s * (f["size"] == "large") * (f["shots"] == 4)
        + g * f["general"] * (f["shots"] == 4)
        for arm, f in FULL.items()
    }

    def value(weights: dict[str, float]) -> float:
        return sum(weight * means[arm] for arm, weight in weights.items())

    mains = {one.factor: value(weights_of(one.cells(FULL))) for one in main_effects(FULL)}
    # Over a full grid, half of each interaction is in either main effect.
    assert mains["general"] == pytest.approx(general + both / 2 + g / 2, abs=1e-9)
    assert mains["size"] == pytest.approx(size + both / 2 + s / 2, abs=1e-9)
    pairs = {
        (one.first.factor, one.second.factor): value(one.weights(FULL) or {})
        for one in interactions(FULL)
    }
    assert pairs == {
        ("size", "general"): pytest.approx(both, abs=1e-9),
        ("size", "shots"): pytest.approx(s, abs=1e-9),
        ("general", "shots"): pytest.approx(g, abs=1e-9),
    }


def test_an_interaction_of_an_incomplete_grid_keeps_whole_squares() -> None:
    arms = {arm: factors for arm, factors in FULL.items() if arm != "large-True-4"}
    (one,) = [
        i for i in interactions(arms) if (i.first.factor, i.second.factor) == ("size", "general")
    ]
    weights = one.weights(arms)
    assert weights is not None
    assert {arm for arm in weights if weights[arm]} == {arm for arm in FULL if arm.endswith("-0")}
    assert np.isclose(sum(weights.values()), 0)


def test_no_square_no_interaction() -> None:
    arms = {"a": {"f": 0, "g": 0}, "b": {"f": 1, "g": 0}, "c": {"f": 0, "g": 1}}
    assert interactions(arms) == ()
    assert len(main_effects(arms)) == 2
