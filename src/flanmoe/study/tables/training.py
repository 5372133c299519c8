"""Tables of how training went: routing, losses, versions."""

from collections.abc import Sequence
from statistics import fmean

from flanmoe.moe.alerts import Alert
from flanmoe.study.arm_report import ArmReport, CurvePoint, ExpertLoadReport, RouterLosses
from flanmoe.study.number_text import exact, percent, short, size
from flanmoe.study.report_data import ReportData
from flanmoe.study.shared_tuning import alike, counting
from flanmoe.study.tables.base import MOST_ARM_COLUMNS, Section, TextTable

_MOST_EXPERTS_NAMED = 6
_MOST_LOADS = 4


def routing(data: ReportData) -> Section:
    """Router losses and the load of every expert; of many arms a row each, and the loads that stand out."""
    sparse = [arm for arm in data.arms if arm.expert_load is not None]
    tables: list[TextTable] = []
    detailed = data.arms
    if len(sparse) > MOST_ARM_COLUMNS:
        tables.append(_loads_table(sparse))
        distinct = list(map(counting, alike(sparse, lambda arm: arm.expert_load)))
        detailed = sorted(distinct, key=_unevenness)[-_MOST_LOADS:]
    for arm in detailed:
        if arm.router_losses is not None:
            tables.append(_router_table(arm, arm.router_losses))
        if arm.expert_load is not None:
            tables.append(_load_table(arm))
        if arm.expert_load is not None and arm.expert_load.tasks:
            tables.append(_task_table(arm, arm.expert_load))
    tables += [found for found in (_drops_table(data), _alert_table(data)) if found]
    return Section("Routing", tuple(tables))


def _counted(rows: Sequence[tuple[str, ...]], data: ReportData) -> str:
    """Explain labels that stand for several arms, where there are any."""
    is_shared = not {row[0] for row in rows} <= {arm.label for arm in data.arms}
    return "+ 3 stands for three more arms with the same tuning. " if is_shared else ""


def _unevenness(arm: ArmReport) -> float:
    return arm.expert_load.max_over_mean if arm.expert_load else 0.0


def _router_table(arm: ArmReport, losses: RouterLosses) -> TextTable:
    settings = [(name, str(value)) for name, value in losses.settings.items()]
    last = [(f"{name}, last step", _finite(value)) for name, value in losses.last.items()]
    return TextTable(
        ("router losses", arm.label), (*settings, *last), title=f"Router losses: {arm.label}"
    )


def _loads_table(arms: Sequence[ArmReport]) -> TextTable:
    """How even the load of each arm was, and its router losses at the end."""
    names = dict.fromkeys(
        name for arm in arms if arm.router_losses for name in arm.router_losses.last
    )
    rows = [
        (
            arm.label,
            exact(load.num_experts),
            f"{load.max_over_mean:.2f}",
            f"{min(load.entropy_nats):.3f}" if load.entropy_nats else "",
            exact(load.num_unused),
            *(_last_loss(arm, name) for name in names),
        )
        for arm in arms
        if (load := arm.expert_load) is not None
    ]
    header = ("arm", "experts", "busiest expert", "lowest entropy (nats)", "unused experts")
    return TextTable(
        (*header, *(f"{name}, last step" for name in names)),
        tuple(rows),
        title="Load of all arms",
        note="Busiest expert: of any layer, times the even share. Entropy: of the most uneven layer; "
        f"ln(experts) is even. Below: the {_MOST_LOADS} arms of the most uneven load; report.json has all.",
    )


def _last_loss(arm: ArmReport, name: str) -> str:
    found = arm.router_losses.last if arm.router_losses else {}
    return _finite(found[name]) if name in found else ""


def _finite(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _load_table(arm: ArmReport) -> TextTable:
    load = arm.expert_load
    assert load is not None
    entropies = [f"{value:.3f}" for value in load.entropy_nats] or [""] * len(load.layers)
    return TextTable(
        ("layer", "entropy (nats)", *(f"expert {expert}" for expert in range(load.num_experts))),
        tuple(
            (name, entropy, *(percent(share) for share in row))
            for name, entropy, row in zip(load.names, entropies, load.shares, strict=True)
        ),
        title=f"Share of assignments: {arm.label}",
        note=f"The even share is {percent(1 / load.num_experts)}.",
    )


def _task_table(arm: ArmReport, load: ExpertLoadReport) -> TextTable:
    """How each task uses the experts, as means over layers."""
    rows = [
        (
            task.task,
            exact(task.tokens),
            percent(fmean(task.entropy_share)),
            f"{fmean(max(row) for row in task.shares) * load.num_experts:.2f}",
            percent(fmean(task.confidence)),
        )
        for task in load.tasks
    ]
    left_out = load.num_tasks - len(load.tasks)
    more = f" {left_out} tasks with fewer tokens are left out." if left_out else ""
    return TextTable(
        ("task", "tokens", "entropy of its load", "busiest expert", "confidence"),
        tuple(rows),
        title=f"Routing by task: {arm.label}",
        note="Means over layers. Entropy: of the most there is. Busiest expert: times the even share. "
        f"Confidence: mean largest router probability.{more}",
    )


def _alert_place(alert: Alert) -> str:
    if not alert.experts:
        return alert.name
    named = ", ".join(map(str, alert.experts[:_MOST_EXPERTS_NAMED]))
    more = ", ..." if len(alert.experts) > _MOST_EXPERTS_NAMED else ""
    return f"{alert.name}, expert{'s' if len(alert.experts) > 1 else ''} {named}{more}"


def _alert_table(data: ReportData) -> TextTable | None:
    """Every alert about routing; None where there was none."""
    shown = list(map(counting, alike(data.arms, lambda arm: arm.alerts)))
    rows = [
        (
            arm.label,
            one.alert.kind,
            _alert_place(one.alert),
            f"{one.alert.value:.3g}",
            f"{one.alert.limit:.3g}",
            exact(one.alert.step),
            "still up" if one.alert.cleared is None else exact(one.alert.cleared),
            str(one.seed),
        )
        for arm in shown
        for one in arm.alerts
    ]
    if not rows:
        return None
    header = ("arm", "alert", "where", "value", "limit", "raised at step", "cleared", "seed")
    note = "What each kind means, its limit and what to do: docs/guide/routing_monitor.md."
    note = _counted(rows, data) + note
    return TextTable(header, tuple(rows), title="Alerts about routing", note=note)


def _drops_table(data: ReportData) -> TextTable | None:
    """What found no expert, layer by layer; None where everything did."""
    shown = list(map(counting, alike(data.arms, lambda arm: arm.expert_load)))
    rows = [
        (arm.label, name, percent(dropped), percent(unserved))
        for arm in shown
        if (load := arm.expert_load) is not None
        for name, dropped, unserved in zip(
            load.names, load.dropped_share, load.unserved_share, strict=False
        )
        if dropped or unserved
    ]
    if not rows:
        return None
    return TextTable(
        ("arm", "layer", "choices that did not fit", "tokens without an expert"),
        tuple(rows),
        title="Drops while tuning",
        note=f"{_counted(rows, data)}Layers that are not listed dropped nothing. Where experts choose, nobody "
        "asks, so nothing can fail to fit; a token that none of them chose goes on as it was.",
    )


def pretraining(data: ReportData) -> Section:
    """What the arms were pre-trained on; no table where none was."""
    rows = [
        (
            arm.label,
            one.label,
            exact(one.tokens),
            f"{one.epochs:.2f}",
            f"{one.loss:.4f}",
            "none held out" if one.held_out_loss is None else f"{one.held_out_loss:.4f}",
        )
        for arm in data.arms
        for one in arm.pretraining
    ]
    if not rows:
        return Section("Pre-training", ())
    header = ("arm", "stage", "tokens", "epochs", "loss, last step", "loss, held-out texts")
    note = "Losses: nats per target token of the denoising task. A stage that arms share ran once."
    return Section("Pre-training", (TextTable(header, tuple(rows), note=note),))


_MOST_CURVE_ROWS = 20


def curves(data: ReportData) -> Section:
    """Training losses, at most so many points an arm; of many arms a row each seed."""
    if len(data.arms) > MOST_ARM_COLUMNS:
        return Section("Training loss", (_many_curves(data),))
    has_flops = any(
        point.flops is not None
        for arm in data.arms
        for curve in arm.curves
        for point in curve.points
    )
    tables: list[TextTable] = []
    for arm in data.arms:
        for curve in arm.curves:
            kept = _spread(len(curve.points))
            points = [curve.points[index] for index in kept]
            whole = len(kept) == len(curve.points)
            tables.append(
                TextTable(
                    ("real tokens", *(["FLOPs"] if has_flops else []), "loss (nats per token)"),
                    tuple(_point_cells(point, has_flops=has_flops) for point in points),
                    title=f"{arm.label}, seed {curve.seed}",
                    note=""
                    if whole
                    else f"{len(kept)} of {len(curve.points)} steps; report.json has all.",
                )
            )
    return Section("Training loss", tuple(tables))


def _point_cells(point: CurvePoint, *, has_flops: bool) -> tuple[str, ...]:
    flops = "" if point.flops is None else short(point.flops)
    return (exact(point.tokens), *([flops] if has_flops else []), _finite_loss(point.loss))


def _many_curves(data: ReportData) -> TextTable:
    rows = [
        (
            arm.label,
            str(curve.seed),
            exact(last.tokens),
            "" if last.flops is None else short(last.flops),
            *(
                _finite_loss(curve.points[round(share * (len(curve.points) - 1))].loss)
                for share in (0, 0.25, 0.5, 0.75, 1)
            ),
        )
        for arm in data.arms
        for curve in arm.curves
        if curve.points
        for last in curve.points[-1:]
    ]
    header = ("arm", "seed", "real tokens", "FLOPs", "first loss", "at 25 %", "at 50 %", "at 75 %")
    note = "Losses of single steps, nats per token; report.json has all."
    return TextTable((*header, "last loss"), tuple(rows), note=note)


def _spread(num_points: int) -> list[int]:
    """Indices of at most `_MOST_CURVE_ROWS` points, evenly spread, first and last among them."""
    if num_points <= _MOST_CURVE_ROWS:
        return list(range(num_points))
    last = _MOST_CURVE_ROWS - 1
    return [round(row * (num_points - 1) / last) for row in range(_MOST_CURVE_ROWS)]


def _finite_loss(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def versions(data: ReportData) -> Section:
    """Versions and the machine."""
    machine = data.hardware
    rows = [(name, version) for name, version in data.versions.items()]
    if machine.cpu:
        rows.append(("processor", machine.cpu))
    if machine.num_cores:
        rows.append(("cores", exact(machine.num_cores)))
    if machine.memory_bytes:
        rows.append(("memory of the machine", size(machine.memory_bytes)))
    if machine.accelerator:
        rows.append(("accelerator", machine.accelerator))
    return Section("Versions and hardware", (TextTable(("what", "value"), tuple(rows)),))
