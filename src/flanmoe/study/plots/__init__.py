"""The figures of a report as SVG strings, one file each.

Each is drawn with matplotlib without global state, and is the same for the same data on every run.
"""

from flanmoe.study.plots.claims import claims as claims
from flanmoe.study.plots.differences import paired_differences
from flanmoe.study.plots.effects import effects as effects
from flanmoe.study.plots.expert_load import expert_load as expert_load
from flanmoe.study.plots.expert_load import expert_loads
from flanmoe.study.plots.figure import Drawing as Drawing
from flanmoe.study.plots.loss_curves import loss_curves
from flanmoe.study.plots.memory import memory
from flanmoe.study.plots.routing_curves import routing_curves as routing_curves
from flanmoe.study.plots.scores import scores
from flanmoe.study.plots.task_loads import task_load as task_load
from flanmoe.study.plots.task_loads import task_loads
from flanmoe.study.report_data import ReportData


def drawings(data: ReportData) -> tuple[Drawing, ...]:
    """Draw every figure but that of claims that the data has something for, in the order of the page."""
    drawn = (
        effects(data.effects),
        loss_curves(data),
        scores(data),
        paired_differences(data),
        memory(data),
        *expert_loads(data),
        *task_loads(data),
        routing_curves(data),
    )
    return tuple(drawing for drawing in drawn if drawing is not None)
