"""Several layers at a time give the sums of each layer alone."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flanmoe.moe import stacked_sums
from flanmoe.moe.routing import Routing
from flanmoe.moe.routing_measures import measures_of_layers, routing_measures
from flanmoe.moe.routing_sums import RoutingSums, added_layers, side_by_side
from flanmoe.moe.stacked_sums import StackedSums


def routed(num_tokens: int, num_experts: int, top_k: int, seed: int) -> Routing:
    """Some tokens are padding; their logits are no numbers."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    valid = torch.rand(num_tokens, generator=generator) < 0.7
    gates, experts = logits.softmax(dim=1).topk(top_k)
    logits[~valid] = float("nan")
    return Routing.from_top_k(logits, experts, gates, valid=valid)


def require_same(found: Sequence[RoutingSums], expected: Sequence[RoutingSums]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.tensors().keys() == other.tensors().keys()
        for name, value in one.tensors().items():
            torch.testing.assert_close(value, other.tensors()[name], rtol=1e-12, atol=0, msg=name)


# An encoder with 4 experts, a decoder with 4 and 6, of which tokens get 1 or 2.
SHAPES = [(4, 2), (4, 2), (4, 1), (6, 2), (4, 2)]
SIDES = [0, 0, 0, 1, 1]


def model(seed: int) -> tuple[list[Routing], list[torch.Tensor]]:
    sides = [torch.arange(9) % 3, torch.arange(5) % 2]
    layers = [
        routed(len(sides[side]), *shape, seed + place)
        for place, (side, shape) in enumerate(zip(SIDES, SHAPES, strict=True))
    ]
    return layers, [sides[side] for side in SIDES]


def one_by_one(layers: Sequence[Routing], groups: Sequence[torch.Tensor]) -> list[RoutingSums]:
    return [
        RoutingSums.of(layer, own, num_groups=3, coactivation=True)
        for layer, own in zip(layers, groups, strict=True)
    ]


@pytest.mark.parametrize("most", [1, 2 * 9 * 4, 2**22])
@settings(max_examples=15)
@given(seed=st.integers(0, 1000))
def test_sums_equal_those_of_single_layers(most: int, seed: int) -> None:
    layers, groups = model(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacked_sums, "_MOST_LOGITS", most)
        found = StackedSums.of(layers, groups, num_groups=3, coactivation=True)
    assert len(found.parts) == (5 if most == 1 else 4)
    require_same(found.layers(), one_by_one(layers, groups))


def test_stacks_add_up_also_if_they_were_made_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [model(1), model(100)]
    one, other = (StackedSums.of(*own, num_groups=3, coactivation=True) for own in models)
    monkeypatch.setattr(stacked_sums, "_MOST_LOGITS", 1)
    apart = StackedSums.of(*models[1], num_groups=3, coactivation=True)
    assert apart.places != other.places
    expected = added_layers(*(one_by_one(*own) for own in models))
    require_same((one + other).layers(), expected)
    require_same((one + apart).layers(), expected)


def test_a_change_is_made_to_every_layer() -> None:
    layers, groups = model(1)
    found = StackedSums.of(layers, groups, num_groups=3).changed(lambda values: 2 * values)
    twice = [RoutingSums.of(x, own, num_groups=3) for x, own in zip(layers, groups, strict=True)]
    require_same(found.layers(), added_layers(twice, twice))


def test_layers_side_by_side_come_apart_again() -> None:
    layers, groups = model(7)
    alike = one_by_one(layers[:2], groups[:2])
    require_same(side_by_side(alike).split(2), alike)


def test_adding_layers_is_adding_each_of_them() -> None:
    one, other = (one_by_one(*model(seed)) for seed in (3, 4))
    expected = [old + new for old, new in zip(one, other, strict=True)]
    require_same(added_layers(one, other), expected)


def test_measures_of_layers_are_those_of_each_of_them() -> None:
    layers = one_by_one(*model(5))
    assert measures_of_layers(layers) == [routing_measures(layer) for layer in layers]
    assert measures_of_layers([]) == []
