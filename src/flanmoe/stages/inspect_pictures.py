"""The pictures of `flanmoe inspect`."""

from pathlib import Path

from flanmoe.core import files
from flanmoe.evaluation.routing.coactivation_figure import coactivation_svg
from flanmoe.evaluation.routing.figure import routing_svg
from flanmoe.evaluation.routing.layers_figure import layers_svg
from flanmoe.evaluation.routing.needs_figure import needs_svg
from flanmoe.stages.inspect_report import InspectReport, SideReport, coactivation_tables
from flanmoe.statistics import ExpertStatistics


def write_pictures(
    report: InspectReport, statistics: ExpertStatistics, folder: Path
) -> tuple[str, ...]:
    """Draw a report and return the names of the files; of an encoder-decoder one set for each side.

    Raises:
        DiskError: if the disk is full or the folder cannot be written.
    """
    written: list[str] = []
    for side in report.sides:
        suffix = f"-{side.side}" if len(report.sides) > 1 else ""
        for name, svg in _pictures(side, statistics).items():
            files.write_text(folder / f"{name}{suffix}.svg", svg)
            written.append(f"{name}{suffix}.svg")
    return tuple(written)


def _pictures(side: SideReport, statistics: ExpertStatistics) -> dict[str, str]:
    routing = side.routing
    drawn = {
        "routing": routing_svg(routing),
        "layers": layers_svg(routing),
        "needs": needs_svg(side.needs, layers=routing.layers, num_experts=routing.num_experts),
    }
    layers = [layer for layer in statistics.layers if layer.side == side.side]
    if tables := coactivation_tables(layers):
        drawn["coactivation"] = coactivation_svg(list(tables.values()), list(tables))
    return drawn
