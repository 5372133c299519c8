"""From what the arms of a study left to what claims are judged on: scores by example, and budgets.

An arm is scored by its last evaluation. Questions that it was trained on do not count. A question counts as the
same in every prompt format, so that arms which differ in the prompt alone can be compared on it.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from flanmoe.core.ledger import Ledger
from flanmoe.core.names import listing
from flanmoe.data.tasks import without_format
from flanmoe.evaluation.results import ExampleRecord, SuiteResult
from flanmoe.study.analysis.budget import ArmCosts
from flanmoe.study.analysis.metric import ACCURACY, LOSS, NORMALISED_ACCURACY
from flanmoe.study.analysis.observations import Observation, Observations
from flanmoe.study.records import SeedResults
from flanmoe.study.study import Study

Results = Mapping[str, Sequence[SeedResults]]
# One-sided, of all systems together.
_LEVEL = 0.025


@dataclass(frozen=True, slots=True)
class Observed:
    """What claims are judged on.

    Attributes:
        observations: scores of all systems (`Study.systems`).
        at_chance: tasks of which the accuracy does not count, since no system is above chance on them.
    """

    observations: Observations
    at_chance: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out, in words."""
        if not self.at_chance:
            return ()
        return (
            f"Accuracy on {listing(self.at_chance)} does not count in claims and effects: no arm is above "
            "chance there (guessing, or always giving the commonest answer), so a difference would be one of "
            "guesses.",
        )


def observe(study: Study, results: Results) -> Observed:
    """Gather the scores of everything that has finished."""
    scored = [
        (system, seed.seed, record)
        for system, parts in study.systems.items()
        for part in parts
        for seed in results.get(part, ())
        if seed.last is not None
        for record in _counted(seed.last)
    ]
    at_chance = _at_chance(scored)
    return Observed(
        Observations(
            (one for row in scored for one in _observations(*row, at_chance=at_chance)),
            arms=study.factors,
        ),
        at_chance,
    )


def arm_costs(study: Study, results: Results) -> dict[str, ArmCosts]:
    """Return what each system cost: the mean over its parts and seeds of one model's costs."""
    found: dict[str, ArmCosts] = {}
    for system, parts in study.systems.items():
        models = [seed for part in parts for seed in results.get(part, ())]
        if models:
            ledgers = [_ledger(seed) for seed in models]
            found[system] = ArmCosts(
                tokens=fmean(ledger.real_tokens for ledger in ledgers),
                training_flops=fmean(ledger.flops for ledger in ledgers),
                flops_per_token=fmean(seed.flops.total for seed in models),
                active_parameters=fmean(seed.parameters.active for seed in models),
            )
    return found


def _ledger(seed: SeedResults) -> Ledger:
    stages = [*seed.pretrainings.values(), *seed.tunings.values()]
    return sum((stage.training.ledger for stage in stages), Ledger())


def _counted(result: SuiteResult) -> Iterator[ExampleRecord]:
    """Yield what was not trained on, with the names that tasks have in every prompt format."""
    names = {record.task for record in result.examples}
    twice = {name for name, count in Counter(map(without_format, names)).items() if count > 1}
    for record in result.examples:
        if record.seen:
            continue
        bare = without_format(record.task)
        # One evaluation may ask the same questions in two formats; then each is a task.
        yield record if bare in twice else record.model_copy(update={"task": bare})


def _observations(
    system: str, seed: int, record: ExampleRecord, *, at_chance: Sequence[str]
) -> Iterator[Observation]:
    def observed(metric: str, value: float) -> Observation:
        return Observation(system, seed, record.task, record.key, metric, value)

    if record.loss is not None:
        yield observed(LOSS.name, record.loss)
    if record.score is None or record.task in at_chance:
        return
    yield observed(ACCURACY.name, record.score)
    if record.chance is not None:
        share = (record.score - record.chance) / (1 - record.chance)
        yield observed(NORMALISED_ACCURACY.name, 100 * share)


def _at_chance(scored: Sequence[tuple[str, int, ExampleRecord]]) -> tuple[str, ...]:
    """Return the tasks with choices on which no system is above chance.

    Chance is guessing, or always giving the answer that is right most often, whichever is better. Scores are
    averaged over seeds first, which answer the same questions; the level is divided by the number of systems.
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    chances: dict[str, dict[str, tuple[float, int | None]]] = {}
    for system, _, record in scored:
        if record.score is not None and record.chance is not None:
            answers = found.setdefault(record.task, {}).setdefault(system, {})
            answers.setdefault(record.key, []).append(record.score)
            chances.setdefault(record.task, {})[record.key] = (record.chance, record.label)
    return tuple(
        task
        for task, systems in sorted(found.items())
        if not any(
            _is_above(answers.values(), _chance(chances[task].values()), len(systems))
            for answers in systems.values()
        )
    )


def _chance(known: Collection[tuple[float, int | None]]) -> float:
    labels = Counter(label for _, label in known if label is not None)
    most = max(labels.values(), default=0) / len(known)
    return max(fmean(chance for chance, _ in known), most)


def _is_above(answers: Collection[Sequence[float]], chance: float, num_systems: int) -> bool:
    gains = [fmean(scores) - chance for scores in answers]
    if len(gains) < 2:
        return False
    errors = NormalDist().inv_cdf(1 - _LEVEL / num_systems)
    return fmean(gains) > errors * stdev(gains) / len(gains) ** 0.5


def complete(observations: Observations, metric: str) -> Observations:
    """Return the scores of those arms with factors that are scored with every seed and on every task.

    All arms stay declared, so that those without scores are known to be left out.
    """
    arms = [arm for arm, factors in observations.arms.items() if factors]
    seeds = {seed for arm in arms for seed in observations.seeds(metric, arm)}
    tasks = observations.tasks(metric, arms)
    whole = {
        arm
        for arm in arms
        if all(
            (scores := observations.scores(metric, arm, seed, task))
            and all(map(math.isfinite, scores.values()))
            for seed in seeds
            for task in tasks
        )
    }
    kept = (one for one in observations.records() if one.metric == metric and one.arm in whole)
    declared = {arm: observations.arms[arm] for arm in arms}
    return Observations(kept, arms=declared, metrics=observations.metrics.values())
