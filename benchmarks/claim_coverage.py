"""How often the intervals of claims cover the truth, in simulated studies; prints JSON.

    python benchmarks/claim_coverage.py

Each study has two tasks of 40 examples and a contrast whose truth is 0. One run's variance is made of the luck
of its seed, of how much the contrast differs between examples for all seeds alike, and of what is left (their
interaction), in the shares of a mixture. Three intervals at 95 % are compared: the t interval, the percentile
interval of the two-level bootstrap, and the reported one, which reaches over both.
"""

import argparse
import json

import numpy as np
from scipy import stats

from flanmoe.core.seeds import SeedTree
from flanmoe.study.analysis.resampling import resample
from flanmoe.study.analysis.spread import spread_of
from flanmoe.study.analysis.strata import stratify

_TASKS = (40, 40)
# Shares of seeds, examples, interaction; those of the last two are of the mean over all examples.
_MIXTURES = (
    (1.0, 0.0, 0.01),
    (1.0, 0.05, 0.1),
    (1.0, 0.33, 0.01),
    (1.0, 1.0, 0.1),
    (0.3, 0.1, 0.6),
    (0.0, 1.0, 1.0),
    (0.0, 0.0, 1.0),
    (3.0, 0.0, 1.0),
)


def coverage(
    mixture: tuple[float, ...], *, num_seeds: int, num_studies: int, num_resamples: int
) -> dict[str, float]:
    """Share of simulated studies whose interval holds the truth, by kind of interval."""
    rng = np.random.default_rng(num_seeds)
    _, strata = stratify(_TASKS)
    number = sum(_TASKS)
    luck, examples, rest = (share**0.5 for share in mixture)
    shape = (num_studies, num_seeds, number)
    values = (
        luck * rng.normal(size=(num_studies, num_seeds, 1))
        + number**0.5 * examples * rng.normal(size=(num_studies, 1, number))
        + number**0.5 * rest * rng.normal(size=shape)
    )
    parts = values * strata.weights
    spread = spread_of(parts, strata)
    reach = stats.t.ppf(0.975, spread.degrees) * spread.standard_error
    # All studies are drawn anew with the same counts, which makes their coverages no less right on average.
    draws = resample(parts, strata, seeds=SeedTree(num_seeds), num_resamples=num_resamples)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    t_covers = np.abs(spread.mean) <= reach
    bootstrap_covers = (low <= 0) & (high >= 0)
    wider = (np.minimum(low, spread.mean - reach) <= 0) & (
        np.maximum(high, spread.mean + reach) >= 0
    )
    strict = stats.t.ppf(0.995, spread.degrees) * spread.standard_error
    return {
        "t_errs_at_1_percent": float((np.abs(spread.mean) > strict).mean()),
        "t": float(t_covers.mean()),
        "bootstrap": float(bootstrap_covers.mean()),
        "reported": float(wider.mean()),
    }


def main() -> None:
    """Print the coverage for each number of seeds and mixture, and the lowest over mixtures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=4000)
    parser.add_argument("--resamples", type=int, default=999)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 5, 10])
    options = parser.parse_args()
    found = {}
    for num_seeds in options.seeds:
        rows = {
            "/".join(map(str, mixture)): coverage(
                mixture,
                num_seeds=num_seeds,
                num_studies=options.studies,
                num_resamples=options.resamples,
            )
            for mixture in _MIXTURES
        }
        lowest = {
            kind: min(row[kind] for row in rows.values()) for kind in ("t", "bootstrap", "reported")
        }
        errs = max(row["t_errs_at_1_percent"] for row in rows.values())
        found[num_seeds] = {
            "mixtures": rows,
            "lowest": lowest,
            "most_t_errs_at_1_percent": errs,
        }
    print(json.dumps({"studies": options.studies, "coverage": found}, indent=2))


if __name__ == "__main__":
    main()
