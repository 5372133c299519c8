"""Measures of one layer, against numbers by hand."""

import numpy as np
import pytest

from flanmoe.evaluation.routing.specialisation import (
    domain_specialisation,
    entropy,
    load,
    relative_load,
)

# Two tasks of a top-2 layer with four experts: 10 tokens and 4 tokens.
ASSIGNMENTS = np.array([[10, 5, 5, 0], [2, 2, 2, 2]])


def test_load_is_the_share_of_assignments() -> None:
    assert load(ASSIGNMENTS).tolist() == [[0.5, 0.25, 0.25, 0], [0.25, 0.25, 0.25, 0.25]]
    assert load(np.zeros((1, 3), dtype=int)).tolist() == [[0, 0, 0]]


def test_domain_specialisation_is_the_share_of_tokens() -> None:
    found = domain_specialisation(ASSIGNMENTS, np.array([10, 4]))
    # Every token of the first task goes to the first expert.
    assert found.tolist() == [[1, 0.5, 0.5, 0], [0.5, 0.5, 0.5, 0.5]]


def test_relative_load_compares_with_the_mean_over_tasks() -> None:
    found = relative_load(load(ASSIGNMENTS))
    # Means 0.375, 0.25, 0.25, 0.125: the longer task weighs no more.
    assert found == pytest.approx(np.array([[4 / 3, 1, 1, 0], [2 / 3, 1, 1, 2]]))
    assert relative_load(np.array([[1.0, 0.0], [1.0, 0.0]])).tolist() == [[1, 1], [1, 1]]


def test_entropy_in_bits() -> None:
    loads = np.array([[0.5, 0.25, 0.25, 0], [0.25, 0.25, 0.25, 0.25], [0, 1, 0, 0]])
    assert entropy(loads) == pytest.approx(np.array([1.5, 2, 0]))
