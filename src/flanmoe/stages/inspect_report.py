"""`InspectReport`: what one pass over tasks says of a model's experts, layer by layer and task by task.

Everything is computed from `ExpertStatistics` whose groups are the halves of each task, so a saved file gives
the same report without the model.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from flanmoe.core.config import Config
from flanmoe.evaluation.routing.coactivation import (
    DEFINITIONS as COACTIVATION_DEFINITIONS,
)
from flanmoe.evaluation.routing.coactivation import (
    LayerCoactivation,
    layer_coactivation,
)
from flanmoe.evaluation.routing.counts import HALVES, RoutingCounts
from flanmoe.evaluation.routing.needs import DEFINITIONS as NEEDS_DEFINITIONS
from flanmoe.evaluation.routing.needs import Needs, needs
from flanmoe.evaluation.routing.report import RoutingReport, routing_report
from flanmoe.models.flan_moe_t5.configuration import Side
from flanmoe.models.plan import ParameterCount
from flanmoe.moe.routing_measures import routing_measures
from flanmoe.moe.routing_sums import RoutingSums
from flanmoe.stages.expert_batches import ReadExamples
from flanmoe.stages.inspect_alerts import InspectAlert
from flanmoe.statistics import ExpertStatistics, LayerStatistics

_DIGITS = 6

DEFINITIONS = {
    "measures": "by task and sparse layer; see docs/guide/inspect.md for each",
    "all": "the same over the tokens of all tasks together",
    "needs": NEEDS_DEFINITIONS,
    "coactivation": COACTIVATION_DEFINITIONS,
}

Measures = dict[str, float]


class SideReport(Config):
    """The sparse layers of one side: of a decoder, or of one side of an encoder-decoder.

    Attributes:
        side: whose tokens these are.
        names: path of each sparse layer in the model.
        routing: load by task and expert, and distances between tasks.
        measures: for each task and sparse layer (`flanmoe.moe.routing_measures.MEASURES`).
        all: the same of all tasks together, layer by layer.
        needs: which experts each task needs.
        coactivation: pairs of experts over all tasks together, layer by layer; None where it was not asked for.
    """

    side: Side
    names: tuple[str, ...]
    routing: RoutingReport
    measures: dict[str, tuple[Measures, ...]]
    all: tuple[Measures, ...]
    needs: Needs
    coactivation: tuple[LayerCoactivation, ...] | None


class InspectReport(Config):
    """What `flanmoe inspect` found.

    Attributes:
        model: its name, folder or id.
        parameters: of the model.
        length: tokens of a row, the most that is read of an example.
        shares_rows: whether rows held several examples.
        examples: what of each task was read.
        model_hash, data_hash: of the weights and of the data.
        alerts: what is wrong, in words.
        judged: whether there were enough tokens to look for that.
        definitions: what the numbers mean.
        sides: the encoder before the decoder.
    """

    model: str
    parameters: ParameterCount
    length: int
    shares_rows: bool
    examples: dict[str, ReadExamples]
    model_hash: str
    data_hash: str
    alerts: tuple[InspectAlert, ...]
    judged: bool
    definitions: dict[str, str | dict[str, str]]
    sides: tuple[SideReport, ...]


def side_reports(
    statistics: ExpertStatistics, tasks: Sequence[str], *, share: float
) -> tuple[SideReport, ...]:
    """Return what statistics say of each side that has sparse layers, the encoder first.

    Args:
        statistics: with the two halves of each task as groups, task after task.
        tasks: names of the tasks.
        share: of a task's gate mass that the experts it needs are to hold.
    """
    return tuple(
        _side_report(side, layers, tasks, share)
        for side in ("encoder", "decoder")
        if (layers := [layer for layer in statistics.layers if layer.side == side])
    )


def coactivation_tables(layers: Sequence[LayerStatistics]) -> dict[int, np.ndarray]:
    """Return for each layer number the tokens that had both experts, over all groups.

    Layers whose tokens have one expert each are left out: they have no pairs.
    """
    tables: dict[int, np.ndarray] = {}
    for layer in layers:
        pairs = layer.sums.coactivation
        if pairs is not None and layer.top_k != 1:
            tables[layer.layer] = pairs.sum(dim=0).numpy()
    return tables


def _side_report(
    side: Side, layers: Sequence[LayerStatistics], tasks: Sequence[str], share: float
) -> SideReport:
    by_task = [[_measures(one) for one in _of_tasks(layer.sums)] for layer in layers]
    mass = [_by_half(layer.sums.gate_mass) for layer in layers]
    return SideReport(
        side=side,
        names=tuple(layer.name for layer in layers),
        routing=routing_report(_counts(layers, tasks), {}),
        measures={
            name: tuple(layer[place] for layer in by_task) for place, name in enumerate(tasks)
        },
        all=tuple(_measures(layer.sums.together()) for layer in layers),
        needs=needs(tasks, mass, share=share),
        coactivation=_coactivation(layers),
    )


def _counts(layers: Sequence[LayerStatistics], tasks: Sequence[str]) -> RoutingCounts:
    return RoutingCounts(
        names=tuple(tasks),
        layers=tuple(layer.layer for layer in layers),
        top_k=tuple(layer.top_k for layer in layers),
        # The layers of a side see the same tokens.
        tokens=_by_half(layers[0].sums.tokens),
        assignments=tuple(_by_half(layer.sums.assignments) for layer in layers),
    )


def _by_half(values: Tensor) -> np.ndarray:
    """Return numbers by group as numbers by task and half."""
    return values.unflatten(0, (-1, HALVES)).numpy()


def _of_tasks(sums: RoutingSums) -> list[RoutingSums]:
    """Return the sums of each task, its halves together."""
    return [
        sums.changed(lambda values, task=task: values[HALVES * task :][:HALVES]).together()
        for task in range(sums.num_groups // HALVES)
    ]


def _measures(sums: RoutingSums) -> Measures:
    (found,) = routing_measures(sums)
    return {name: round(value, _DIGITS) for name, value in found.scalars().items()}


def _coactivation(layers: Sequence[LayerStatistics]) -> tuple[LayerCoactivation, ...] | None:
    if all(layer.sums.coactivation is None for layer in layers):
        return None
    tokens = int(layers[0].sums.tokens.sum())
    return tuple(
        layer_coactivation(table, layer=number, tokens=tokens)
        for number, table in coactivation_tables(layers).items()
    )
