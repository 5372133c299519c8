"""Tables of how training went: routing, losses, versions."""

from flanmoe.study.report_data import (
    ArmReport,
    ReportData,
)
from flanmoe.study.report_text import (
    exact,
    percent,
    size,
)
from flanmoe.study.tables.base import Section, TextTable


def routing(data: ReportData) -> Section:
    """Router losses and the load of every expert."""
    tables: list[TextTable] = []
    for arm in data.arms:
        if arm.router_losses is not None:
            settings = [(name, str(value)) for name, value in arm.router_losses.settings.items()]
            last = [
                (f"{name}, last step", _finite(value))
                for name, value in arm.router_losses.last.items()
            ]
            tables.append(
                TextTable(
                    ("router losses", arm.label),
                    (*settings, *last),
                    title=f"Router losses: {arm.label}",
                )
            )
        if arm.expert_load is not None:
            tables.append(_load_table(arm))
    return Section("Routing", tuple(tables))


def _finite(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _load_table(arm: ArmReport) -> TextTable:
    load = arm.expert_load
    assert load is not None
    entropies = [f"{value:.3f}" for value in load.entropy_nats] or [""] * len(load.layers)
    return TextTable(
        ("layer", "entropy (nats)", *(f"expert {expert}" for expert in range(load.num_experts))),
        tuple(
            (str(layer), entropy, *(percent(share) for share in row))
            for layer, entropy, row in zip(load.layers, entropies, load.shares, strict=True)
        ),
        title=f"Share of assignments: {arm.label}",
        note=f"The even share is {percent(1 / load.num_experts)}.",
    )


_MOST_CURVE_ROWS = 20


def curves(data: ReportData) -> Section:
    """Training losses, at most so many points an arm."""
    tables: list[TextTable] = []
    for arm in data.arms:
        for curve in arm.curves:
            kept = _spread(len(curve.points))
            points = [curve.points[index] for index in kept]
            whole = len(kept) == len(curve.points)
            tables.append(
                TextTable(
                    ("real tokens", "loss (nats per token)"),
                    tuple((exact(point.tokens), _finite_loss(point.loss)) for point in points),
                    title=f"{arm.label}, seed {curve.seed}",
                    note=""
                    if whole
                    else f"{len(kept)} of {len(curve.points)} steps; report.json has all.",
                )
            )
    return Section("Training loss", tuple(tables))


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
