"""How far apart tasks are by the experts that they use, and how far apart samples of one task would be.

The distance between two loads is the Jensen-Shannon distance, the square root of the divergence in bits:
0 for equal loads, 1 where no expert is shared. It is a metric (Endres and Schindelin, IEEE Transactions on
Information Theory 49 (2003)), and so is its mean over layers.
"""

import math

import numpy as np
from jaxtyping import Float, Int
from scipy.special import rel_entr

from flanmoe.evaluation.routing.specialisation import load


def divergence(
    first: Float[np.ndarray, "*batch E"], second: Float[np.ndarray, "*batch E"]
) -> Float[np.ndarray, "*batch"]:
    """Return the Jensen-Shannon divergence of loads in bits."""
    middle = (first + second) / 2
    nats = (rel_entr(first, middle) + rel_entr(second, middle)).sum(axis=-1) / 2
    # Rounding leaves a little less than 0 for loads that are almost equal.
    return np.maximum(nats, 0) / math.log(2)


def distances(loads: Float[np.ndarray, "G E"]) -> Float[np.ndarray, "G G"]:
    """Return the distance between every two tasks in one layer."""
    first, second = np.broadcast_arrays(loads[:, None], loads[None, :])
    return np.sqrt(divergence(first, second))


def noise(
    assignments: Int[np.ndarray, "G 2 E"], tokens: Int[np.ndarray, "G 2"]
) -> Float[np.ndarray, "G G"]:
    """Return the distance to be expected in one layer between two tasks that use experts alike.

    The divergence of two samples of n and m tokens of one distribution is expected to be c (1/n + 1/m), where
    c grows with the number of experts and with how much the tokens of one text resemble each other. The two
    halves of a task's requests are such samples, and give its c. On the diagonal stands the distance between
    two samples of the same task.

    Args:
        assignments: of the halves of each task.
        tokens: of the halves of each task.

    Returns:
        the root of the expected divergence; NaN where a half of a task has no tokens.
    """
    total = np.maximum(tokens.sum(axis=1), 1)
    apart = divergence(load(assignments[:, 0]), load(assignments[:, 1]))
    # c / n of each task, with c = apart / (1 / n_0 + 1 / n_1).
    own = apart * tokens.prod(axis=1) / total**2
    own = np.where(tokens.min(axis=1) > 0, own, np.nan)
    return np.sqrt(own[:, None] + own[None, :])
