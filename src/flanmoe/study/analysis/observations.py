"""The table that claims are judged on: one score per arm, seed, task, example and metric.

Arms are declared beside the scores, with their factors, so that an arm that failed and left none is
known to be missing.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from flanmoe.core.errors import DataError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.study.analysis.metric import METRICS, Metric

Level = str | int | float | bool
Factors = Mapping[str, Level]


@dataclass(frozen=True, slots=True)
class Observation:
    """One score.

    Attributes:
        arm: name of the arm.
        seed: the seed that it ran with.
        task: name of the task.
        example: key of the example within its task, the same in all arms and seeds.
        metric: name of the metric.
        value: the score, in the metric's own unit (an accuracy between 0 and 1, a loss in nats per token).
    """

    arm: str
    seed: int
    task: str
    example: str
    metric: str
    value: float


class Observations:
    """Scores by metric, arm, seed and task; the order of the records does not matter.

    Args:
        records: the scores.
        arms: every arm of the study with its factors (an empty mapping where there are none), those
            without scores included.
        metrics: what the names of metrics mean.

    Raises:
        DataError: if a record names an arm or a metric that is not declared, or if a score is there twice.
    """

    def __init__(
        self,
        records: Iterable[Observation],
        *,
        arms: Mapping[str, Factors],
        metrics: Iterable[Metric] = METRICS,
    ) -> None:
        self.arms = {name: dict(factors) for name, factors in arms.items()}
        self.metrics = {metric.name: metric for metric in metrics}
        self._runs: dict[tuple[str, str], dict[int, dict[str, dict[str, float]]]] = {}
        for record in records:
            self._add(record)

    def _add(self, record: Observation) -> None:
        if record.arm not in self.arms:
            raise DataError(_unknown("arm", record.arm, self.arms))
        if record.metric not in self.metrics:
            raise DataError(_unknown("metric", record.metric, self.metrics))
        run = self._runs.setdefault((record.metric, record.arm), {})
        scores = run.setdefault(record.seed, {}).setdefault(record.task, {})
        if record.example in scores:
            raise DataError(
                f"Every example may have one `{record.metric}` in each run, but example `{record.example}` of "
                f"task `{record.task}` has two in arm `{record.arm}` with seed {record.seed}. Was the seed "
                "repeated? Give every run a seed of its own."
            )
        scores[record.example] = record.value

    def measured(self) -> tuple[str, ...]:
        """Names of the metrics that at least one arm has, in the order of their declaration."""
        found = {metric for metric, _ in self._runs}
        return tuple(name for name in self.metrics if name in found)

    def has(self, metric: str, arm: str) -> bool:
        """Whether an arm has any score of a metric."""
        return (metric, arm) in self._runs

    def seeds(self, metric: str, arm: str) -> tuple[int, ...]:
        """Seeds that an arm has scores of a metric with, in order."""
        return tuple(sorted(self._runs.get((metric, arm), {})))

    def tasks(self, metric: str, arms: Iterable[str]) -> tuple[str, ...]:
        """Tasks that any of the arms has scores of with any seed, in order."""
        runs = [run for arm in arms for run in self._runs.get((metric, arm), {}).values()]
        return tuple(sorted({task for run in runs for task in run}))

    def scores(self, metric: str, arm: str, seed: int, task: str) -> Mapping[str, float]:
        """Scores of one task by key of the example; empty where there are none."""
        return self._runs.get((metric, arm), {}).get(seed, {}).get(task, {})

    def records(self) -> Iterator[Observation]:
        """All scores as records."""
        for (metric, arm), runs in self._runs.items():
            for seed, tasks in runs.items():
                for task, scores in tasks.items():
                    for example, value in scores.items():
                        yield Observation(arm, seed, task, example, metric, value)


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    names = list(known)
    return (
        f"A score must belong to one of the {kind}s {listing(names)}, but found `{name}`."
        f"{nearest_name_hint(name, names)} Declare it, or take its scores out."
    )
