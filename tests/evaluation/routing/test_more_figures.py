"""The pictures of layers, needs and co-activation hold what they are to show, and are the same each time."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import numpy as np
import pytest

from flanmoe.evaluation.routing.coactivation_figure import coactivation_figure, coactivation_svg
from flanmoe.evaluation.routing.counts import RoutingCounts
from flanmoe.evaluation.routing.layers_figure import layers_figure, layers_svg
from flanmoe.evaluation.routing.needs import Needs, needs
from flanmoe.evaluation.routing.needs_figure import needs_figure, needs_svg
from flanmoe.evaluation.routing.report import routing_report
from flanmoe.evaluation.routing.style import limit_of

NAMES = ["gsm8k", "a < b & $x_1$", "banking77"]


def texts(svg: str) -> list[str]:
    """All texts of a picture."""
    root = ElementTree.fromstring(svg)
    return ["".join(one.itertext()) for one in root.iter("{http://www.w3.org/2000/svg}text")]


def needs_of(counts: RoutingCounts) -> Needs:
    """What tasks need if every gate is 1."""
    return needs(counts.names, [one.astype(float) for one in counts.assignments], share=0.8)


def drawn(figure: object) -> list[np.ndarray]:
    """The values of every heat map of a figure, in the order in which they were drawn."""
    found = [
        mesh.get_array()
        for axes in figure.axes  # pyright: ignore[reportAttributeAccessIssue]
        for mesh in axes.collections
        if axes.get_label() != "<colorbar>" and mesh.get_array() is not None
    ]
    return [np.asarray(one) for one in found]


def test_every_task_has_its_layers_and_experts(counts: Callable[..., RoutingCounts]) -> None:
    report = routing_report(counts(NAMES, num_layers=5, num_experts=8), {})
    found = texts(layers_svg(report))
    for number, name in enumerate(NAMES, start=1):
        assert f"{name}  {number}" in found
    maps = drawn(layers_figure(report))
    for row, values in zip(report.tasks.rows, maps, strict=True):
        expected = np.log2([layer.relative_load for layer in row.layers])
        assert values.reshape(5, 8) == pytest.approx(expected, abs=1e-4)


def test_layers_of_different_widths_are_drawn(counts: Callable[..., RoutingCounts]) -> None:
    wide, narrow = counts(NAMES, num_layers=1), counts(NAMES, num_layers=1, num_experts=2)
    mixed = RoutingCounts(
        names=wide.names,
        layers=(0, 1),
        top_k=(2, 2),
        tokens=wide.tokens,
        assignments=(*wide.assignments, *narrow.assignments),
    )
    values = drawn(layers_figure(routing_report(mixed, {})))[0].reshape(2, 4)
    assert np.isnan(values).tolist() == [[False] * 4, [False, False, True, True]]
    svg = needs_svg(needs_of(mixed), layers=(0, 1), num_experts=(4, 2))
    assert "expert" in texts(svg)


def test_needs_are_drawn_as_they_are(counts: Callable[..., RoutingCounts]) -> None:
    found = needs_of(counts(NAMES, num_layers=3, num_experts=6))
    figure = needs_figure(found, layers=(1, 3, 5), num_experts=(6, 6, 6))
    experts, numbers, overlap = drawn(figure)
    assert experts.reshape(3, 6).tolist() == [found.times_needed(layer, 6) for layer in range(3)]
    assert numbers.reshape(3, 3).T.tolist() == [list(layer) for layer in found.numbers]
    assert overlap.reshape(3, 3) == pytest.approx(100 * np.array(found.overlap, dtype=float))
    words = texts(needs_svg(found, layers=(1, 3, 5), num_experts=(6, 6, 6)))
    for number, name in enumerate(NAMES, start=1):
        assert name in words
        assert f"{name}  {number}" in words
    for row in range(3):
        assert f"({100 * (found.overlap[row][row] or 0):.0f})" in words


def test_a_single_task_has_no_overlap(counts: Callable[..., RoutingCounts]) -> None:
    found = needs_of(counts(NAMES[:1]))
    assert len(drawn(needs_figure(found, layers=(1, 3), num_experts=(4, 4)))) == 2
    assert len(drawn(layers_figure(routing_report(counts(NAMES[:1]), {})))) == 1


def test_co_activation_shows_the_layers_that_stand_out() -> None:
    generator = np.random.default_rng(0)
    tables = []
    for size in (20, 20, 500, 20, 400, 20, 300):
        table = generator.integers(90, 110, (4, 4))
        table = np.triu(table, k=1) + np.triu(table, k=1).T
        table[0, 1] = table[1, 0] = 100 + size
        tables.append(table)
    svg = coactivation_svg(tables, [3, 5, 7, 9, 11, 13, 15])
    titles = [one for one in texts(svg) if one.startswith("layer")]
    assert titles[1:] == ["layer 7", "layer 11", "layer 15"]
    assert any("4 of 7 layers" in one for one in texts(svg))
    first = np.ma.masked_invalid(drawn(coactivation_figure(tables, range(7)))[1]).reshape(4, 4)
    assert first.mask.tolist() == np.eye(4, dtype=bool).tolist()


def test_the_same_numbers_give_the_same_pictures(counts: Callable[..., RoutingCounts]) -> None:
    report = routing_report(counts(NAMES), {})
    assert layers_svg(report) == layers_svg(report)
    found = needs_of(counts(NAMES))
    options = {"layers": (1, 3), "num_experts": (4, 4)}
    assert needs_svg(found, **options) == needs_svg(found, **options)


def test_a_scale_leaves_extreme_values_out() -> None:
    values = np.concatenate([np.full(99, 0.4), [2.9], [np.nan], [-30.0]]).reshape(1, -1)
    assert limit_of([values]) == 3.0
    assert limit_of([values], share=0.98) == 0.5
    assert limit_of([np.full((1, 2), np.nan)]) == 0.5
