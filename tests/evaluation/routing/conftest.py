"""Counts that several tests of this folder use."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from flanmoe.evaluation.routing.counts import RoutingCounts


def _counts(
    names: Sequence[str], *, num_layers: int = 2, num_experts: int = 4, seed: int = 0
) -> RoutingCounts:
    """Random counts of a top-2 model in which later layers tell tasks further apart."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(200, 300, (len(names), 2))
    assignments: list[np.ndarray] = []
    for layer in range(num_layers):
        rows = [
            [generator.multinomial(2 * half, probabilities) for half in halves]
            for halves in tokens
            for probabilities in [generator.dirichlet(np.full(num_experts, 40.0 / (1 + layer)))]
        ]
        assignments.append(np.array(rows))
    return RoutingCounts(
        names=tuple(names),
        # Every second transformer layer is sparse.
        layers=tuple(range(1, 2 * num_layers, 2)),
        top_k=(2,) * num_layers,
        tokens=tokens,
        assignments=tuple(assignments),
    )


@pytest.fixture(scope="session")
def counts() -> Callable[..., RoutingCounts]:
    """Build random counts of some tasks."""
    return _counts
