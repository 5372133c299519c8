"""From what a study recorded on disk to everything that its report shows."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from flanmoe.core.ledger import Ledger
from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.evaluation import results as evaluation_results
from flanmoe.evaluation.comparison import CONFIDENCE_LEVEL, PairedDifference, compare
from flanmoe.evaluation.metrics import Estimate
from flanmoe.evaluation.results import SuiteResult
from flanmoe.stages.tune import TuneStageResult
from flanmoe.study.analysis.analyse import analyse
from flanmoe.study.analysis.claim_result import ClaimResult
from flanmoe.study.arm_report import (
    ArmReport,
    ClusterScore,
    CurvePoint,
    Evaluation,
    LossCurve,
    Memory,
    PretrainingReport,
    RouterLosses,
    Score,
    TaskScore,
)
from flanmoe.study.factor_effects import factor_effects
from flanmoe.study.number_text import Metric
from flanmoe.study.observed import Observed, arm_costs, observe
from flanmoe.study.records import SeedResults, finished_results, unfinished
from flanmoe.study.report_data import Comparison, ReportData
from flanmoe.study.report_mixtures import data_report
from flanmoe.study.report_notes import machines, notes, step0_difference, warnings
from flanmoe.study.report_routing import alerts, expert_load, routing_curve
from flanmoe.study.study import Arm, Study
from flanmoe.study.written import written_study


def collect(study: Study, run: RunDir) -> ReportData:
    """Read what the arms and seeds of a study that have finished left; the others are named in the warnings.

    Raises:
        RunError: if none has finished.
    """
    arms = finished_results(study, run)
    data = data_report(arms)
    observed = observe(study, arms)
    effects, about_effects = factor_effects(
        observed.observations, seeds=SeedTree(study.seeds[0]).child("effects")
    )
    # Where nothing is judged nothing is left out of a judgement.
    observed_notes = observed.notes if study.claims or effects else ()
    reports = tuple(_arm_report(study, name, seeds) for name, seeds in arms.items())
    return ReportData(
        study=study.name,
        description=study.description,
        scale=_scale(reports, len(study.seeds)),
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        versions=run.read_json("versions.json"),
        hardware=machines(arms)[0],
        baseline=study.baseline_arm if study.baseline_arm in arms else "",
        arms=reports,
        data=data,
        claims=_claims(study, arms, observed),
        effects=effects,
        # Claims say what is compared with what; without them every arm is, with the baseline.
        comparisons=() if study.claims else tuple(_comparisons(study, arms)),
        warnings=(*unfinished(run), *warnings(arms), *observed_notes),
        written=written_study(run),
        notes=(*notes(arms, data.mixtures), *about_effects),
    )


def _claims(
    study: Study, arms: Mapping[str, Sequence[SeedResults]], observed: Observed
) -> tuple[ClaimResult, ...]:
    if not study.claims:
        return ()
    results = analyse(
        observed.observations,
        study.resolved_claims,
        arm_costs(study, arms),
        seeds=SeedTree(study.seeds[0]).child("claims"),
    )
    measured = observed.observations.measured()
    # Scores that do not count are not scores that are missing.
    return tuple(
        result.model_copy(update={"sentence": observed.notes[0]})
        if observed.at_chance and result.metric.name not in measured
        else result
        for result in results
    )


def _arm_report(study: Study, name: str, seeds: Sequence[SeedResults]) -> ArmReport:
    first = seeds[0]
    ledgers = [tuned.training.ledger for seed in seeds for tuned in seed.tunings.values()]
    return ArmReport(
        label=name,
        description=_description(study.arms[name]),
        seeds=tuple(seed.seed for seed in seeds),
        parameters=first.parameters,
        flops=first.flops,
        pretraining=_pretraining(first),
        ledger=sum(ledgers, Ledger()),
        memory=_memory(first),
        before=_mean_evaluation([seed.before for seed in seeds]),
        after=_mean_evaluation([seed.after for seed in seeds]),
        curves=tuple(_curve(seed) for seed in seeds if seed.tunings),
        expert_load=expert_load(first.tuned) if first.tuned else None,
        routing_curve=routing_curve(first),
        alerts=alerts(seeds),
        router_losses=_router_losses(first.tuned) if first.tuned else None,
        step0_max_abs_diff=step0_difference(seeds),
    )


def _description(arm: Arm) -> str:
    stages = ", then ".join(stage.label for stage in arm.stages)
    return f"{arm.description}: {stages}" if arm.description else stages


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


def _pretraining(seed: SeedResults) -> tuple[PretrainingReport, ...]:
    return tuple(
        PretrainingReport(
            label=label,
            tokens=found.training.ledger.real_tokens,
            epochs=found.epochs,
            loss=found.training.final_loss,
            held_out_loss=found.held_out_loss,
        )
        for label, found in seed.pretrainings.items()
    )


def _curve(seed: SeedResults) -> LossCurve:
    """The losses of all tunings of one seed, one after the other."""
    points: list[CurvePoint] = []
    tokens_before, flops_before = 0, 0.0
    for tuned in seed.tunings.values():
        ledger = tuned.training.ledger
        # Rows of one size cost alike, so FLOPs grow with tokens as they were counted for the whole.
        flops_per_token = ledger.flops / ledger.real_tokens if ledger.real_tokens else 0.0
        points += [
            CurvePoint(
                tokens=tokens_before + point.tokens,
                loss=point.loss,
                flops=flops_before + flops_per_token * point.tokens,
            )
            for point in tuned.training.loss_history
        ]
        tokens_before += ledger.real_tokens
        flops_before += ledger.flops
    return LossCurve(seed=seed.seed, points=tuple(points))


def _score(estimate: Estimate, *, chance: float | None = None) -> Score:
    return Score(
        mean=estimate.mean,
        standard_error=estimate.standard_error,
        num_examples=estimate.num_values,
        chance=chance,
    )


def _scores(scores: evaluation_results.Scores) -> tuple[Score | None, Score | None]:
    loss, accuracy = scores.loss, scores.accuracy
    return (
        _score(loss) if loss else None,
        _score(accuracy, chance=scores.chance) if accuracy else None,
    )


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
        loss=_mean_score([item.loss for item in evaluations if item.loss]),
        accuracy=_mean_score([item.accuracy for item in evaluations if item.accuracy]),
        tasks=tuple(
            TaskScore(
                task=task.task,
                loss=_mean_score([score for item in evaluations if (score := item.tasks[i].loss)]),
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
                    "loss": _mean_score(
                        [score for item in evaluations if (score := item.clusters[i].loss)]
                    ),
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
    for seed in study.seeds:
        shown = seed if len(study.seeds) > 1 else None
        finished = {
            name: one for name, results in arms.items() for one in results if one.seed == seed
        }
        reference = finished.get(study.baseline_arm)
        baseline = reference.after if reference else None
        for name, result in finished.items():
            after, before = result.after, result.before
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


def _scale(arms: Sequence[ArmReport], num_seeds: int) -> str:
    largest = max(arm.parameters.total for arm in arms) / 1e6
    tokens = max(arm.ledger.real_tokens for arm in arms)
    tuning = f"{tokens:,} tokens of tuning an arm" if tokens else "nothing tuned"
    seeds = f"{num_seeds} seed{'s' if num_seeds > 1 else ''}"
    return f"A small run: up to {largest:.3g} million parameters, {tuning}, {seeds}."
