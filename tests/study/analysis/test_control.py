"""Planted effects are found and nothing is found in nothing; copies keep the spread of what they copy."""

import numpy as np
import pytest

from flanmoe.core.seeds import SeedTree
from flanmoe.study.analysis.control import Control, run_control
from flanmoe.study.analysis.power import minimum_detectable_effect
from flanmoe.study.analysis.spread import spread_of
from flanmoe.study.analysis.strata import Strata, stratify
from flanmoe.study.analysis.wild import null_copies


def _parts(*, luck: float, hard: float, rest: float, seeds: int = 5) -> tuple[np.ndarray, Strata]:
    rng = np.random.default_rng(0)
    _, strata = stratify([40, 60])
    values = (
        7.0
        + luck * rng.normal(size=(seeds, 1))
        + hard * rng.normal(size=(1, 100))
        + rest * rng.normal(size=(seeds, 100))
    )
    return values * strata.weights, strata


@pytest.mark.parametrize(
    ("luck", "hard", "rest"), [(1.0, 0.1, 0.1), (0.01, 3.0, 0.3), (0.0, 0.0, 3.0), (0.3, 2.0, 2.0)]
)
def test_copies_have_no_effect_and_the_same_spread(luck: float, hard: float, rest: float) -> None:
    parts, strata = _parts(luck=luck, hard=hard, rest=rest)
    original = spread_of(parts, strata)
    copies = spread_of(
        null_copies(parts, strata, num_copies=2000, draws=np.random.default_rng(1)), strata
    )
    error = float(original.standard_error)
    assert abs(copies.mean.mean()) < 4 * error / 2000**0.5
    assert copies.mean.std() == pytest.approx(error, rel=0.35)
    expected = max(float(original.seeds), float(original.interaction))
    assert copies.seeds.mean() == pytest.approx(expected, rel=0.1)
    assert copies.examples.mean() == pytest.approx(float(original.examples), rel=0.1)
    assert copies.interaction.mean() == pytest.approx(float(original.interaction), rel=0.1)


def _control(scale: float) -> Control:
    parts, strata = _parts(luck=0.1, hard=1.0, rest=1.0)
    found = spread_of(parts, strata)
    smallest = minimum_detectable_effect(
        float(found.standard_error), float(found.degrees), level=0.05
    )
    return run_control(parts, strata, scale * smallest, level=0.05, seeds=SeedTree(2))


def test_the_minimum_detectable_effect_is_found_in_four_of_five_copies() -> None:
    found = _control(1.0)
    assert found.found_share == pytest.approx(0.8, abs=0.1)
    assert found.false_share <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5
    assert found.passed


def test_larger_effects_are_found_more_often_and_on_either_side() -> None:
    shares = [_control(scale).found_share for scale in (0.1, 0.5, 1.0, 2.0)]
    assert shares == sorted(shares)
    assert shares[-1] > 0.98
    assert _control(-2.0).found_share > 0.98


def test_an_analysis_that_misses_or_imagines_effects_fails() -> None:
    good = _control(1.0)
    assert not good.model_copy(update={"found_share": 0.4}).passed
    assert not good.model_copy(update={"false_share": 0.2}).passed
    assert not _control(0.1).passed
