"""The picture holds every name and every distance, and is the same each time."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import pytest

from flanmoe.evaluation.routing.counts import RoutingCounts
from flanmoe.evaluation.routing.figure import routing_svg
from flanmoe.evaluation.routing.report import routing_report

NAMES = [
    "mmlu-direct/high_school_government_and_politics",
    "bbh-chain-of-thought/logical_deduction_seven_objects",
    "a < b & $x_1$ and $y$",
    "gsm8k",
]


def texts(svg: str) -> list[str]:
    """All texts of a picture."""
    root = ElementTree.fromstring(svg)
    return ["".join(one.itertext()) for one in root.iter("{http://www.w3.org/2000/svg}text")]


def test_every_task_and_distance_is_there(counts: Callable[..., RoutingCounts]) -> None:
    report = routing_report(counts(NAMES, num_layers=9, num_experts=8), {})
    found = texts(routing_svg(report))
    for number, name in enumerate(NAMES, start=1):
        # Beside the layers, and beside the distances.
        assert found.count(f"{name}  {number}") == 2
    values = [one for row in report.tasks.distances.mean for one in row if one]
    assert sum(one.strip("()").startswith(".") for one in found) == len(values) == 12
    for value in values:
        assert any(one.strip("()") == f"{value:.2f}".removeprefix("0") for one in found)


def test_first_middle_last_and_most_telling_layer(counts: Callable[..., RoutingCounts]) -> None:
    report = routing_report(counts(NAMES, num_layers=9), {})
    means = report.tasks.distances.layer_means
    most = means.index(max(means))
    assert most not in (0, 4, 8)
    titles = [one for one in texts(routing_svg(report)) if one.startswith("layer")]
    assert titles == [
        f"layer {2 * place + 1}" + (" (tells rows apart most)" if place == most else "")
        for place in sorted((0, 4, 8, most))
    ]


def test_distances_within_the_noise_are_in_brackets(counts: Callable[..., RoutingCounts]) -> None:
    report = routing_report(counts(["a", "b", "c"]), {})
    assert not any(one.startswith("(.") for one in texts(routing_svg(report)))
    noise = ((1.0, 1.0, None), (1.0, 1.0, 0.0), (None, 0.0, 1.0))
    distances = report.tasks.distances.model_copy(update={"noise": noise})
    tasks = report.tasks.model_copy(update={"distances": distances})
    found = texts(routing_svg(report.model_copy(update={"tasks": tasks})))
    assert sum(one.startswith("(.") for one in found) == 4


def test_clusters_say_how_many_tasks_they_hold(counts: Callable[..., RoutingCounts]) -> None:
    names = [f"task {number}" for number in range(30)]
    report = routing_report(
        counts(names), {name: "alone" if name == "task 3" else "many" for name in names}
    )
    found = texts(routing_svg(report))
    assert found.count("many (29 tasks)  1") == found.count("alone  2") == 2
    assert not any(one.startswith("task") for one in found)


@pytest.mark.parametrize("num_experts", [2, 16, 64])
@pytest.mark.parametrize("names", [NAMES[:1], [f"task {number}" for number in range(40)]])
def test_any_size_can_be_drawn(
    names: list[str], num_experts: int, counts: Callable[..., RoutingCounts]
) -> None:
    report = routing_report(counts(names, num_experts=num_experts), {})
    found = texts(routing_svg(report))
    for number, name in enumerate(names, start=1):
        assert f"{name}  {number}" in found


def test_the_same_report_gives_the_same_picture(counts: Callable[..., RoutingCounts]) -> None:
    report = routing_report(counts(NAMES), {})
    assert routing_svg(report) == routing_svg(report)
