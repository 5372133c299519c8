"""Distances by hand and against scipy; their noise against samples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from flanmoe.evaluation.routing.distances import distances, divergence, noise
from flanmoe.evaluation.routing.specialisation import load

counts = st.lists(st.integers(0, 50), min_size=5, max_size=5).filter(any)


def test_divergence_by_hand() -> None:
    first = np.array([[0.5, 0.5], [0.0, 1.0], [0.5, 0.5]])
    second = np.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]])
    # The middle of the first two is (3/4, 1/4): (log2(2/3) / 2 + log2(2) / 2 + log2(4/3)) / 2.
    assert divergence(first, second) == pytest.approx([0.311278, 1, 0], abs=1e-6)


@given(st.lists(counts, min_size=1, max_size=6))
def test_distances_are_those_of_scipy(rows: list[list[int]]) -> None:
    loads = load(np.array(rows))
    found = distances(loads)
    for row, first in enumerate(loads):
        for column, second in enumerate(loads):
            # Equal loads: scipy takes the root of a little less than 0 now and then.
            expected = 0 if np.allclose(first, second) else jensenshannon(first, second, base=2)
            assert found[row, column] == pytest.approx(expected, abs=1e-7)
    assert (found == found.T).all()
    assert not found.diagonal().any()
    # A metric: no way round is shorter.
    around = (found[:, :, None] + found[None, :, :]).min(axis=1)
    assert (found <= around + 1e-9).all()


def test_noise_by_hand() -> None:
    # The halves of the first task share no expert (divergence 1), those of the second are equal.
    assignments = np.array([[[30, 0], [0, 10]], [[5, 5], [20, 20]]])
    tokens = np.array([[30, 10], [10, 40]])
    # c = 1 / (1/30 + 1/10) = 7.5, over 40 tokens: 0.1875.
    expected = np.sqrt([[0.375, 0.1875], [0.1875, 0]])
    assert noise(assignments, tokens) == pytest.approx(expected)


def test_noise_is_not_known_where_a_half_is_empty() -> None:
    assignments = np.array([[[4, 0], [0, 4]], [[3, 5], [0, 0]]])
    found = noise(assignments, np.array([[4, 4], [8, 0]]))
    assert np.isfinite(found).tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize("tokens_of_a_text", [1, 20])
def test_tasks_that_use_experts_alike_are_as_far_apart_as_the_noise(tokens_of_a_text: int) -> None:
    """Texts with preferences of their own: their tokens are alike, and the noise is larger."""
    generator = np.random.default_rng(0)
    sizes = [(60, 40), (20, 25)]

    def half(num_texts: int) -> np.ndarray:
        texts = generator.dirichlet(np.full(8, 5.0), num_texts)
        return sum(generator.multinomial(tokens_of_a_text, text) for text in texts)

    tokens = tokens_of_a_text * np.array(sizes)
    apart: list[float] = []
    expected: list[float] = []
    for _ in range(400):
        sample = np.array([[half(number) for number in task] for task in sizes])
        apart.append(distances(load(sample.sum(axis=1)))[0, 1] ** 2)
        expected.append(noise(sample, tokens)[0, 1] ** 2)
    assert np.mean(apart) == pytest.approx(np.mean(expected), rel=0.1)
