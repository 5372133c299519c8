"""From what tunings recorded of their routing to what a report shows: load by task, its course, alerts."""

from collections.abc import Mapping, Sequence

from flanmoe.moe.alerts import Alert
from flanmoe.stages.tune import TuneStageResult
from flanmoe.study.arm_report import (
    AlertReport,
    ExpertLoadReport,
    RoutingCurvePoint,
    TaskLoad,
)
from flanmoe.study.number_text import listed
from flanmoe.study.records import SeedResults
from flanmoe.study.shared_tuning import alike
from flanmoe.training.trained_routing import TrainedTask

# A report is read; results have the rest.
_MOST_TASKS = 24
# Beyond these a sentence counts the arms.
_MOST_NAMES = 4


def expert_load(tuned: TuneStageResult) -> ExpertLoadReport | None:
    """Return the use of experts in a tuning, None for a dense model."""
    load = tuned.training.expert_load
    if load is None:
        return None
    drops = tuned.training.drops
    sides = tuple(name.partition(".")[0] for name in load.names)
    tasks = tuned.training.tasks
    most = sorted(tasks, key=lambda name: (-max(tasks[name].tokens), name))[:_MOST_TASKS]
    return ExpertLoadReport(
        layers=tuple(load.layers),
        shares=tuple(load.shares),
        entropy_nats=tuple(load.entropy_nats),
        sides=sides if set(sides) <= {"encoder", "decoder"} else (),
        dropped_share=drops.dropped_share if drops else (),
        unserved_share=drops.unserved_share if drops else (),
        tasks=tuple(_task_load(name, tasks[name]) for name in most),
        num_tasks=len(tasks),
    )


def _task_load(name: str, task: TrainedTask) -> TaskLoad:
    return TaskLoad(
        task=name,
        tokens=max(task.tokens),
        shares=tuple(
            tuple(count / max(sum(counts), 1) for count in counts) for counts in task.counts
        ),
        entropy_share=task.entropy_share,
        confidence=task.confidence,
    )


def routing_curve(seed: SeedResults) -> tuple[RoutingCurvePoint, ...]:
    """Return how even the load was through all tunings of a seed, one after the other."""
    points: list[RoutingCurvePoint] = []
    tokens_before = 0
    for tuned in seed.tunings.values():
        points += [
            RoutingCurvePoint(
                tokens=tokens_before + point.tokens, worst=point.worst, mean=point.mean
            )
            for point in tuned.training.routing_history
        ]
        tokens_before += tuned.training.ledger.real_tokens
    return tuple(points)


def alerts(seeds: Sequence[SeedResults]) -> tuple[AlertReport, ...]:
    """Return every alert of the tunings of an arm."""
    return tuple(
        AlertReport(seed=seed.seed, stage=label, alert=alert)
        for seed in seeds
        for label, tuned in seed.tunings.items()
        for alert in tuned.training.alerts
    )


def shared_alert_sentences(found: Mapping[str, Sequence[AlertReport]]) -> list[str]:
    """Say what was wrong in every arm, once for arms with the same alerts, which share their tuning.

    Args:
        found: the alerts of each arm.
    """
    return [
        sentence
        for names in alike(list(found), lambda arm: found[arm])
        for sentence in alert_sentences(listed(names, most=_MOST_NAMES), found[names[0]])
    ]


def alert_sentences(arm: str, found: Sequence[AlertReport]) -> list[str]:
    """Say what was wrong, one sentence for each kind: that of the first place, and how many others."""
    by_kind: dict[str, list[Alert]] = {}
    for one in found:
        by_kind.setdefault(one.alert.kind, []).append(one.alert)
    return [f"{arm}: {_sentence(alike)}" for alike in by_kind.values()]


def _sentence(alike: Sequence[Alert]) -> str:
    first, *others = alike
    ended = "was still so at the end"
    if first.cleared is not None:
        ended = f"was well again after step {first.cleared:,}"
    more = ""
    if others:
        plural = "s" if len(others) > 1 else ""
        more = f" The same kind of alert was raised {len(others)} time{plural} more, in other places or seeds."
    return f"{first.words} It was noticed after step {first.step:,} and {ended}.{more}"
