"""Routers of token choice against the written-out definition, and what policies give up."""

from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flanmoe.moe.routers import (
    CapacityConfig,
    GShardConfig,
    RouterConfig,
    StMoeConfig,
    SwitchConfig,
    TopKConfig,
)
from flanmoe.moe.routers.second_choice import asked_for
from flanmoe.moe.routing import Routing
from flanmoe.testing.routing import (
    RouterInputs,
    best_experts_written_out,
    check_routing,
    kept_pairs,
    router_of_logits,
    token_choice_written_out,
)


@st.composite
def capacities(draw: st.DrawFn) -> CapacityConfig:
    group = draw(st.sampled_from(["segment", "batch"]))
    sizes = st.none() | st.integers(1, 8)
    return CapacityConfig(
        train=draw(st.none() | st.sampled_from([0.1, 0.5, 1.0, 1.25, 2.0])),
        rounding=draw(st.sampled_from(["nearest", "down", "up"])),
        minimum=draw(st.integers(1, 3)),
        group=group,
        group_size=draw(sizes) if group == "batch" else None,
    )


@st.composite
def inputs(draw: st.DrawFn, num_experts: int) -> RouterInputs:
    return RouterInputs.random(
        draw(st.integers(0, 14)),
        num_experts,
        seed=draw(st.integers(0, 2**31)),
        ties=draw(st.booleans()),
    )


def group_of_each_token(capacity: CapacityConfig, case: RouterInputs) -> list[int]:
    """Numbers of examples, or of the runs that `CapacityConfig` cuts a batch into."""
    if capacity.group == "segment":
        return case.segments.tolist()
    return capacity.groups(case.segments).tolist()


def capacity_of_each_group(
    capacity: CapacityConfig, groups: list[int], case: RouterInputs
) -> dict[int, int] | None:
    """max(minimum, round(factor * real tokens / experts)), group by group."""
    if capacity.train is None:
        return None
    real = Counter(g for g, valid in zip(groups, case.valid.tolist(), strict=True) if valid)
    found = {}
    for group in set(groups):
        share = Fraction(str(capacity.train)) * real[group] / case.logits.shape[1]
        rounded = {"nearest": round(share), "down": int(share), "up": -int(-share // 1)}
        found[group] = max(capacity.minimum, rounded[capacity.rounding])
    return found


def check_against_the_definition(config: Any, case: RouterInputs, top_k: int) -> Routing:
    """Route in training mode; compare choices, kept pairs and their order with plain loops."""
    routing = case.route(router_of_logits(config).train())
    groups = group_of_each_token(config.capacity, case)
    limits = capacity_of_each_group(config.capacity, groups, case)
    check_routing(routing, groups=groups, capacities=limits)
    probabilities = case.probabilities()
    choices = best_experts_written_out(probabilities, top_k)
    # What padding would choose has no meaning.
    real = case.valid.nonzero()[:, 0].tolist()
    found = routing.choices.expert_ids.tolist()
    assert [found[token] for token in real] == [choices[token] for token in real]
    first_come = config.order == "natural"
    expected = token_choice_written_out(
        choices,
        routing.choices.asked.tolist(),
        groups=groups,
        capacities=limits,
        confidence=None if first_come else [max(row) for row in probabilities],
    )
    assert set(kept_pairs(routing)) == set(expected)
    # One token after another, and its choices best first.
    ranks = [(token, choices[token].index(expert)) for token, expert in kept_pairs(routing)]
    assert ranks == sorted(ranks)
    return routing


@given(data=st.data(), num_experts=st.integers(1, 5), capacity=capacities())
@pytest.mark.parametrize("order", ["natural", "batch_priority"])
def test_switch_equals_the_definition(
    data: st.DataObject, num_experts: int, capacity: CapacityConfig, order: Any
) -> None:
    config = SwitchConfig(num_experts=num_experts, capacity=capacity, order=order)
    case = data.draw(inputs(num_experts))
    routing = check_against_the_definition(config, case, 1)
    assert routing.choices.asked[:, 0].equal(case.valid)
    p = case.probabilities()
    assert routing.gates.tolist() == pytest.approx([p[t][e] for t, e in kept_pairs(routing)])


@settings(max_examples=200)
@given(
    data=st.data(),
    capacity=capacities(),
    order=st.sampled_from(["natural", "batch_priority"]),
    normalize=st.booleans(),
    policy=st.sampled_from(["all", "none", "threshold", "random"]),
)
def test_top_2_equals_the_definition(
    data: st.DataObject, capacity: CapacityConfig, order: Any, normalize: bool, policy: Any
) -> None:
    config = GShardConfig(
        num_experts=data.draw(st.integers(2, 5)),
        capacity=capacity,
        order=order,
        normalize=normalize,
        second_choice=policy,
        threshold=0.3,
    )
    case = data.draw(inputs(config.num_experts))
    routing = check_against_the_definition(config, case, 2)
    for token, p in enumerate(case.probabilities()):
        second, first = sorted(p)[-2:]
        share = second / (first + second + 1e-9)
        always = {"all": True, "none": False, "threshold": share > 0.3, "random": share >= 0.3}
        asked = routing.choices.asked[token].tolist()
        assert asked[0] == case.valid[token]
        if policy != "random" or always[policy]:
            assert asked[1] == (always[policy] and bool(case.valid[token]))
    for (token, expert), gate in zip(kept_pairs(routing), routing.gates.tolist(), strict=True):
        p = case.probabilities()[token]
        total = sum(sorted(p)[-2:]) + 1e-9 if normalize else 1.0
        # Whatever became of the other choice.
        assert gate == pytest.approx(p[expert] / total, rel=1e-12)


@given(data=st.data(), num_experts=st.integers(1, 5), normalize=st.booleans())
def test_top_k_keeps_every_choice_of_every_real_token(
    data: st.DataObject, num_experts: int, normalize: bool
) -> None:
    top_k = data.draw(st.integers(2 if normalize and num_experts > 1 else 1, num_experts))
    normalize = normalize and top_k > 1
    config = TopKConfig(num_experts=num_experts, top_k=top_k, normalize=normalize)
    case = data.draw(inputs(num_experts))
    routing = case.route(router_of_logits(config))
    check_routing(routing)
    p = case.probabilities()
    choices = best_experts_written_out(p, top_k)
    valid = [token for token, real in enumerate(case.valid.tolist()) if real]
    assert kept_pairs(routing) == [(token, e) for token in valid for e in choices[token]]
    for (token, expert), gate in zip(kept_pairs(routing), routing.gates.tolist(), strict=True):
        total = sum(sorted(p[token])[-top_k:]) + 1e-9 if normalize else 1.0
        assert gate == pytest.approx(p[token][expert] / total, rel=1e-12)


@given(data=st.data(), num_experts=st.integers(2, 4), factor=st.sampled_from([0.25, 0.5, 1.0]))
def test_counting_only_kept_first_choices_as_mesh_tf_does_keeps_the_same(
    data: st.DataObject, num_experts: int, factor: float
) -> None:
    capacity = CapacityConfig(train=factor, minimum=1)
    config = GShardConfig(num_experts=num_experts, capacity=capacity, second_choice="all")
    case = data.draw(inputs(num_experts))
    routing = case.route(router_of_logits(config).train())
    limit = max(1, round(Fraction(str(factor)) * int(case.valid.sum()) / num_experts))
    # Second choices continue from the number of kept first choices, not of requested ones.
    kept: dict[int, list[int]] = {expert: [] for expert in range(num_experts)}
    for rank in (0, 1):
        for token, choices in enumerate(routing.choices.expert_ids.tolist()):
            if case.valid[token] and len(kept[choices[rank]]) < limit:
                kept[choices[rank]].append(token)
    assert set(kept_pairs(routing)) == {(t, e) for e, tokens in kept.items() for t in tokens}


CAPPED = CapacityConfig(train=1.0, minimum=1)
EVERY_KIND = [
    SwitchConfig(num_experts=4, capacity=CAPPED),
    GShardConfig(num_experts=4, capacity=CAPPED),
    StMoeConfig(num_experts=4),
    TopKConfig(num_experts=4, top_k=4),
]


@pytest.mark.parametrize("config", EVERY_KIND, ids=lambda config: config.kind)
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_no_token_and_nothing_but_padding_give_an_empty_list(
    config: RouterConfig, num_tokens: int
) -> None:
    router = router_of_logits(config).train()
    routing = router(torch.randn(num_tokens, 4), valid=torch.zeros(num_tokens, dtype=torch.bool))
    check_routing(routing)
    assert kept_pairs(routing) == []
    assert int(routing.num_dropped) == 0


@pytest.mark.parametrize("config", EVERY_KIND, ids=lambda config: config.kind)
def test_a_single_token_gets_its_best_expert(config: RouterConfig) -> None:
    routing = router_of_logits(config).train()(torch.tensor([[0.0, 2.0, 1.9, -1.0]]))
    assert kept_pairs(routing)[0] == (0, 1)


def test_padding_takes_no_place_and_does_not_raise_the_capacity() -> None:
    # Four real tokens of eight want expert 0: 0.5 * 4 / 2 = 1 place. Padding comes first.
    router = router_of_logits(
        SwitchConfig(num_experts=2, capacity=CapacityConfig(train=0.5, minimum=1))
    )
    routing = router(torch.tensor([[1.0, 0.0]] * 8), valid=torch.arange(8) >= 4)
    assert kept_pairs(routing) == [(4, 0)]


def test_equal_confidence_is_served_in_order() -> None:
    config = SwitchConfig(
        num_experts=2, order="batch_priority", capacity=CapacityConfig(train=1.0, minimum=1)
    )
    routing = router_of_logits(config)(torch.tensor([[1.0, 0.0]] * 4))
    assert kept_pairs(routing) == [(0, 0), (1, 0)]


def test_groups_have_places_of_their_own() -> None:
    logits = torch.tensor([[1.0, 0.0]] * 8)
    for capacity, kept in (
        (CapacityConfig(train=0.5, minimum=1), [0, 1]),
        (CapacityConfig(train=0.5, minimum=1, group_size=4), [0, 4]),
        (CapacityConfig(train=0.5, minimum=1, group="segment"), [0, 2]),
    ):
        router = router_of_logits(SwitchConfig(num_experts=2, capacity=capacity))
        segments = torch.tensor([9, 9, 3, 3, 3, 3, 9, 9])
        assert router(logits, segments=segments).token_ids.tolist() == kept


def test_capacity_of_the_mode() -> None:
    capacity = CapacityConfig(train=0.5, evaluation=1.0, minimum=1)
    router = router_of_logits(SwitchConfig(num_experts=2, capacity=capacity))
    logits = torch.tensor([[1.0, 0.0]] * 8)
    assert len(router.train()(logits).token_ids) == 2
    assert len(router.eval()(logits).token_ids) == 4
    default = router_of_logits(SwitchConfig(num_experts=2)).eval()
    assert len(default(logits).token_ids) == 8


def test_a_second_choice_that_was_given_up_leaves_its_place_to_others() -> None:
    # Both ask expert 1 second, which has one place; the first token's share is below 0.2.
    logits = torch.tensor([[4.0, 0.0, -9.0], [1.0, 0.5, -9.0]])
    config = GShardConfig(
        num_experts=3,
        second_choice="threshold",
        threshold=0.2,
        capacity=CapacityConfig(train=0.5, minimum=1),
    )
    routing = router_of_logits(config)(logits)
    assert kept_pairs(routing) == [(0, 0), (1, 1)]


def test_policies_differ_between_training_and_evaluation() -> None:
    router = router_of_logits(
        GShardConfig(
            num_experts=2,
            second_choice="none",
            evaluation_second_choice="all",
            capacity=CapacityConfig(train=None),
        )
    )
    logits = torch.randn(5, 2)
    assert len(router.train()(logits).token_ids) == 5
    assert len(router.eval()(logits).token_ids) == 10


def test_each_choice_after_the_first_is_looked_at_by_itself() -> None:
    shares = torch.tensor([[0.5, 0.3, 0.2]])
    asked = asked_for(shares, "threshold", threshold=0.25)
    assert asked.tolist() == [[True, True, False]]
    # At the threshold itself: not above it.
    assert asked_for(shares, "threshold", threshold=0.5).tolist() == [[True, False, False]]


@pytest.mark.parametrize(("share", "probability"), [(0.05, 0.25), (0.1, 0.5), (0.25, 1.0)])
def test_random_keeps_a_share_over_the_threshold(share: float, probability: float) -> None:
    shares = torch.tensor([1 - share, share]).expand(40_000, 2)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        asked = asked_for(shares, "random", threshold=0.2)
    assert asked[:, 0].all()
    # The standard deviation of the mean is at most 0.0025.
    assert asked[:, 1].double().mean().item() == pytest.approx(probability, abs=0.01)


def test_defaults_are_those_of_the_papers() -> None:
    gshard, st_moe = GShardConfig(num_experts=8), StMoeConfig(num_experts=8)
    # GShard: 2N / (G E) places, and a second choice with probability 2 g2.
    assert (gshard.capacity.train, gshard.threshold, gshard.second_choice) == (2.0, 0.5, "random")
    assert (st_moe.capacity.train, st_moe.capacity.rounding) == (1.25, "down")
    assert (st_moe.capacity.group, st_moe.threshold) == ("segment", 0.2)
    assert gshard.normalize
    assert st_moe.normalize
    assert gshard.evaluation_second_choice == st_moe.evaluation_second_choice == "all"
    assert SwitchConfig(num_experts=8).capacity == CapacityConfig(train=1.25, minimum=4)
