"""From what a study recorded on disk to everything that its report shows."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from flanmoe.core.cache import fingerprint
from flanmoe.core.ledger import Ledger
from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.data.packing import PackingReport, TaskCounts, merged
from flanmoe.evaluation import results as evaluation_results
from flanmoe.evaluation.comparison import CONFIDENCE_LEVEL, PairedDifference, compare
from flanmoe.evaluation.metrics import Estimate
from flanmoe.evaluation.results import SuiteResult
from flanmoe.stages.tune import TuneStageResult
from flanmoe.study.records import SeedResults
from flanmoe.study.report_data import (
    ArmReport,
    ClusterScore,
    Comparison,
    CurvePoint,
    DataReport,
    Evaluation,
    ExpertLoadReport,
    Hardware,
    LossCurve,
    Memory,
    Metric,
    MixtureData,
    ReportData,
    RouterLosses,
    Score,
    TaskData,
    TaskScore,
)
from flanmoe.study.report_text import listed
from flanmoe.study.study import Study


def collect(study: Study, run: RunDir) -> ReportData:
    """Read a finished study's folder.

    Raises:
        RunError: if an arm is not finished.
    """
    arms = {
        name: [SeedResults(run.path, name, seed) for seed in study.seeds] for name in study.arms
    }
    reports = tuple(_arm_report(study, name, seeds) for name, seeds in arms.items())
    return ReportData(
        study=study.name,
        description=study.description,
        scale=_scale(reports, len(study.seeds)),
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        versions=run.read_json("versions.json"),
        hardware=_machines(arms)[0],
        baseline=study.baseline_arm,
        arms=reports,
        data=_data_report(arms),
        comparisons=tuple(_comparisons(study, arms)),
        warnings=tuple(_warnings(arms)),
        notes=tuple(_notes(arms)),
    )


def _arm_report(study: Study, name: str, seeds: Sequence[SeedResults]) -> ArmReport:
    first = seeds[0]
    ledgers = [tuned.training.ledger for seed in seeds for tuned in seed.tunings.values()]
    return ArmReport(
        label=name,
        description=", then ".join(stage.label for stage in study.arms[name].stages),
        seeds=tuple(study.seeds),
        parameters=first.parameters,
        flops=first.flops,
        ledger=sum(ledgers, Ledger()),
        memory=_memory(first),
        before=_mean_evaluation([seed.before for seed in seeds]),
        after=_mean_evaluation([seed.after for seed in seeds]),
        curves=tuple(_curve(seed) for seed in seeds if seed.tunings),
        expert_load=_expert_load(first.tuned) if first.tuned else None,
        router_losses=_router_losses(first.tuned) if first.tuned else None,
        step0_max_abs_diff=_step0_difference(seeds),
    )


def _memory(seed: SeedResults) -> Memory | None:
    if seed.tuned is None:
        return None
    return Memory(estimate=seed.tuned.memory.parts, measured=seed.tuning_peak_bytes)


def _router_losses(tuned: TuneStageResult) -> RouterLosses | None:
    if tuned.training.expert_load is None:
        return None
    return RouterLosses(
        settings=tuned.training.router_settings, last=dict(tuned.training.router_last)
    )


def _expert_load(tuned: TuneStageResult) -> ExpertLoadReport | None:
    load = tuned.training.expert_load
    if load is None:
        return None
    return ExpertLoadReport(
        layers=tuple(load.layers), shares=tuple(load.shares), entropy_nats=tuple(load.entropy_nats)
    )


def _curve(seed: SeedResults) -> LossCurve:
    """The losses of all tunings of one seed, one after the other."""
    points: list[CurvePoint] = []
    tokens_before = 0
    for tuned in seed.tunings.values():
        points += [
            CurvePoint(tokens=tokens_before + point.tokens, loss=point.loss)
            for point in tuned.training.loss_history
        ]
        tokens_before += tuned.training.ledger.real_tokens
    return LossCurve(seed=seed.seed, points=tuple(points))


def _score(estimate: Estimate, *, chance: float | None = None) -> Score:
    return Score(
        mean=estimate.mean,
        standard_error=estimate.standard_error,
        num_examples=estimate.num_values,
        chance=chance,
    )


def _scores(scores: evaluation_results.Scores) -> tuple[Score, Score | None]:
    accuracy = scores.accuracy
    return _score(scores.loss), _score(accuracy, chance=scores.chance) if accuracy else None


def _evaluation(result: SuiteResult) -> Evaluation:
    loss, accuracy = _scores(result.pooled)
    tasks: list[TaskScore] = []
    for task in result.tasks:
        task_loss, task_accuracy = _scores(task.headline)
        tasks.append(
            TaskScore(
                task=task.task,
                loss=task_loss,
                accuracy=task_accuracy,
                num_seen=task.num_seen,
                num_truncated=task.num_truncated,
            )
        )
    return Evaluation(loss=loss, accuracy=accuracy, tasks=tuple(tasks), clusters=_clusters(result))


def _clusters(result: SuiteResult) -> tuple[ClusterScore, ...]:
    found: list[ClusterScore] = []
    for name, scores in result.clusters.items():
        loss, accuracy = _scores(scores)
        num_tasks = sum(task.cluster == name for task in result.tasks)
        found.append(ClusterScore(cluster=name, num_tasks=num_tasks, loss=loss, accuracy=accuracy))
    return tuple(found)


def _mean_evaluation(results: Sequence[SuiteResult | None]) -> Evaluation | None:
    """Average evaluations of several seeds; the questions are the same, so their errors do not shrink."""
    evaluations = [_evaluation(result) for result in results if result is not None]
    if not evaluations:
        return None
    first = evaluations[0]
    return Evaluation(
        loss=_mean_score([item.loss for item in evaluations]),
        accuracy=_mean_score([item.accuracy for item in evaluations if item.accuracy]),
        tasks=tuple(
            TaskScore(
                task=task.task,
                loss=_mean_score([item.tasks[i].loss for item in evaluations]) or task.loss,
                accuracy=_mean_score(
                    [score for item in evaluations if (score := item.tasks[i].accuracy)]
                ),
                num_seen=task.num_seen,
                num_truncated=task.num_truncated,
            )
            for i, task in enumerate(first.tasks)
        ),
        clusters=tuple(
            cluster.model_copy(
                update={
                    "loss": _mean_score([item.clusters[i].loss for item in evaluations]),
                    "accuracy": _mean_score(
                        [score for item in evaluations if (score := item.clusters[i].accuracy)]
                    ),
                }
            )
            for i, cluster in enumerate(first.clusters)
        ),
    )


def _mean_score(scores: Sequence[Score]) -> Any:
    if not scores:
        return None
    means = [score.mean for score in scores]
    mean = (
        None if None in means else sum(value for value in means if value is not None) / len(means)
    )
    return scores[0].model_copy(update={"mean": mean})


def _comparisons(study: Study, arms: Mapping[str, Sequence[SeedResults]]) -> list[Comparison]:
    found: list[Comparison] = []
    for number, seed in enumerate(study.seeds):
        shown = seed if len(study.seeds) > 1 else None
        baseline = arms[study.baseline_arm][number].after
        for name, results in arms.items():
            after, before = results[number].after, results[number].before
            draws = SeedTree(seed).child("comparison").child(name)
            if after and baseline and name != study.baseline_arm:
                pair = _Pair(name, study.baseline_arm, "arms", shown)
                found += _paired(pair, (baseline, after), draws.child("arms"))
            if after and before:
                pair = _Pair(name, name, "tuning", shown)
                found += _paired(pair, (before, after), draws.child("tuning"))
    return sorted(found, key=lambda comparison: comparison.kind != "arms")


class _Pair(NamedTuple):
    """Who is compared with whom."""

    subject: str
    reference: str
    kind: Literal["arms", "tuning"]
    seed: int | None


def _paired(
    pair: _Pair, results: tuple[SuiteResult, SuiteResult], draws: SeedTree
) -> list[Comparison]:
    comparison = compare(*results, seeds=draws).pooled
    rows: list[tuple[Metric, PairedDifference | None]] = [
        ("loss", comparison.loss),
        ("accuracy", comparison.accuracy),
    ]
    return [_comparison(pair, metric, row) for metric, row in rows if row and row.interval]


def _comparison(pair: _Pair, metric: Metric, row: PairedDifference) -> Comparison:
    assert row.interval is not None
    estimate = row.difference
    return Comparison(
        subject=pair.subject,
        reference=pair.reference,
        kind=pair.kind,
        seed=pair.seed,
        metric=metric,
        mean=estimate.mean,
        standard_error=estimate.standard_error,
        clustered_standard_error=estimate.clustered_standard_error,
        low=row.interval[0],
        high=row.interval[1],
        confidence=CONFIDENCE_LEVEL,
        num_examples=estimate.num_values,
    )


def _data_report(arms: Mapping[str, Sequence[SeedResults]]) -> DataReport:
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


def _scale(arms: Sequence[ArmReport], num_seeds: int) -> str:
    largest = max(arm.parameters.total for arm in arms) / 1e6
    tokens = max(arm.ledger.real_tokens for arm in arms)
    tuning = f"{tokens:,} tokens of tuning an arm" if tokens else "nothing tuned"
    seeds = f"{num_seeds} seed{'s' if num_seeds > 1 else ''}"
    return f"A small run: up to {largest:.3g} million parameters, {tuning}, {seeds}."


def _notes(arms: Mapping[str, Sequence[SeedResults]]) -> list[str]:
    notes = [
        f"Before tuning, no logit of the upcycled {'arms' if len(names) > 1 else 'arm'} {listed(names)} "
        f"differed by more than {difference} from the dense model's on the probe text."
        for difference, names in _step0_differences(arms).items()
    ]
    results = [seed.last for seeds in arms.values() for seed in seeds if seed.last]
    notes += dict.fromkeys(
        f"Task {skipped.task} was skipped: {skipped.reason}"
        for result in results
        for skipped in result.skipped
    )
    notes += [note for mixture in _mixtures(arms) if (note := _repeats(mixture))]
    if len(machines := _machines(arms)) > 1:
        names = "; ".join(f"{item.cpu}, {item.num_cores} cores" for item in machines)
        notes.append(
            f"The study ran on {len(machines)} machines, so seconds do not compare: {names}."
        )
    return notes


def _repeats(mixture: MixtureData) -> str:
    """Say which sets were smaller than their share of the draws, all seeds together; empty for none."""
    repeated = [task for task in mixture.tasks if task.num_draws > task.num_examples > 0]
    if not repeated:
        return ""
    most = max(repeated, key=lambda task: task.num_draws / task.num_examples)
    return (
        f"{len(repeated)} of the {len(mixture.tasks)} tasks that {listed(mixture.arms)} drew from hold fewer "
        f"examples than they were drawn, so some were seen again; most often those of {most.task} "
        f"({most.num_draws:,} draws of {most.num_examples:,} examples)."
    )


def _step0_differences(arms: Mapping[str, Sequence[SeedResults]]) -> dict[str, list[str]]:
    """Return the arms by their logit difference at step 0, those that agree together."""
    found: dict[str, list[str]] = {}
    for name, seeds in arms.items():
        difference = _step0_difference(seeds)
        if difference is not None:
            found.setdefault(f"{difference:.1e}", []).append(name)
    return found


def _step0_difference(seeds: Sequence[SeedResults]) -> float | None:
    """The largest logit difference at step 0 of all seeds, None where nothing was upcycled."""
    differences = [seed.upcycled.step0_max_abs_diff for seed in seeds if seed.upcycled]
    return max(differences, default=None)


def _machines(arms: Mapping[str, Sequence[SeedResults]]) -> list[Hardware]:
    """The machines that finished the jobs, in order."""
    found: list[Hardware] = []
    for seed in (seed for seeds in arms.values() for seed in seeds):
        if seed.hardware not in found:
            found.append(seed.hardware)
    return found


def _warnings(arms: Mapping[str, Sequence[SeedResults]]) -> list[str]:
    """What was left out or cut: of the data once where arms agree, of the questions for each arm."""
    found = {
        task: number
        for seeds in arms.values()
        for seed in seeds
        for task, number in seed.rejected.items()
    }
    sentences = [
        f"{number:,} record{'s' if number > 1 else ''} of the task {task} could not be read and "
        f"{'were' if number > 1 else 'was'} left out (`on_bad_record: skip`)."
        for task, number in found.items()
    ]
    sentences += _overlap_warnings(arms)
    sentences += _packing_warnings(arms)
    for name, seeds in arms.items():
        result = seeds[0].last
        if result is not None and result.num_truncated:
            sentences.append(
                f"{result.num_truncated:,} of the {result.num_examples:,} prompts that {name} answered were "
                "cut on their left to fit into the model's positions."
            )
    return sentences


def _overlap_warnings(arms: Mapping[str, Sequence[SeedResults]]) -> list[str]:
    tunings = (t for seeds in arms.values() for seed in seeds for t in seed.tunings.values())
    left_out = {name: task.left_out for tuned in tunings for name, task in tuned.mixture.items()}
    return [
        f"{number:,} example{'s' if number > 1 else ''} of {name} {'were' if number > 1 else 'was'} left out "
        "of training because of overlap with evaluated text (`without_overlap_of`)."
        for name, number in left_out.items()
        if number
    ]


def _packing_warnings(arms: Mapping[str, Sequence[SeedResults]]) -> list[str]:
    """Sentences about draws left out or cut, all tunings of an arm together; arms by name if they differ."""
    packed = {
        name: merged(tuned.packing for seed in seeds for tuned in seed.tunings.values())
        for name, seeds in arms.items()
        if seeds[0].tunings
    }
    alike = len({_left_out(found) for found in packed.values()}) == 1
    sentences: list[str] = []
    for name, found in packed.items():
        draws = "draws" if alike else f"draws of {name}"
        if found.num_dropped:
            sentences.append(
                f"{found.num_dropped:,} {draws} were left out of training because they are longer than a row "
                "(`packing.length`)."
            )
        if found.num_truncated:
            sentences.append(
                f"{found.num_truncated:,} {draws} were cut at their end to fit into a row (`packing.length`)."
            )
        if found.num_without_exemplars:
            sentences.append(
                f"{found.num_without_exemplars:,} few-shot {draws} were left out of training because not one "
                "exemplar fits before them (`template.prompt_tokens`)."
            )
    return list(dict.fromkeys(sentences))


def _left_out(packing: PackingReport) -> tuple[int, ...]:
    return packing.num_dropped, packing.num_truncated, packing.num_without_exemplars
