"""Two results over the same examples, compared example by example.

Both models answered the same questions, so the difference is taken per example first: what makes
an example hard is the same on both sides and drops out, and the error of the mean difference is
usually much smaller than that of either score (Miller 2024, arXiv 2411.00640).
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

from scipy.stats import binomtest

from flanmoe.core.config import Config
from flanmoe.core.errors import DataError
from flanmoe.core.seeds import SeedTree
from flanmoe.evaluation.metrics import estimate_mean, macro_average
from flanmoe.evaluation.paired import (
    CONFIDENCE_LEVEL as CONFIDENCE_LEVEL,
)
from flanmoe.evaluation.paired import (
    Differences,
    Pair,
    PairedDifference,
    bootstrap_interval,
    loss_differences,
    score_differences,
    weighted_difference,
)
from flanmoe.evaluation.results import ExampleRecord, SuiteResult, read_result


class McNemar(Config):
    """Exact McNemar test: do the two models get different questions right equally often?

    Attributes:
        only_first, only_second: questions that one model alone answers rightly.
        p_value: two-sided probability of a split at least this uneven if the models were equally
            good; 1 where they never disagree.
    """

    only_first: int
    only_second: int
    p_value: float


class Comparison(Config):
    """Second minus first over one set of examples.

    Attributes:
        num_examples: pairs of examples.
        loss: nats per token (negative: the second is better); None where there are none, and where the models
            cut the reference answers into different tokens, which makes losses per token incomparable.
        accuracy: share of right answers (positive: the second is better), None where nothing is right or wrong.
        mcnemar: the exact test behind the accuracy, None where nothing is right or wrong.
    """

    num_examples: int
    loss: PairedDifference | None
    accuracy: PairedDifference | None
    mcnemar: McNemar | None


class GroupComparison(Config):
    """Second minus first over one group of a suite.

    Attributes:
        pooled: over all examples of the group alike.
        macro_accuracy: over its tasks alike, as the group's average is taken.
    """

    pooled: Comparison
    macro_accuracy: PairedDifference | None


class SuiteComparison(Config):
    """The comparison of two results.

    Attributes:
        pooled: over all examples alike; clustered standard errors take the tasks as clusters.
        macro_loss, macro_accuracy: over tasks alike, examples drawn anew within each task.
        tasks: per task.
        groups: per group, where the suite has groups.
        normalised_average: of the suite's normalised average, percent; None where it has none.
        same_prompts: whether both models were given the same text for every example.
        num_examples: examples in both results.
        num_seen: how many of them one model or both were trained on; left out unless there are no
            others.
        only_seen: True where there are no others.
    """

    pooled: Comparison
    macro_loss: PairedDifference | None
    macro_accuracy: PairedDifference | None
    tasks: dict[str, Comparison]
    groups: dict[str, GroupComparison] = {}
    normalised_average: PairedDifference | None = None
    same_prompts: bool
    num_examples: int
    num_seen: int
    only_seen: bool


def compare_files(first: Path, second: Path, *, seed: int = 0) -> SuiteComparison:
    """Compare two written results: folders, or their `scores.json`.

    Raises:
        DataError: if one cannot be read, or if they are over different examples.
    """
    return compare(read_result(first), read_result(second), seeds=SeedTree(seed))


def compare(first: SuiteResult, second: SuiteResult, *, seeds: SeedTree) -> SuiteComparison:
    """Compare two results, second minus first.

    Args:
        first, second: results with their examples.
        seeds: where the bootstrap draws come from.

    Raises:
        DataError: if the results are over different examples, or over none.
    """
    pairs = paired(first.examples, second.examples)
    new = [pair for pair in pairs if not (pair[0].seen or pair[1].seen)]
    counted = new or pairs
    tasks = {pair[0].task: None for pair in counted}
    by_task = {task: [pair for pair in counted if pair[0].task == task] for task in tasks}
    pooled = compare_pairs(counted, seeds=seeds.child("pooled"))
    # An average over the tasks whose tokens happen to agree would hide that the others do not.
    macro_loss = (
        _macro(by_task, loss_differences, seeds.child("macro-loss")) if pooled.loss else None
    )
    return SuiteComparison(
        pooled=pooled,
        macro_loss=macro_loss,
        macro_accuracy=_macro(by_task, score_differences, seeds.child("macro-accuracy")),
        tasks={
            task: compare_pairs(own, seeds=seeds.child("task").child(task))
            for task, own in by_task.items()
        },
        groups=_groups(first, by_task, seeds.child("group")),
        normalised_average=_normalised_average(first, by_task, seeds.child("normalised")),
        same_prompts=all(one.prompt_hash == other.prompt_hash for one, other in pairs),
        num_examples=len(pairs),
        num_seen=len(pairs) - len(new),
        only_seen=not new,
    )


def paired(first: Sequence[ExampleRecord], second: Sequence[ExampleRecord]) -> list[Pair]:
    """Put the records of the same example together, in the order of `first`.

    Raises:
        DataError: if one side has an example that the other lacks, or if there is none at all.
    """
    left, right = _identified(first), _identified(second)
    if left.keys() != right.keys():
        raise DataError(
            f"Two results can be compared over the same examples only, but {len(left.keys() - right.keys())} "
            f"of {len(left)} are only in the first and {len(right.keys() - left.keys())} of {len(right)} only "
            "in the second. Evaluate both models with the same suite, limit, seed and data."
        )
    if not left:
        raise DataError("Two results can be compared over their examples only, but both have 0.")
    return [(left[identity], right[identity]) for identity in left]


def compare_pairs(pairs: Sequence[Pair], *, seeds: SeedTree) -> Comparison:
    """Compare over one set of pairs, every example counting the same."""
    return Comparison(
        num_examples=len(pairs),
        loss=_difference(pairs, loss_differences, seeds.child("loss")),
        accuracy=_difference(pairs, score_differences, seeds.child("accuracy")),
        mcnemar=mcnemar(pairs),
    )


def mcnemar(pairs: Sequence[Pair]) -> McNemar | None:
    """Run the exact McNemar test (1947) over questions answered right or wrong; None without any."""
    answers = [
        (one.correct, other.correct)
        for one, other in pairs
        if one.correct is not None and other.correct is not None
    ]
    if not answers:
        return None
    split = Counter(answers)
    only_first, only_second = split[True, False], split[False, True]
    disagreements = only_first + only_second
    p_value = float(binomtest(only_first, disagreements).pvalue) if disagreements else 1.0
    return McNemar(only_first=only_first, only_second=only_second, p_value=p_value)


def _difference(
    pairs: Sequence[Pair], differences: Differences, seeds: SeedTree
) -> PairedDifference | None:
    found = differences(pairs)
    if not found:
        return None
    return PairedDifference(
        difference=estimate_mean(
            [value for value, _ in found], clusters=[task for _, task in found]
        ),
        interval=bootstrap_interval([[value for value, _ in found]], seeds=seeds),
    )


def _macro(
    by_task: Mapping[str, Sequence[Pair]], differences: Differences, seeds: SeedTree
) -> PairedDifference | None:
    samples = [
        [value for value, _ in found] for own in by_task.values() if (found := differences(own))
    ]
    if not samples:
        return None
    return PairedDifference(
        difference=macro_average([estimate_mean(sample) for sample in samples]),
        interval=bootstrap_interval(samples, seeds=seeds),
    )


def _groups(
    result: SuiteResult, by_task: Mapping[str, Sequence[Pair]], seeds: SeedTree
) -> dict[str, GroupComparison]:
    found: dict[str, GroupComparison] = {}
    for group in result.groups:
        weights = _weights(result, by_task, [group.group])
        if weights:
            own = {task: by_task[task] for task in weights}
            draws = seeds.child(group.group)
            found[group.group] = GroupComparison(
                pooled=compare_pairs(
                    [pair for pairs in own.values() for pair in pairs], seeds=draws
                ),
                macro_accuracy=weighted_difference(own, weights, seeds=draws.child("macro")),
            )
    return found


def _normalised_average(
    result: SuiteResult, by_task: Mapping[str, Sequence[Pair]], seeds: SeedTree
) -> PairedDifference | None:
    average = result.normalised_average
    if average is None:
        return None
    weights = {
        # From a share to percent of the way from chance to perfect.
        task: 100 * weight / (1 - (by_task[task][0][0].chance or 0.0))
        for task, weight in _weights(result, by_task, average.groups).items()
    }
    own = {task: by_task[task] for task in weights}
    return weighted_difference(own, weights, seeds=seeds) if own else None


def _weights(
    result: SuiteResult, by_task: Mapping[str, Sequence[Pair]], groups: Sequence[str]
) -> dict[str, float]:
    """Weights with which the scores of tasks enter the average over groups; they sum to 1.

    Groups count alike, whole tasks alike within a group, and parts alike within a whole task.
    """
    wholes: dict[str, dict[str, list[str]]] = {}
    for task in result.tasks:
        if task.cluster in groups and task.task in by_task:
            parts = wholes.setdefault(task.cluster, {})
            parts.setdefault(task.part_of or task.task, []).append(task.task)
    return {
        task: 1 / (len(wholes) * len(own) * len(parts))
        for own in wholes.values()
        for parts in own.values()
        for task in parts
    }


def _identified(records: Sequence[ExampleRecord]) -> dict[Hashable, ExampleRecord]:
    """Key records by task, name and content; equal ones by their turn."""
    turns: Counter[tuple[str, str, str]] = Counter()
    identified: dict[Hashable, ExampleRecord] = {}
    for record in records:
        name = (record.task, record.key, record.content_hash)
        identified[*name, turns[name]] = record
        turns[name] += 1
    return identified
