"""Holm's correction against his step-down procedure written out, and an example worked by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flanmoe.study.analysis.holm import holm

p_values = st.lists(st.floats(0, 1), max_size=12)


def _rejected(values: list[float], alpha: float) -> list[bool]:
    """Compare the smallest with alpha / m, the next with alpha / (m - 1), and stop where one is larger."""
    rejected = [False] * len(values)
    for rank, place in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        if values[place] > alpha / (len(values) - rank):
            break
        rejected[place] = True
    return rejected


@given(p_values, st.sampled_from([0.01, 0.05, 0.2]))
def test_it_rejects_what_the_procedure_rejects(values: list[float], alpha: float) -> None:
    adjusted = holm(values)
    for value, rejected in zip(adjusted, _rejected(values, alpha), strict=True):
        if abs(value - alpha) > 1e-12:
            assert (value <= alpha) == rejected


def test_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.6, 0.7]) == (1.0, 1.0)
    assert holm([]) == ()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_between_bonferroni_and_benjamini_hochberg(values: list[float]) -> None:
    adjusted = np.asarray(holm(values))
    assert (adjusted <= np.minimum(1, len(values) * np.asarray(values)) + 1e-12).all()
    assert (adjusted >= stats.false_discovery_control(values, method="bh") - 1e-12).all()


def test_it_holds_the_family_wise_error() -> None:
    rng = np.random.default_rng(0)
    draws = rng.uniform(size=(4000, 6))
    assert (
        np.mean([min(holm(row)) <= 0.05 for row in draws]) <= 0.05 + 3 * (0.05 * 0.95 / 4000) ** 0.5
    )
