"""Estimates, intervals and p-values of contrasts: properties on generated scores, and scipy where it can."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flanmoe.core.errors import DataError
from flanmoe.core.seeds import SeedTree
from flanmoe.study.analysis.contrast import ContrastEstimate, estimate_contrasts
from flanmoe.study.analysis.observations import Observation, Observations
from flanmoe.study.analysis.pairing import pair

Table = Callable[..., Observations]
Drawn = Callable[..., dict[str, Any]]
MINUS = {"b": 1.0, "a": -1.0}


def _estimate(
    observations: Observations, weights: dict[str, float] = MINUS, *, seed: int = 0
) -> ContrastEstimate:
    paired = pair(observations, "accuracy", tuple(sorted(weights)))
    (found,) = estimate_contrasts(paired, [weights], seeds=SeedTree(seed), num_resamples=999)
    return found


scores = st.integers(0, 10_000)
few = settings(max_examples=20)


@few
@given(scores)
def test_exchanging_the_arms_turns_the_sign(seed: int) -> None:
    found = [_estimate(_random(seed), weights) for weights in (MINUS, {"b": -1.0, "a": 1.0})]
    assert found[0].mean == pytest.approx(-found[1].mean)
    assert found[0].low == pytest.approx(-found[1].high)
    assert found[0].high == pytest.approx(-found[1].low)
    assert found[0].p_value() == pytest.approx(found[1].p_value())
    assert found[0].p_above(0.1) == pytest.approx(found[1].p_below(-0.1))


@few
@given(scores, st.floats(-2, 2))
def test_a_shift_of_one_arm_shifts_the_estimate(seed: int, shift: float) -> None:
    before, after = _estimate(_random(seed)), _estimate(_random(seed, shift=shift))
    assert after.mean == pytest.approx(before.mean + shift)
    assert after.low == pytest.approx(before.low + shift)
    assert after.high == pytest.approx(before.high + shift)
    assert after.p_value(shift) == pytest.approx(before.p_value(0.0), rel=0.01)


@few
@given(scores)
def test_what_makes_an_example_hard_drops_out(seed: int) -> None:
    plain, hard = _estimate(_random(seed)), _estimate(_random(seed, hard=5.0))
    assert hard.mean == pytest.approx(plain.mean)
    assert hard.standard_error == pytest.approx(plain.standard_error)


def _random(seed: int, *, shift: float = 0.0, hard: float = 0.0) -> Observations:
    """Two arms, three seeds, two tasks of unlike size; `b` is shifted, and all arms meet hard examples."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(2, 3, 9))
    difficulty = np.random.default_rng(seed + 1).normal(size=9)
    return Observations(
        (
            Observation(
                arm,
                s,
                "t" if i < 6 else "u",
                str(i),
                "accuracy",
                float(noise[a, s, i] + hard * difficulty[i] + shift * (arm == "b")),
            )
            for a, arm in enumerate("ab")
            for s in range(3)
            for i in range(9)
        ),
        arms={"a": {}, "b": {}},
    )


def test_the_estimate_is_the_mean_over_tasks() -> None:
    rows = [("t", "1", 1.0), ("t", "2", 0.0), ("t", "3", 2.0), ("u", "1", 4.0), ("u", "2", 6.0)]
    records = [
        Observation(arm, seed, task, key, "accuracy", value * (arm == "b") + seed)
        for arm in "ab"
        for seed in (0, 1)
        for task, key, value in rows
    ]
    assert _estimate(Observations(records, arms={"a": {}, "b": {}})).mean == pytest.approx(
        (1 + 5) / 2
    )


def test_a_difference_of_differences(table: Table, drawn: Drawn) -> None:
    data = drawn({"a": 0.0, "b": 0.3, "c": 0.1, "d": 0.9})
    found = _estimate(table(data), {"d": 1.0, "c": -1.0, "b": -1.0, "a": 1.0})
    gains = (data["d"] - data["c"]).mean() - (data["b"] - data["a"]).mean()
    assert found.mean == pytest.approx(gains)
    assert found.low < 0.5 < found.high


def test_seeds_that_dominate_give_the_t_test_over_seeds(table: Table, drawn: Drawn) -> None:
    data = drawn({"a": 0.0, "b": 0.3}, num_seeds=4, luck=0.2, rest=0.0001)
    found = _estimate(table(data))
    runs = (data["b"] - data["a"]).mean(axis=1)
    expected = stats.ttest_1samp(runs, 0.0)
    interval = expected.confidence_interval(0.95)
    assert found.degrees == pytest.approx(3, rel=0.01)
    np.testing.assert_allclose(found.t_interval, (interval.low, interval.high), rtol=0.01)
    assert found.low <= found.t_interval[0]
    assert found.p_value() >= float(expected.pvalue) * 0.98


def test_examples_that_dominate_give_the_paired_t_test(table: Table, drawn: Drawn) -> None:
    data = drawn({"a": 0.0, "b": 0.1}, num_seeds=1, num_examples=80, luck=0.0)
    found = _estimate(table(data))
    expected = stats.ttest_rel(data["b"][0], data["a"][0])
    interval = expected.confidence_interval(0.95)
    np.testing.assert_allclose(found.t_interval, (interval.low, interval.high))
    assert found.p_above(0.0) == pytest.approx(float(expected.pvalue) / 2, abs=0.005)


def test_interval_and_p_value_agree(table: Table, drawn: Drawn) -> None:
    found = _estimate(table(drawn({"a": 0.0, "b": 0.06}, num_examples=40)))
    for bound in np.linspace(found.low - 0.1, found.high + 0.1, 41):
        inside = found.low < bound < found.high
        p = found.p_value(float(bound))
        assert (p > 0.05) == inside or p == pytest.approx(0.05, abs=0.01)


def test_the_smallest_p_value_is_set_by_the_resamples(table: Table, drawn: Drawn) -> None:
    found = _estimate(table(drawn({"a": 0.0, "b": 9.0})))
    assert found.p_value() == pytest.approx(2 / 1000)


def test_equal_differences_are_constant(table: Table) -> None:
    rows = np.asarray([[0.1, 0.7, 0.3], [0.2, 0.9, 0.4]])
    assert _estimate(table({"a": rows, "b": rows + 0.1})).is_constant
    assert _estimate(table({"a": rows, "b": rows})).is_constant
    assert not _estimate(table({"a": rows, "b": rows[:, ::-1]})).is_constant


def test_the_draws_are_those_of_the_seed(table: Table, drawn: Drawn) -> None:
    data = table(drawn({"a": 0.0, "b": 0.1}))
    np.testing.assert_array_equal(_estimate(data).draws, _estimate(data).draws)
    assert (_estimate(data).draws != _estimate(data, seed=1).draws).any()


def test_a_single_example_is_refused(table: Table) -> None:
    message = "A contrast needs at least 2 examples to tell how far it may be off, but has 1. Evaluate more."
    with pytest.raises(DataError, match=re.escape(message)):
        _estimate(table({"a": [[1.0]], "b": [[0.0]]}))
