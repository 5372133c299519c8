"""Counts of groups of tasks."""

from collections.abc import Callable

from flanmoe.evaluation.routing.counts import RoutingCounts


def test_a_group_has_the_sum_of_its_tasks(counts: Callable[..., RoutingCounts]) -> None:
    found = counts(["a", "b", "c"])
    pooled = found.pooled({"last": ["c"], "first": ["b", "a"]})
    assert pooled.names == ("last", "first")
    assert pooled.tokens.tolist() == [
        found.tokens[2].tolist(),
        (found.tokens[0] + found.tokens[1]).tolist(),
    ]
    for layer, before in zip(pooled.assignments, found.assignments, strict=True):
        assert layer[0].tolist() == before[2].tolist()
        assert layer[1].tolist() == (before[0] + before[1]).tolist()
    assert pooled.num_experts == found.num_experts == (4, 4)


def test_no_group_has_no_rows(counts: Callable[..., RoutingCounts]) -> None:
    pooled = counts(["a"]).pooled({})
    assert pooled.tokens.shape == (0, 2)
    assert [layer.shape for layer in pooled.assignments] == [(0, 2, 4), (0, 2, 4)]
