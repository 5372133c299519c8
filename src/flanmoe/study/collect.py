"""From what a study recorded on disk to everything that its report shows."""

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil

from flanmoe.core.cores import usable_cores
from flanmoe.core.ledger import Ledger
from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.data.packing import PackingReport
from flanmoe.evaluation import results as evaluation_results
from flanmoe.evaluation.comparison import CONFIDENCE_LEVEL, PairedDifference, compare
from flanmoe.evaluation.metrics import Estimate
from flanmoe.evaluation.results import SuiteResult
from flanmoe.stages.tune import TuneStageResult
from flanmoe.study.records import SeedResults, flops_of
from flanmoe.study.report_data import (
    ArmReport,
    Comparison,
    CurvePoint,
    DataReport,
    Evaluation,
    ExpertLoadReport,
    Flops,
    Hardware,
    LossCurve,
    Memory,
    Metric,
    Parameters,
    ReportData,
    RouterLosses,
    Score,
    TaskData,
    TaskScore,
)
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
    tuned = next((seed.tuned for seeds in arms.values() for seed in seeds if seed.tuned), None)
    return ReportData(
        study=study.name,
        description=study.description,
        scale=_scale(reports, len(study.seeds)),
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        versions=run.read_json("versions.json"),
        hardware=_hardware(),
        baseline=study.baseline_arm,
        arms=reports,
        data=_data_report(study, tuned, arms),
        comparisons=tuple(_comparisons(study, arms)),
        warnings=tuple(_warnings(tuned, arms)),
        notes=tuple(_notes(arms)),
    )


def _arm_report(study: Study, name: str, seeds: Sequence[SeedResults]) -> ArmReport:
    first = seeds[0]
    tuned = [seed.tuned for seed in seeds if seed.tuned is not None]
    ledger = sum((result.training.ledger for result in tuned), Ledger())
    parameters, flops, memory, router = _sizes(first)
    upcycled = first.upcycled
    return ArmReport(
        label=name,
        description=", then ".join(stage.label for stage in study.arms[name].stages),
        seeds=tuple(study.seeds),
        parameters=parameters,
        flops=flops,
        ledger=ledger,
        memory=memory,
        before=_mean_evaluation([seed.evaluation(after=False) for seed in seeds]),
        after=_mean_evaluation([seed.evaluation(after=True) for seed in seeds]),
        curves=tuple(_curve(seed) for seed in seeds if seed.tuned is not None),
        expert_load=_expert_load(tuned[0]) if tuned else None,
        router_losses=router,
        step0_max_abs_diff=upcycled.step0_max_abs_diff if upcycled else None,
    )


def _sizes(
    seed: SeedResults,
) -> tuple[Parameters, Flops, Memory | None, RouterLosses | None]:
    """Parameters, FLOPs, memory and router losses, from tuning if there was any, else from the model."""
    tuned = seed.tuned
    if tuned is None:
        return *seed.untuned_size(), None, None
    record = seed.tune_stage or {}
    measured = record["peak_memory_bytes"] if record.get("peak_memory_is_of_this_stage") else None
    return (
        Parameters(
            total=tuned.parameters.total,
            active=tuned.parameters.active,
            trainable=tuned.parameters.trainable,
        ),
        flops_of(tuned.flops),
        Memory(estimate=tuned.memory.parts, measured=measured),
        _router_losses(tuned),
    )


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
    assert seed.tuned is not None
    points = seed.tuned.training.loss_history
    return LossCurve(
        seed=seed.seed,
        points=tuple(CurvePoint(tokens=point.tokens, loss=point.loss) for point in points),
    )


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
    return Evaluation(loss=loss, accuracy=accuracy, tasks=tuple(tasks))


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
        baseline = arms[study.baseline_arm][number].evaluation(after=True)
        for name, results in arms.items():
            after = results[number].evaluation(after=True)
            before = results[number].evaluation(after=False)
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


def _data_report(
    study: Study, tuned: TuneStageResult | None, arms: Mapping[str, Sequence[SeedResults]]
) -> DataReport:
    evaluated = [
        result
        for seeds in arms.values()
        for seed in seeds
        if (result := seed.evaluation(after=True) or seed.evaluation(after=False))
    ]
    names = list(dict.fromkeys(task.task for result in evaluated for task in result.tasks))
    kept_back = {name for seeds in arms.values() for seed in seeds for name in seed.evaluation_only}
    if tuned is None:
        return DataReport(held_out=tuple(names))
    return DataReport(
        tasks=_task_data(tuned),
        num_seen=tuned.examples_seen,
        num_dropped=tuned.packing.num_dropped,
        num_truncated=tuned.packing.num_truncated,
        padding_share=tuned.packing.padding_share,
        held_out=tuple(name for name in names if name not in kept_back),
        evaluation_only=tuple(name for name in names if name in kept_back),
    )


def _task_data(tuned: TuneStageResult) -> tuple[TaskData, ...]:
    packed = tuned.packing.tasks
    names = sorted({*tuned.task_sizes, *packed})
    draws = {name: packed[name].examples if name in packed else 0 for name in names}
    total = sum(draws.values())
    return tuple(
        TaskData(
            task=name,
            num_examples=tuned.task_sizes.get(name, 0),
            num_draws=draws[name],
            share=draws[name] / max(total, 1),
            num_rejected=tuned.rejected.get(name, 0),
        )
        for name in names
    )


def _scale(arms: Sequence[ArmReport], num_seeds: int) -> str:
    largest = max(arm.parameters.total for arm in arms) / 1e6
    tokens = max(arm.ledger.real_tokens for arm in arms)
    tuning = f"{tokens:,} tokens of tuning an arm" if tokens else "nothing tuned"
    seeds = f"{num_seeds} seed{'s' if num_seeds > 1 else ''}"
    return f"A small run: up to {largest:.3g} million parameters, {tuning}, {seeds}."


def _notes(arms: Mapping[str, Sequence[SeedResults]]) -> "list[str]":
    notes: list[str] = []
    for name, seeds in arms.items():
        upcycled = seeds[0].upcycled
        if upcycled is not None:
            notes.append(
                f"Before tuning, no logit of the upcycled arm {name} differed by more than "
                f"{upcycled.step0_max_abs_diff:.1e} from the dense model's on the probe text."
            )
        result = seeds[0].evaluation(after=True) or seeds[0].evaluation(after=False)
        for skipped in result.skipped if result else ():
            notes.append(f"Task {skipped.task} was skipped: {skipped.reason}")
    return notes


def _warnings(
    tuned: TuneStageResult | None, arms: Mapping[str, Sequence[SeedResults]]
) -> "list[str]":
    """What was left out or cut: of the data once for all arms, of the questions for each arm."""
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
    if tuned is not None:
        sentences += _packing_warnings(tuned.packing)
    for name, seeds in arms.items():
        result = seeds[0].evaluation(after=True) or seeds[0].evaluation(after=False)
        if result is not None and result.num_truncated:
            sentences.append(
                f"{result.num_truncated:,} of the {result.num_examples:,} prompts that {name} answered were "
                "cut on their left to fit into the model's positions."
            )
    return sentences


def _packing_warnings(packing: PackingReport) -> "list[str]":
    sentences: list[str] = []
    if packing.num_dropped:
        sentences.append(
            f"{packing.num_dropped:,} draws were left out of training because they are longer than a row "
            "(`packing.length`)."
        )
    if packing.num_truncated:
        sentences.append(
            f"{packing.num_truncated:,} draws were cut at their end to fit into a row (`packing.length`)."
        )
    return sentences


def _hardware() -> Hardware:
    return Hardware(
        cpu=_cpu_name(),
        num_cores=usable_cores(),
        memory_bytes=psutil.virtual_memory().total,
    )


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
