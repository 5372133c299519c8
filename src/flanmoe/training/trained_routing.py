"""What the routers did in a whole run, as its result keeps it: load, drops, and both for each task."""

from collections.abc import Sequence

from flanmoe.core.config import Config
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.routing_measures import RoutingMeasures, measures_of_layers
from flanmoe.moe.routing_sums import RoutingSums


class TrainedLoad(Config):
    """How often each expert was chosen over the whole run.

    Attributes:
        layers: number of each sparse layer in its model, or on its side of an encoder-decoder.
        counts: for each of them the assignments of each expert.
        shares: the same as shares, which sum to 1.
        entropy_nats: for each of them the entropy of the shares; ln(experts) means even use.
        unused_share: for each of them the share of experts that no token was sent to.
        max_over_mean: for each of them the busiest expert as a multiple of the even share.
        names: for each of them the path of the block in the model.
        router_entropy_share, confidence, mean_gate, logit_rms: for each of them the measures of these
            names (`flanmoe.moe.routing_measures`); empty in results from before they were recorded.
        coactivation: for each of them, row e and column f: of the tokens that had e the share that had f
            too; empty where it was not asked for.
    """

    layers: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    shares: tuple[tuple[float, ...], ...]
    entropy_nats: tuple[float, ...]
    unused_share: tuple[float, ...]
    max_over_mean: tuple[float, ...]
    names: tuple[str, ...] = ()
    router_entropy_share: tuple[float, ...] = ()
    confidence: tuple[float, ...] = ()
    mean_gate: tuple[float, ...] = ()
    logit_rms: tuple[float, ...] = ()
    coactivation: tuple[tuple[tuple[float, ...], ...], ...] = ()


class TrainedDrops(Config):
    """What found no expert over the whole run, for each sparse layer in the order of `TrainedLoad`.

    Attributes:
        dropped_share: choices that were asked for and did not fit, over all that were asked for; 0 where
            experts choose.
        unserved_share: tokens that no expert took, over all real tokens.
    """

    dropped_share: tuple[float, ...]
    unserved_share: tuple[float, ...]


class TrainedTask(Config):
    """Where the tokens of one task went over the whole run, layer by layer in the order of `TrainedLoad`.

    Attributes:
        tokens: its real tokens that each layer saw.
        counts: assignments of each expert.
        entropy_share, router_entropy_share, confidence, dropped_share, unserved_share: the measures of
            these names (`flanmoe.moe.routing_measures`).
        coactivation: as in `TrainedLoad`.
    """

    tokens: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    entropy_share: tuple[float, ...]
    router_entropy_share: tuple[float, ...]
    confidence: tuple[float, ...]
    dropped_share: tuple[float, ...]
    unserved_share: tuple[float, ...]
    coactivation: tuple[tuple[tuple[float, ...], ...], ...] = ()


def trained_load(blocks: Sequence[MoEBlock], layers: Sequence[RoutingMeasures]) -> TrainedLoad:
    """Return the load of a run, of all tasks together."""
    return TrainedLoad(
        layers=tuple(block.layer for block in blocks),
        counts=tuple(layer.counts for layer in layers),
        shares=tuple(layer.load for layer in layers),
        entropy_nats=tuple(layer.entropy_nats for layer in layers),
        unused_share=tuple(layer.unused_share for layer in layers),
        max_over_mean=tuple(layer.max_over_mean for layer in layers),
        names=tuple(block.name for block in blocks),
        router_entropy_share=tuple(layer.router_entropy_share for layer in layers),
        confidence=tuple(layer.confidence for layer in layers),
        mean_gate=tuple(layer.mean_gate for layer in layers),
        logit_rms=tuple(layer.logit_rms for layer in layers),
        coactivation=_coactivation(layers),
    )


def trained_drops(layers: Sequence[RoutingMeasures]) -> TrainedDrops:
    """Return what found no expert, of all tasks together."""
    return TrainedDrops(
        dropped_share=tuple(layer.dropped_share for layer in layers),
        unserved_share=tuple(layer.unserved_share for layer in layers),
    )


def trained_tasks(
    task_names: Sequence[str], layers: Sequence[RoutingSums]
) -> dict[str, TrainedTask]:
    """Return where the tokens of each task went; tasks that had none are left out."""
    measured = measures_of_layers(layers)
    found = {name: [layer[number] for layer in measured] for number, name in enumerate(task_names)}
    return {
        name: _trained_task(own)
        for name, own in found.items()
        if any(layer.tokens for layer in own)
    }


def _trained_task(layers: Sequence[RoutingMeasures]) -> TrainedTask:
    return TrainedTask(
        tokens=tuple(layer.tokens for layer in layers),
        counts=tuple(layer.counts for layer in layers),
        entropy_share=tuple(layer.entropy_share for layer in layers),
        router_entropy_share=tuple(layer.router_entropy_share for layer in layers),
        confidence=tuple(layer.confidence for layer in layers),
        dropped_share=tuple(layer.dropped_share for layer in layers),
        unserved_share=tuple(layer.unserved_share for layer in layers),
        coactivation=_coactivation(layers),
    )


def _coactivation(
    layers: Sequence[RoutingMeasures],
) -> tuple[tuple[tuple[float, ...], ...], ...]:
    return tuple(layer.coactivation for layer in layers if layer.coactivation is not None)
