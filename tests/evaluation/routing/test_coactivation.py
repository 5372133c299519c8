"""Pairs of experts, against tables that were made by a known rule."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.evaluation.routing.coactivation import (
    expected_together,
    layer_coactivation,
    log_times,
    strongest_layers,
)


def two_draws(weights: list[float], tokens: int) -> np.ndarray:
    """Tokens of each pair where two different experts are drawn by weights, P(e, f) ~ w_e w_f."""
    size = len(weights)
    table = np.zeros((size, size))
    total = sum(weights[e] * weights[f] for e, f in itertools.combinations(range(size), 2))
    for e, f in itertools.combinations(range(size), 2):
        table[e, f] = table[f, e] = tokens * weights[e] * weights[f] / total
    table[np.diag_indices(size)] = table.sum(axis=1)
    return table


@given(weights=st.lists(st.floats(0.5, 4), min_size=3, max_size=8))
def test_two_draws_by_one_set_of_weights_are_what_is_expected(weights: list[float]) -> None:
    table = two_draws(weights, 100_000).round().astype(np.int64)
    expected = expected_together(table)
    off = ~np.eye(len(weights), dtype=bool)
    assert expected[off] == pytest.approx(table[off], rel=2e-3, abs=1.5)
    assert not expected.diagonal().any()


@given(seed=st.integers(0, 1000), top_k=st.integers(2, 4))
def test_the_expected_table_has_the_loads_of_the_real_one(seed: int, top_k: int) -> None:
    generator = np.random.default_rng(seed)
    has = np.zeros((500, 6), dtype=np.int64)
    scores = generator.gumbel(size=has.shape) + generator.normal(size=6)
    np.put_along_axis(has, np.argsort(-scores, axis=1)[:, :top_k], 1, axis=1)
    table = has.T @ has
    expected = expected_together(table)
    rows = table.sum(axis=1) - table.diagonal()
    assert expected.sum(axis=1) == pytest.approx(rows, rel=0.01, abs=1)


def test_an_expert_that_every_token_has_stands_out_with_nobody() -> None:
    # Expert 0 and one of the others: what each of them shares with 0 follows from its load.
    table = np.array([[100, 60, 40], [60, 60, 0], [40, 0, 40]])
    assert expected_together(table) == pytest.approx(
        np.array([[0, 60, 40], [60, 0, 0], [40, 0, 0]]), abs=1
    )


def test_a_planted_pair_comes_first_with_its_shares() -> None:
    table = two_draws([1, 1, 1, 1, 1, 1], 1500)
    # 100 tokens a pair; 80 of (0, 1) and (2, 3) go to (0, 2) and (1, 3), which leaves every load as it was.
    for e, f, moved in ((0, 1, -80), (2, 3, -80), (0, 2, 80), (1, 3, 80)):
        table[[e, f], [f, e]] += moved
    found = layer_coactivation(table.round().astype(np.int64), layer=7, tokens=1500)
    assert (found.layer, found.tokens) == (7, 1500)
    assert {pair.experts for pair in found.pairs[:4]} == {(0, 1), (2, 3), (0, 2), (1, 3)}
    rare = next(pair for pair in found.pairs if pair.experts == (0, 1))
    assert rare.together == pytest.approx(20 / 1500, abs=1e-4)
    assert rare.expected == pytest.approx(100 / 1500, abs=1e-3)
    assert rare.times == pytest.approx(0.2, abs=0.01)


def test_pairs_of_few_tokens_are_left_out() -> None:
    table = np.array([[3, 2, 1], [2, 2, 0], [1, 0, 1]])
    assert layer_coactivation(table, layer=0, tokens=3).pairs == ()
    assert np.isnan(log_times(table)).all()


def test_one_expert_a_token_has_no_pairs() -> None:
    found = layer_coactivation(np.diag([40, 60]), layer=0, tokens=100)
    assert found.pairs == ()


def test_the_layers_that_stand_out_most_are_found() -> None:
    even = two_draws([1, 1, 1, 1], 600).round().astype(np.int64)
    planted = even.copy()
    for e, f, moved in ((0, 1, -90), (2, 3, -90), (0, 2, 90), (1, 3, 90)):
        planted[[e, f], [f, e]] += moved
    assert strongest_layers([even, planted, even], most=1) == [1]
    assert strongest_layers([even, planted], most=4) == [0, 1]
