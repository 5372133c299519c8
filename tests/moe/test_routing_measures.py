"""Measures of routing, against values worked out by hand and against the slow definition of each."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.moe.routing_measures import MEASURES, routing_measures
from flanmoe.moe.routing_sums import RoutingSums


def sums(**changes: object) -> RoutingSums:
    """Two groups: 8 tokens that asked for 2 experts each, of which 4 choices did not fit; and nobody."""
    values = {
        "tokens": torch.tensor([8, 0]),
        "asked": torch.tensor([16, 0]),
        "dropped": torch.tensor([4, 0]),
        "unserved": torch.tensor([2, 0]),
        "assignments": torch.tensor([[9, 0, 3, 0], [0, 0, 0, 0]]),
        "gate_mass": torch.tensor([[4.5, 0.0, 1.5, 0.0], [0.0] * 4], dtype=torch.double),
        "entropy": torch.tensor([8 * 0.5 * math.log(4), 0.0], dtype=torch.double),
        "confidence": torch.tensor([6.0, 0.0], dtype=torch.double),
        "squared_logits": torch.tensor([18.0, 0.0], dtype=torch.double),
        **changes,
    }
    return RoutingSums(**values)


def test_measures_worked_out_by_hand() -> None:
    found, nothing = routing_measures(sums())
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    expected = {
        "tokens": 8,
        "counts": [9, 0, 3, 0],
        "load": [0.75, 0.0, 0.25, 0.0],
        "entropy_nats": pytest.approx(entropy, abs=1e-12),
        "entropy_share": pytest.approx(entropy / math.log(4), abs=1e-12),
        "max_over_mean": 3.0,
        "unused_share": 0.5,
        "router_entropy_nats": pytest.approx(0.5 * math.log(4), abs=1e-12),
        "router_entropy_share": pytest.approx(0.5, abs=1e-12),
        "confidence": 0.75,
        "mean_gate": 0.5,
        "dropped_share": 0.25,
        "unserved_share": 0.25,
        "logit_rms": 1.5,
    }
    assert found.to_mapping() == expected
    assert tuple(found.scalars()) == MEASURES
    assert json.loads(json.dumps(found.to_mapping())) == found.to_mapping()
    assert set(nothing.scalars().values()) == {0.0}
    assert nothing.load == (0.0,) * 4


def test_coactivation_is_a_share_of_the_tokens_of_the_row() -> None:
    pairs = torch.zeros(2, 4, 4, dtype=torch.long)
    pairs[0] = torch.tensor([[9, 0, 3, 0], [0, 0, 0, 0], [3, 0, 3, 0], [0, 0, 0, 0]])
    found, nothing = routing_measures(sums(coactivation=pairs))
    assert found.coactivation == (
        (1.0, 0.0, 1 / 3, 0.0),
        (0.0,) * 4,
        (1.0, 0.0, 1.0, 0.0),
        (0.0,) * 4,
    )
    assert nothing.coactivation == ((0.0,) * 4,) * 4
    assert found.to_mapping()["coactivation"][2] == [1.0, 0.0, 1.0, 0.0]
    assert routing_measures(sums())[0].coactivation is None


def test_one_expert_is_used_evenly_by_itself() -> None:
    one = RoutingSums.none(1, 1)
    one = one + RoutingSums(
        **{**one.tensors(), "tokens": torch.tensor([3]), "assignments": torch.tensor([[3]])}
    )
    (found,) = routing_measures(one)
    assert (found.entropy_nats, found.entropy_share, found.max_over_mean) == (0.0, 1.0, 1.0)


@given(
    counts=st.lists(st.lists(st.integers(0, 50), min_size=5, max_size=5), min_size=1, max_size=4)
)
def test_load_equals_its_definition(counts: list[list[int]]) -> None:
    none = RoutingSums.none(len(counts), 5)
    given_sums = RoutingSums(**{**none.tensors(), "assignments": torch.tensor(counts)})
    for own, found in zip(counts, routing_measures(given_sums), strict=True):
        total = sum(own)
        load = [count / total if total else 0.0 for count in own]
        assert found.load == pytest.approx(load, abs=1e-15)
        entropy = -sum(share * math.log(share) for share in load if share)
        assert found.entropy_nats == pytest.approx(entropy, abs=1e-12)
        assert 0 <= found.entropy_share <= 1
        assert found.max_over_mean == pytest.approx(5 * max(load))
        assert found.unused_share == (own.count(0) / 5 if total else 0.0)
