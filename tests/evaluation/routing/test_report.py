"""A report against its counts: rows, order, clusters, distances."""

from collections.abc import Callable

import numpy as np
import pytest

from flanmoe.evaluation.routing.counts import RoutingCounts
from flanmoe.evaluation.routing.distances import distances, noise
from flanmoe.evaluation.routing.report import MOST_ROWS, routing_report
from flanmoe.evaluation.routing.specialisation import load


def test_numbers_by_hand() -> None:
    counts = RoutingCounts(
        names=("a", "b"),
        layers=(3,),
        top_k=(1,),
        tokens=np.array([[4, 4], [1, 1]]),
        assignments=(np.array([[[3, 1], [3, 1]], [[1, 0], [0, 1]]]),),
    )
    report = routing_report(counts, {"a": "a", "b": "b"})
    first, second = report.tasks.rows
    assert (first.name, first.tokens, second.tokens) == ("a", 8, 2)
    assert first.layers[0].counts == (6, 2)
    assert first.layers[0].load == first.layers[0].specialisation == (0.75, 0.25)
    assert first.layers[0].relative_load == pytest.approx((0.75 / 0.625, 0.25 / 0.375), abs=1e-5)
    assert second.layers[0].entropy == 1
    assert (report.layers, report.num_experts, report.top_k) == ((3,), (2,), (1,))
    # Middle of (3/4, 1/4) and (1/2, 1/2): (5/8, 3/8).
    bits = (
        0.75 * np.log2(6 / 5) + 0.25 * np.log2(2 / 3) + 0.5 * np.log2(4 / 5) + 0.5 * np.log2(4 / 3)
    )
    distance = pytest.approx(np.sqrt(bits / 2), abs=1e-5)
    assert report.tasks.distances.mean == ((0, distance), (distance, 0))
    assert report.tasks.distances.layer_means == (distance,)
    # The halves of the first task are equal; those of the second are 1 apart, with c / n = 1 * 1 / 2^2.
    assert report.tasks.distances.noise == ((0, 0.5), (0.5, pytest.approx(np.sqrt(0.5), abs=1e-5)))


def test_distances_are_averaged_over_layers(counts: Callable[..., RoutingCounts]) -> None:
    found = counts(["a", "b", "c"], num_layers=3)
    report = routing_report(found, {name: name for name in found.names}).tasks.distances
    layers = [distances(load(layer.sum(axis=1))) for layer in found.assignments]
    expected = [noise(layer, found.tokens) for layer in found.assignments]
    assert np.array(report.per_layer) == pytest.approx(np.stack(layers), abs=1e-5)
    assert np.array(report.mean) == pytest.approx(np.mean(layers, axis=0), abs=1e-5)
    assert np.array(report.noise) == pytest.approx(np.mean(expected, axis=0), abs=1e-5)
    assert report.layer_means == pytest.approx(
        [(one[0, 1] + one[0, 2] + one[1, 2]) / 3 for one in layers], abs=1e-5
    )
    assert report.layer_noise == pytest.approx(
        [(one[0, 1] + one[0, 2] + one[1, 2]) / 3 for one in expected], abs=1e-5
    )


def test_rows_come_in_the_order_of_the_evaluation(counts: Callable[..., RoutingCounts]) -> None:
    found = counts(["met first", "met second", "not listed"])
    clusters = {"met second": "x", "not met": "x", "met first": "y"}
    report = routing_report(found, clusters)
    assert [row.name for row in report.tasks.rows] == ["met second", "met first", "not listed"]
    assert report.tasks.rows[0].tokens == found.tokens[1].sum()
    assert report.not_recorded == ("not met",)


def test_a_task_whose_texts_are_all_those_of_another_has_no_row(
    counts: Callable[..., RoutingCounts],
) -> None:
    found = counts(["a", "same as a"])
    for layer in (found.tokens, *found.assignments):
        layer[1] = 0
    report = routing_report(found, {"a": "x", "same as a": "x"})
    assert [row.name for row in report.tasks.rows] == ["a"]
    assert report.not_recorded == ("same as a",)


def test_clusters_pool_the_tokens_of_their_tasks(counts: Callable[..., RoutingCounts]) -> None:
    found = counts(["a", "b", "c"])
    report = routing_report(found, {"a": "x", "b": "y", "c": "x"})
    assert report.clusters is not None
    assert [(row.name, row.tasks) for row in report.clusters.rows] == [
        ("x", ("a", "c")),
        ("y", ("b",)),
    ]
    both = found.assignments[1][[0, 2]].sum(axis=(0, 1))
    assert report.clusters.rows[0].layers[1].counts == tuple(both.tolist())
    assert report.clusters.rows[1].layers[1].counts == report.tasks.rows[1].layers[1].counts


@pytest.mark.parametrize("clusters", ["xxx", "abc"])
def test_clusters_that_say_nothing_new_are_left_out(
    clusters: str, counts: Callable[..., RoutingCounts]
) -> None:
    report = routing_report(counts(["a", "b", "c"]), dict(zip("abc", clusters, strict=True)))
    assert report.clusters is None


def test_many_tasks_are_shown_as_clusters(counts: Callable[..., RoutingCounts]) -> None:
    names = [f"task {number}" for number in range(MOST_ROWS + 1)]
    clusters = {name: str(number % 3) for number, name in enumerate(names)}
    report = routing_report(counts(names), clusters)
    assert report.shown is report.clusters
    assert report.tasks.distances.per_layer == ()
    assert len(report.tasks.distances.mean) == MOST_ROWS + 1
    few = routing_report(counts(names[:-1]), clusters)
    assert few.shown is few.tasks
    # All in one cluster: there is nothing else to show.
    alike = routing_report(counts(names), dict.fromkeys(names, "one"))
    assert alike.shown is alike.tasks


def test_one_task_has_no_distance(counts: Callable[..., RoutingCounts]) -> None:
    found = routing_report(counts(["a"]), {"a": "a"}).tasks.distances
    assert (found.mean, found.layer_means, found.layer_noise) == (((0.0,),), (), ())


def test_noise_that_is_not_known_in_a_layer_is_said(counts: Callable[..., RoutingCounts]) -> None:
    found = counts(["a", "b"])
    found.tokens[1, 1] = 0
    assert routing_report(found, {}).tasks.distances.layer_noise == (None, None)
