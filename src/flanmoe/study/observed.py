"""From what the arms of a study left to what claims are judged on: scores by example, and budgets.

An arm is scored by its last evaluation. Questions that it was trained on do not count. A question counts as the
same in every prompt format, so that arms which differ in the prompt alone can be compared on it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from flanmoe.core.ledger import Ledger
from flanmoe.core.names import listing
from flanmoe.evaluation.results import ExampleRecord, SuiteResult
from flanmoe.study.analysis.budget import ArmCosts
from flanmoe.study.analysis.metric import ACCURACY, LOSS, NORMALISED_ACCURACY
from flanmoe.study.analysis.observations import Observation, Observations
from flanmoe.study.records import SeedResults
from flanmoe.study.study import Study

Results = Mapping[str, Sequence[SeedResults]]
# So many standard errors above chance count as more than luck.
_STANDARD_ERRORS = 2.0


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
            f"Accuracy on {listing(self.at_chance)} does not count in claims and effects: no arm lies "
            f"{_STANDARD_ERRORS:g} standard errors above chance there, so a difference would be one of "
            "guesses.",
        )


def task_of(name: str) -> str:
    """Return a task without what its questions look like: `snips:test@intent` is `snips:test`."""
    return name.partition("@")[0]


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
    twice = {name for name, count in Counter(map(task_of, names)).items() if count > 1}
    for record in result.examples:
        if record.seen:
            continue
        bare = task_of(record.task)
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
    """Return the tasks with choices on which no system is above chance, all its seeds together."""
    gains: dict[str, dict[str, list[float]]] = {}
    for system, _, record in scored:
        if record.score is not None and record.chance is not None:
            gains.setdefault(record.task, {}).setdefault(system, []).append(
                record.score - record.chance
            )
    return tuple(
        task
        for task, systems in sorted(gains.items())
        if not any(_is_above_zero(values) for values in systems.values())
    )


def _is_above_zero(values: Sequence[float]) -> bool:
    if len(values) < 2:
        return values[0] > 0
    return fmean(values) > _STANDARD_ERRORS * stdev(values) / len(values) ** 0.5
