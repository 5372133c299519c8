"""Holm's correction for testing several claims at once (Holm 1979, Scandinavian Journal of Statistics 6)."""

from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return adjusted p-values in the order given.

    A claim whose adjusted value is at most alpha is rejected by Holm's step-down procedure at level alpha,
    which keeps the chance of even one false rejection at alpha or below, whatever the dependence between
    the claims: the i-th smallest of m values is multiplied by m - i + 1, and none may fall below the one
    before it.
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    ranked = sorted(range(len(p_values)), key=lambda place: p_values[place])
    for rank, place in enumerate(ranked):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return tuple(adjusted)
