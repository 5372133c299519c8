"""Which experts serve tokens together more often than their loads alone would have it.

A token has different experts, as a rule a fixed number of them, so plain independence (the product of two
loads) is the wrong comparison: with two even choices out of eight every pair would seem too rare, at 0.57 of
the product. The comparison is quasi-independence (Goodman 1968, *The analysis of cross-classified data*, JASA
63): the table w_e w_f off its diagonal whose rows sum to what they really sum to. For two experts a token it
is two different draws by one set of weights. E experts.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from flanmoe.core.config import Config

# Fewer tokens than this say nothing about a pair.
LEAST_EXPECTED = 5
MOST_PAIRS = 10
_DIGITS = 5
_MOST_ROUNDS = 1000
_CLOSE_ENOUGH = 1e-6

DEFINITIONS = {
    "pairs": f"pairs of experts that share at least {LEAST_EXPECTED} tokens or would be expected to, those "
    f"that stand out most first, at most {MOST_PAIRS} a layer",
    "together": "share of the tokens that had both experts",
    "expected": "the same if experts were drawn by their loads alone, no token the same one twice "
    "(quasi-independence, Goodman 1968)",
    "times": "together over expected",
}


class Pair(Config):
    """Two experts of a layer; see `DEFINITIONS`."""

    experts: tuple[int, int]
    together: float
    expected: float
    times: float | None


class LayerCoactivation(Config):
    """The pairs of one sparse layer.

    Attributes:
        layer: number of the transformer layer.
        tokens: tokens that were counted.
        pairs: those that stand out; empty where tokens have one expert each.
    """

    layer: int
    tokens: int
    pairs: tuple[Pair, ...]


def expected_together(coactivation: Int[np.ndarray, "E E"]) -> Float[np.ndarray, "E E"]:
    """Return how many tokens would have both experts under quasi-independence; 0 on the diagonal.

    Args:
        coactivation: tokens that had both experts; the diagonal does not matter.
    """
    table = coactivation.astype(np.float64)
    np.fill_diagonal(table, 0)
    wanted = table.sum(axis=1)
    weights = np.sqrt(wanted)
    for _ in range(_MOST_ROUNDS):
        reached = weights * (weights.sum() - weights)
        ratios = np.divide(wanted, reached, out=np.ones_like(wanted), where=reached > 0)
        if np.abs(ratios - 1).max(initial=0) < _CLOSE_ENOUGH:
            break
        # The root keeps two weights that depend on each other from swinging past each other.
        weights = weights * np.sqrt(ratios)
    expected = np.outer(weights, weights)
    np.fill_diagonal(expected, 0)
    return expected


def layer_coactivation(
    coactivation: Int[np.ndarray, "E E"], *, layer: int, tokens: int
) -> LayerCoactivation:
    """Return the pairs of a layer that stand out, by distance from what was expected over its root.

    Args:
        coactivation: tokens that had both experts.
        layer: number of the transformer layer.
        tokens: tokens that were counted.
    """
    expected = expected_together(coactivation)
    first, second = np.triu_indices(len(coactivation), k=1)
    found, usual = coactivation[first, second], expected[first, second]
    counted = np.flatnonzero(np.maximum(found, usual) >= LEAST_EXPECTED)
    strength = _strength(found[counted], usual[counted])
    order = counted[np.argsort(-strength, kind="stable")][:MOST_PAIRS]
    return LayerCoactivation(
        layer=layer,
        tokens=tokens,
        pairs=tuple(
            _pair((int(first[one]), int(second[one])), int(found[one]), float(usual[one]), tokens)
            for one in order
        ),
    )


def log_times(coactivation: Int[np.ndarray, "E E"]) -> Float[np.ndarray, "E E"]:
    """Return log2 of found over expected for each pair; NaN on the diagonal and where too few are expected."""
    expected = expected_together(coactivation)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.log2(np.maximum(coactivation, 0.5) / expected)
    return np.where(expected >= LEAST_EXPECTED, values, np.nan)


def strongest_layers(tables: Sequence[Int[np.ndarray, "_ _"]], *, most: int) -> list[int]:
    """Return the places of the layers whose pairs stand out most, in their order."""
    strengths = [
        _strength(one, expected_together(one))[~np.eye(len(one), dtype=bool)].max(initial=0)
        for one in tables
    ]
    return sorted(np.argsort(-np.array(strengths), kind="stable")[:most].tolist())


def _strength(
    found: Int[np.ndarray, "*pairs"], usual: Float[np.ndarray, "*pairs"]
) -> Float[np.ndarray, "*pairs"]:
    """Return how much pairs stand out: their distance from what was expected, over its root."""
    return np.abs(found - usual) / np.sqrt(np.maximum(usual, 1))


def _pair(experts: tuple[int, int], found: int, usual: float, tokens: int) -> Pair:
    return Pair(
        experts=experts,
        together=round(found / tokens, _DIGITS),
        expected=round(usual / tokens, _DIGITS),
        times=round(found / usual, 3) if usual >= 1e-9 else None,
    )
