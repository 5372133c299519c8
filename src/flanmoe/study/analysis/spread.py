"""How far an estimate may be off, by source: the luck of training (seeds) and the choice of examples.

Seeds and examples are crossed. A part of the spread, the interaction (which examples a seed happens to get
right), shows among the means of seeds and among the means of examples. The variance of the estimate
is taken as the sum of both, so the interaction counts twice: too wide rather than too narrow, as one cannot
tell at three seeds how much of the spread among seeds is interaction (`contrast.py` gives the measured
coverage).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from flanmoe.study.analysis.strata import Strata


@dataclass(frozen=True, slots=True)
class Spread:
    """Variances of an estimate. Arrays where several were taken at once.

    Attributes:
        mean: the estimate.
        seeds: variance of the mean over seeds, from the spread of the seeds' own estimates; 0 with one seed.
        examples: variance of the sum over tasks of means over examples, the seeds taken as given.
        interaction: the variance that is in both; 0 with one seed.
        seed_degrees: degrees of freedom of `seeds`, 0 with one seed.
        example_degrees: of `examples`, by Satterthwaite over tasks.
    """

    mean: Float[np.ndarray, "*any"]
    seeds: Float[np.ndarray, "*any"]
    examples: Float[np.ndarray, "*any"]
    interaction: Float[np.ndarray, "*any"]
    seed_degrees: int
    example_degrees: Float[np.ndarray, "*any"]

    @property
    def standard_error(self) -> Float[np.ndarray, "*any"]:
        """Root of the variances of seeds and of examples together."""
        return np.sqrt(self.seeds + self.examples)

    @property
    def degrees(self) -> Float[np.ndarray, "*any"]:
        """Degrees of freedom of the standard error (Satterthwaite 1946); 1 where there is no spread."""
        return degrees_of_sum(
            (self.seeds, self.examples), (self.seed_degrees, self.example_degrees)
        )


def degrees_of_sum(variances: tuple, degrees: tuple) -> Float[np.ndarray, "*any"]:
    """Degrees of freedom of a sum of independent variances (Satterthwaite 1946, Biometrics Bulletin 2)."""
    whole = np.square(sum(variances))
    parts = sum(
        np.square(variance) / np.maximum(own, 1)
        for variance, own in zip(variances, degrees, strict=True)
    )
    return np.where(whole > 0, whole / np.where(parts > 0, parts, 1.0), 1.0)


def spread_of(parts: Float[np.ndarray, "*any S N"], strata: Strata) -> Spread:
    """Split the variance of the sum over examples of the mean over seeds of `parts`."""
    num_seeds = parts.shape[-2]
    freedom = np.maximum(strata.sizes - 1, 1)
    by_seed = parts.sum(axis=-1)
    by_example = parts.mean(axis=-2)
    deviations = by_example - strata.means(by_example)[..., strata.of_example]
    by_stratum = strata.sums(np.square(deviations)) / freedom * strata.sizes
    examples = by_stratum.sum(axis=-1)
    return Spread(
        mean=by_example.sum(axis=-1),
        seeds=by_seed.var(axis=-1, ddof=1) / num_seeds
        if num_seeds > 1
        else np.zeros(parts.shape[:-2]),
        examples=examples,
        interaction=_interaction(parts, strata, by_example),
        seed_degrees=num_seeds - 1,
        example_degrees=degrees_of_sum(tuple(np.moveaxis(by_stratum, -1, 0)), tuple(freedom)),
    )


def _interaction(
    parts: Float[np.ndarray, "*any S N"], strata: Strata, by_example: Float[np.ndarray, "*any N"]
) -> Float[np.ndarray, "*any"]:
    num_seeds = parts.shape[-2]
    if num_seeds < 2:
        return np.zeros(parts.shape[:-2])
    apart = parts - by_example[..., None, :]
    rest = apart - strata.means(apart)[..., strata.of_example]
    sums = strata.sums(np.square(rest)).sum(axis=-2)
    freedom = (num_seeds - 1) * np.maximum(strata.sizes - 1, 1)
    return (sums / freedom * strata.sizes).sum(axis=-1) / num_seeds
