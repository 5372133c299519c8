"""From what tunings recorded to what a report says of the data: mixtures, shares, what was held out."""

from collections.abc import Mapping, Sequence

from flanmoe.core.cache import fingerprint
from flanmoe.data.packing import TaskCounts, merged
from flanmoe.stages.tune import TuneStageResult
from flanmoe.study.records import SeedResults
from flanmoe.study.report_data import DataReport, MixtureData, TaskData


def data_report(arms: Mapping[str, Sequence[SeedResults]]) -> DataReport:
    """What was trained on by which arms, what was left out, and what was only evaluated."""
    every = [seed for seeds in arms.values() for seed in seeds]
    names = list(
        dict.fromkeys(task.task for seed in every if seed.last for task in seed.last.tasks)
    )
    kept_back = {name for seed in every for name in seed.evaluation_only}
    evaluated = DataReport(
        held_out=tuple(name for name in names if name not in kept_back),
        evaluation_only=tuple(name for name in names if name in kept_back),
    )
    tunings = _different_tunings(every)
    if not tunings:
        return evaluated
    packing = merged(tuned.packing for tuned in tunings)
    return evaluated.model_copy(
        update={
            "mixtures": _mixtures(arms),
            "num_tunings": len(tunings),
            "num_seen": max(tuned.examples_seen for tuned in tunings),
            "num_dropped": packing.num_dropped,
            "num_truncated": packing.num_truncated,
            "num_without_exemplars": packing.num_without_exemplars,
            "padding_share": packing.padding_share,
        }
    )


def _different_tunings(every: Sequence[SeedResults]) -> list[TuneStageResult]:
    """Return the tunings without repeats: arms that say the same of their data draw the same rows."""
    found: dict[str, TuneStageResult] = {}
    for seed in every:
        for label, tuned in seed.tunings.items():
            drawn = [tuned.packing.to_mapping(), _mixture_identity(tuned), tuned.examples_seen]
            found.setdefault(fingerprint([seed.seed, label, drawn]), tuned)
    return list(found.values())


def _mixture_identity(tuned: TuneStageResult) -> str:
    return fingerprint({name: task.to_mapping() for name, task in tuned.mixture.items()})


def _mixtures(arms: Mapping[str, Sequence[SeedResults]]) -> tuple[MixtureData, ...]:
    """The mixtures in the order in which arms were first tuned on them."""
    drawing: dict[str, list[str]] = {}
    for name, seeds in arms.items():
        for identity in dict.fromkeys(
            _mixture_identity(tuned) for seed in seeds for tuned in seed.tunings.values()
        ):
            drawing.setdefault(identity, []).append(name)
    tunings = _different_tunings([seed for seeds in arms.values() for seed in seeds])
    return tuple(
        MixtureData(
            arms=tuple(names),
            tasks=_task_data([one for one in tunings if _mixture_identity(one) == identity]),
        )
        for identity, names in drawing.items()
    )


def _task_data(tunings: Sequence[TuneStageResult]) -> tuple[TaskData, ...]:
    """The tasks of one mixture, all of its tunings together."""
    packing = merged(tuned.packing for tuned in tunings)
    first = tunings[0]
    counts = {name: packing.tasks.get(name, TaskCounts()) for name in first.mixture}
    return tuple(
        TaskData(
            task=name,
            num_examples=task.size,
            rate=task.rate,
            num_draws=counts[name].examples,
            share=counts[name].examples / max(packing.num_examples, 1),
            num_tokens=counts[name].tokens,
            group=task.group or "",
            num_rejected=first.rejected.get(name, 0),
        )
        for name, task in sorted(first.mixture.items())
    )
