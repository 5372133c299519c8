"""How much an expert belongs to a task: numbers over one layer's counts. G tasks, E experts."""

import numpy as np
from jaxtyping import Float, Int


def load(assignments: Int[np.ndarray, "G E"]) -> Float[np.ndarray, "G E"]:
    """Return each expert's share of a task's assignments; 0 everywhere for a task without any."""
    return assignments / np.maximum(assignments.sum(axis=1, keepdims=True), 1)


def domain_specialisation(
    assignments: Int[np.ndarray, "G E"], tokens: Int[np.ndarray, " G"]
) -> Float[np.ndarray, "G E"]:
    """Return the share of a task's tokens that an expert computes, all of a token's experts counted.

    It is top-k / E where experts are used evenly (OLMoE, arXiv 2409.02060, section 5: domain specialization).
    """
    return assignments / np.maximum(tokens, 1)[:, None]


def relative_load(loads: Float[np.ndarray, "G E"]) -> Float[np.ndarray, "G E"]:
    """Return each load over the expert's mean load, every task counting the same.

    1 where a task uses an expert as much as tasks do on average, and where no task uses it.
    """
    mean = loads.sum(axis=0, keepdims=True) / max(len(loads), 1)
    return np.divide(loads, mean, out=np.ones_like(loads), where=mean > 0)


def entropy(loads: Float[np.ndarray, "G E"]) -> Float[np.ndarray, " G"]:
    """Return the entropy of each task's loads in bits: log2 E where they are even, 0 for one expert."""
    logarithms = np.log2(loads, out=np.zeros_like(loads), where=loads > 0)
    return np.abs(-(loads * logarithms).sum(axis=1))
