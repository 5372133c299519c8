"""What is known of the routing of an evaluation: `routing.json`."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from flanmoe.core.config import Config
from flanmoe.evaluation.routing.counts import RoutingCounts
from flanmoe.evaluation.routing.distances import distances, noise
from flanmoe.evaluation.routing.specialisation import (
    domain_specialisation,
    entropy,
    load,
    relative_load,
)

# More rows than this are hard to read in a picture, and their distances in every layer fill megabytes.
MOST_ROWS = 24
_DIGITS = 5

Matrix = tuple[tuple[float, ...], ...]

DEFINITIONS = {
    "tokens": "Tokens that the model read, prompts and what it wrote, padding left out. Every token is "
    "counted once: one that texts of several tasks begin with belongs to the first of them.",
    "counts": "Assignments of tokens to experts.",
    "load": "counts over their sum",
    "specialisation": "counts over tokens: the share of tokens that the expert computes, top-k / experts where "
    "all are used evenly (OLMoE, arXiv 2409.02060, section 5)",
    "relative_load": "load over the mean load of the expert, every row counting the same",
    "entropy": "of the load, bits",
    "mean": "Jensen-Shannon distance between loads, mean over layers: the root of the divergence in bits, 0 "
    "for equal and 1 for disjoint experts",
    "noise": "The distance to be expected between rows that use experts alike, from how far two random halves "
    "of a row's requests are apart; null where a half is empty. Only larger distances say something. On the "
    "diagonal: between two samples of the row itself.",
    "layer_means": "mean of the distances between different rows, layer by layer",
    "layer_noise": "mean of `noise` between different rows, layer by layer; null where it is not known",
    "per_layer": f"the distances in each layer; empty for more than {MOST_ROWS} rows",
}


class LayerRouting(Config):
    """One task in one sparse layer, expert by expert; see `DEFINITIONS`."""

    counts: tuple[int, ...]
    load: tuple[float, ...]
    specialisation: tuple[float, ...]
    relative_load: tuple[float, ...]
    entropy: float


class RowRouting(Config):
    """One task, or the tasks of one cluster together.

    Attributes:
        name: of the task or cluster.
        tasks: the tasks; one for a task.
        tokens: tokens that the model read for them.
        layers: one entry for each sparse layer.
    """

    name: str
    tasks: tuple[str, ...]
    tokens: int
    layers: tuple[LayerRouting, ...]


class Distances(Config):
    """How far rows are apart by their loads, in the order of the rows; see `DEFINITIONS`.

    Attributes:
        mean: mean over the sparse layers.
        noise: what to expect of rows that use experts alike, mean over the layers.
        layer_means: mean over pairs of rows for each sparse layer; empty for one row.
        layer_noise: what to expect of them, likewise.
        per_layer: for each sparse layer; empty where there are more than `MOST_ROWS` rows.
    """

    mean: Matrix
    noise: tuple[tuple[float | None, ...], ...]
    layer_means: tuple[float, ...]
    layer_noise: tuple[float | None, ...]
    per_layer: tuple[Matrix, ...]


class Grouping(Config):
    """Rows and their distances."""

    rows: tuple[RowRouting, ...]
    distances: Distances


class RoutingReport(Config):
    """Expert load of an evaluation by task.

    Attributes:
        definitions: what the numbers mean.
        layers: number of the transformer layer of each sparse layer.
        num_experts, top_k: of each sparse layer.
        tasks: a row for each task.
        clusters: a row for each cluster of tasks; None where there is one cluster, or one task in each.
        not_recorded: tasks of the evaluation of which nothing went through a recorded pass.
    """

    definitions: dict[str, str]
    layers: tuple[int, ...]
    num_experts: tuple[int, ...]
    top_k: tuple[int, ...]
    tasks: Grouping
    clusters: Grouping | None
    not_recorded: tuple[str, ...]

    @property
    def shown(self) -> Grouping:
        """Rows that fit into a picture: the tasks, or clusters where there are too many of them."""
        crowded = len(self.tasks.rows) > MOST_ROWS
        return self.clusters if crowded and self.clusters is not None else self.tasks


def routing_report(counts: RoutingCounts, clusters: Mapping[str, str]) -> RoutingReport:
    """Return what counts say.

    Args:
        counts: by task.
        clusters: for each task of the evaluation the cluster that it belongs to, in the order of the report.
            Counted tasks that it lacks come last, each a cluster of its own.
    """
    clusters = {**clusters, **{name: name for name in counts.names if name not in clusters}}
    tokens = dict(zip(counts.names, counts.tokens.sum(axis=1), strict=True))
    counted = [name for name in clusters if tokens.get(name)]
    members: dict[str, list[str]] = {}
    for name in counted:
        members.setdefault(clusters[name], []).append(name)
    grouped = 1 < len(members) < len(counted)
    return RoutingReport(
        definitions=DEFINITIONS,
        layers=counts.layers,
        num_experts=counts.num_experts,
        top_k=counts.top_k,
        tasks=_grouping(counts, {name: [name] for name in counted}),
        clusters=_grouping(counts, members) if grouped else None,
        not_recorded=tuple(name for name in clusters if not tokens.get(name)),
    )


def _grouping(counts: RoutingCounts, members: Mapping[str, list[str]]) -> Grouping:
    pooled = counts.pooled(members)
    tokens = pooled.tokens.sum(axis=1)
    layers = [_layer(one.sum(axis=1), tokens) for one in pooled.assignments]
    rows = [
        RowRouting(
            name=name,
            tasks=tuple(members[name]),
            tokens=int(tokens[place]),
            layers=tuple(layer[place] for layer in layers),
        )
        for place, name in enumerate(pooled.names)
    ]
    return Grouping(rows=tuple(rows), distances=_distances(pooled))


def _layer(assignments: np.ndarray, tokens: np.ndarray) -> list[LayerRouting]:
    loads = load(assignments)
    columns = zip(
        assignments.tolist(),
        _rounded(loads),
        _rounded(domain_specialisation(assignments, tokens)),
        _rounded(relative_load(loads)),
        entropy(loads).round(_DIGITS).tolist(),
        strict=True,
    )
    return [
        LayerRouting(
            counts=counts,
            load=own,
            specialisation=specialisation,
            relative_load=relative,
            entropy=bits,
        )
        for counts, own, specialisation, relative, bits in columns
    ]


def _distances(counts: RoutingCounts) -> Distances:
    layers = np.stack([distances(load(one.sum(axis=1))) for one in counts.assignments])
    expected = np.stack([noise(one, counts.tokens) for one in counts.assignments])
    num_rows = len(counts.names)
    return Distances(
        mean=_rounded(layers.mean(axis=0)),
        noise=tuple(map(_known, expected.mean(axis=0))),
        layer_means=tuple(_between(layers).round(_DIGITS).tolist()),
        layer_noise=_known(_between(expected)),
        per_layer=tuple(map(_rounded, layers)) if num_rows <= MOST_ROWS else (),
    )


def _between(layers: Float[np.ndarray, "K G G"]) -> Float[np.ndarray, " _"]:
    """Return the mean over pairs of different rows, layer by layer; nothing for one row."""
    pairs = np.triu_indices(layers.shape[1], k=1)
    return layers[:, *pairs].mean(axis=1) if len(pairs[0]) else np.zeros(0)


def _known(values: Float[np.ndarray, " _"]) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(one) else one for one in values.round(_DIGITS).tolist())


def _rounded(values: Float[np.ndarray, "G _"]) -> Matrix:
    return tuple(map(tuple, values.round(_DIGITS).tolist()))
