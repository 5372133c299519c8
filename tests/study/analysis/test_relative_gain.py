"""Both readings of a relative gain, by hand, and where neither means anything."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.core.errors import DataError
from flanmoe.study.analysis.relative_gain import mean_of_ratios, ratio_of_means

WITH, WITHOUT = np.asarray([0.6, 0.2]), np.asarray([0.5, 0.1])


def test_by_hand() -> None:
    assert ratio_of_means(WITH, WITHOUT, least_baseline=0.01) == pytest.approx(0.8 / 0.6 - 1)
    assert mean_of_ratios(WITH, WITHOUT, least_baseline=0.01) == pytest.approx((0.2 + 1.0) / 2)


@given(st.lists(st.floats(0.1, 1), min_size=1, max_size=6), st.floats(-0.9, 3))
def test_they_agree_where_every_cell_gains_alike(baselines: list[float], gain: float) -> None:
    without = np.asarray(baselines)
    for reading in (ratio_of_means, mean_of_ratios):
        assert reading((1 + gain) * without, without, least_baseline=0.01) == pytest.approx(
            gain, abs=1e-9
        )


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 1)), min_size=1, max_size=6),
    st.floats(0.5, 9),
)
def test_the_unit_does_not_matter(cells: list[tuple[float, float]], unit: float) -> None:
    one, other = (np.asarray(side) for side in zip(*cells, strict=True))
    for reading in (ratio_of_means, mean_of_ratios):
        assert reading(unit * one, unit * other, least_baseline=0.01) == pytest.approx(
            reading(one, other, least_baseline=0.01), abs=1e-9
        )


@pytest.mark.parametrize("reading", [ratio_of_means, mean_of_ratios])
@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ([0.5], [0.5, 0.5], "needs matched cells, at least 1, but found 1 with and 2 without."),
        ([], [], "needs matched cells, at least 1, but found 0 with and 0 without."),
        ([-0.1, 1], [0.5, 0.5], "needs finite scores from 0 upwards, but found -0.1."),
        ([1, 1], [float("nan"), 0.5], "needs finite scores from 0 upwards, but found nan."),
        ([1, 1], [0.001, 0.001], "needs a baseline of at least 0.01, but found 0.001."),
    ],
)
def test_refusals(reading: object, one: list[float], other: list[float], message: str) -> None:
    assert callable(reading)
    with pytest.raises(DataError, match=re.escape(message)):
        reading(np.asarray(one), np.asarray(other), least_baseline=0.01)


def test_one_small_baseline_is_too_small_for_a_mean_of_ratios_alone() -> None:
    one, other = np.asarray([0.5, 0.5]), np.asarray([0.0, 0.5])
    assert ratio_of_means(one, other, least_baseline=0.01) == pytest.approx(1.0)
    with pytest.raises(DataError, match="baseline of at least"):
        mean_of_ratios(one, other, least_baseline=0.01)


def test_the_floor_must_be_above_zero() -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        ratio_of_means(WITH, WITHOUT, least_baseline=0.0)
