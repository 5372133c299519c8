"""What the averages of a few-shot suite are over, and its headline."""

from collections.abc import Mapping, Sequence

from flanmoe.evaluation.averages import mean_error
from flanmoe.evaluation.metrics import estimate_mean
from flanmoe.evaluation.results import GroupCoverage, NormalisedAverage, Scores
from flanmoe.evaluation.suites.groups import PromptedSuite
from flanmoe.evaluation.suites.questions import LoadedSuite


def group_coverage(loaded: LoadedSuite) -> tuple[GroupCoverage, ...]:
    """Return for every group of a suite what its average lacks; groups without any data too."""
    missing: dict[str, list[str]] = {}
    for skip in loaded.skipped:
        missing.setdefault(skip.group, []).append(skip.task.removeprefix(f"{skip.group}/"))
    return tuple(
        GroupCoverage(
            group=group.name,
            title=group.title,
            mode=group.mode,
            shots=group.shots,
            held=group.held,
            num_tasks=group.num_tasks,
            missing=tuple(missing.get(group.name, ())),
            partial=group.name in missing,
        )
        for group in loaded.config.groups
    )


def suite_average(
    suite: PromptedSuite,
    clusters: Mapping[str, Scores],
    groups: Sequence[GroupCoverage],
    *,
    held: str | None = None,
) -> NormalisedAverage | None:
    """Return the mean of the normalised scores of the groups that a suite averages (FLAN-MoE, section 4).

    Args:
        suite: says which groups.
        clusters: scores by group.
        groups: what each of them lacks.
        held: only over groups that are held `in` or `out`; None for all.

    Returns:
        None where the suite averages no such group, or none has data.
    """
    wanted = [
        group for group in groups if group.group in suite.averaged and held in (None, group.held)
    ]
    found = [
        (group, scores)
        for group in wanted
        if (scores := clusters.get(group.group)) and scores.normalised_accuracy is not None
    ]
    if not found:
        return None
    means = [
        scores.normalised_accuracy for _, scores in found if scores.normalised_accuracy is not None
    ]
    names = [group.group for group, _ in found]
    missing = tuple(group.group for group in wanted if group.group not in names)
    return NormalisedAverage(
        groups=tuple(names),
        mean=estimate_mean(means).mean,
        # Groups ask different questions, so their errors are independent.
        standard_error=mean_error([scores.normalised_standard_error for _, scores in found]),
        missing=missing,
        partial=bool(missing) or any(group.partial for group, _ in found),
    )
