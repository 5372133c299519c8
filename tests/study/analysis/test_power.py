"""Minimum detectable effects: against simulated studies, against tables, and the scale that they ask for."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from flanmoe.core.seeds import SeedTree
from flanmoe.study.analysis.contrast import ContrastEstimate, estimate_contrasts
from flanmoe.study.analysis.observations import Observations
from flanmoe.study.analysis.pairing import pair
from flanmoe.study.analysis.power import detectable, minimum_detectable_effect, sufficient_scales

Table = Callable[..., Observations]
Drawn = Callable[..., dict[str, Any]]


def _estimate(data: Observations) -> ContrastEstimate:
    paired = pair(data, "accuracy", ("a", "b"))
    (found,) = estimate_contrasts(
        paired, [{"b": 1.0, "a": -1.0}], seeds=SeedTree(0), num_resamples=99
    )
    return found


@pytest.mark.parametrize(("num_values", "level"), [(3, 0.05), (3, 0.01), (6, 0.05), (40, 0.05)])
def test_a_t_test_finds_it_in_four_of_five_studies(num_values: int, level: float) -> None:
    rng = np.random.default_rng(0)
    smallest = minimum_detectable_effect(1.0, num_values - 1, level=level)
    # In units of the standard error of a mean of `num_values` values of unit variance.
    values = rng.normal(size=(20_000, num_values)) + smallest / num_values**0.5
    found = stats.ttest_1samp(values, 0.0, axis=1).pvalue <= level
    assert found.mean() == pytest.approx(0.8, abs=0.012)


def test_known_values() -> None:
    # (z_0.975 + z_0.8) standard errors where the error is known.
    assert minimum_detectable_effect(0.5, 1e6, level=0.05) == pytest.approx(1.4008, rel=1e-3)
    assert minimum_detectable_effect(1.0, 2, level=0.05) == pytest.approx(5.653, rel=1e-3)
    assert minimum_detectable_effect(1.0, 2, level=0.05, power=0.9) > 5.653


def test_one_seed_and_equal_differences_have_none(table: Table, drawn: Drawn) -> None:
    one = _estimate(table(drawn({"a": 0.0, "b": 0.1}, num_seeds=1)))
    assert detectable(one, level=0.05) is None
    rows = np.random.default_rng(0).normal(size=(3, 8))
    assert detectable(_estimate(table({"a": rows, "b": rows + 1})), level=0.05) is None


def test_more_seeds_suffice_where_training_luck_dominates(table: Table, drawn: Drawn) -> None:
    found = _estimate(table(drawn({"a": 0.0, "b": 0.1}, num_seeds=3, luck=0.1, rest=0.05)))
    smallest = detectable(found, level=0.05)
    assert smallest is not None
    (scale,) = sufficient_scales(found, smallest / 3, level=0.05)
    assert scale.seeds > 3
    assert scale.examples == found.num_examples
    # Of a variance that falls with the number of seeds n, with n - 1 degrees of freedom.
    error = found.standard_error * (3 / scale.seeds) ** 0.5
    fewer = found.standard_error * (3 / (scale.seeds - 1)) ** 0.5
    assert minimum_detectable_effect(error, scale.seeds - 1, level=0.05) < smallest / 3 * 1.1
    assert minimum_detectable_effect(fewer, scale.seeds - 2, level=0.05) > smallest / 3 * 0.9


def test_more_examples_suffice_where_examples_dominate(table: Table, drawn: Drawn) -> None:
    data = drawn({"a": 0.0, "b": 0.1}, num_seeds=4, luck=0.0005, rest=0.1)
    # What is hard differs between the arms, for all seeds alike.
    data["b"] = data["b"] + np.random.default_rng(9).normal(size=60)
    found = _estimate(table(data))
    smallest = detectable(found, level=0.05)
    assert smallest is not None
    (scale,) = sufficient_scales(found, smallest / 3, level=0.05)
    assert scale.seeds == 4
    assert scale.examples == pytest.approx(9 * found.num_examples, abs=60)


def test_what_no_scale_can_find_has_none(table: Table, drawn: Drawn) -> None:
    found = _estimate(table(drawn({"a": 0.0, "b": 0.1}, num_seeds=3, luck=0.1)))
    assert sufficient_scales(found, 1e-6, level=0.05) == ()


def test_both_together_where_neither_suffices_alone(table: Table, drawn: Drawn) -> None:
    data = drawn({"a": 0.0, "b": 0.1}, num_seeds=3, luck=0.2, rest=0.1)
    data["b"] = data["b"] + np.random.default_rng(9).normal(size=60)
    found = _estimate(table(data))
    (scale,) = sufficient_scales(found, 0.05, level=0.05)
    assert scale.seeds > 3
    assert scale.examples > found.num_examples
