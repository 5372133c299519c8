"""Forced experts: a recorded routing is made again to the bit, and followed as scores move."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flanmoe.core.errors import ModelError
from flanmoe.moe.losses import balance_loss, sequence_balance_loss
from flanmoe.moe.routers import (
    CapacityConfig,
    ExpertChoiceConfig,
    GShardConfig,
    RouterConfig,
    StMoeConfig,
    SwitchConfig,
    TopKConfig,
)
from flanmoe.moe.routing import Choices, ForcedRouting, Routing
from flanmoe.testing.routing import RouterInputs, check_routing, kept_pairs, router_of_logits

TIGHT = CapacityConfig(train=0.5, minimum=1)
KINDS: dict[str, Callable[[int], RouterConfig]] = {
    "switch": lambda n: SwitchConfig(num_experts=n, capacity=TIGHT, order="batch_priority"),
    "straight_through": lambda n: SwitchConfig(num_experts=n, gate="straight_through"),
    "gshard": lambda n: GShardConfig(num_experts=n, capacity=TIGHT),
    "gshard_raw": lambda n: GShardConfig(num_experts=n, capacity=TIGHT, normalize=False),
    "st_moe": lambda n: StMoeConfig(num_experts=n, capacity=TIGHT),
    "top_k": lambda n: TopKConfig(num_experts=n, top_k=2),
    "expert_choice": lambda n: ExpertChoiceConfig(num_experts=n, capacity_factor=1.0),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@st.composite
def cases(draw: st.DrawFn) -> RouterInputs:
    seed, ties = draw(st.integers(0, 2**31)), draw(st.booleans())
    return RouterInputs.random(
        draw(st.integers(0, 12)), draw(st.integers(2, 5)), seed=seed, ties=ties
    )


def router_for(kind: str, case: RouterInputs) -> Any:
    return router_of_logits(KINDS[kind](case.logits.shape[1])).train()


def replay(router: Any, case: RouterInputs, recorded: Routing, logits: torch.Tensor) -> Routing:
    return router(logits, valid=case.valid, segments=case.segments, forced=recorded.forced)


def assert_same_assignments(found: Routing, recorded: Routing) -> None:
    assert torch.equal(found.token_ids, recorded.token_ids)
    assert torch.equal(found.expert_ids, recorded.expert_ids)
    assert torch.equal(found.choices.expert_ids, recorded.choices.expert_ids)
    assert torch.equal(found.choices.asked, recorded.choices.asked)


@EVERY_KIND
@settings(max_examples=20)
@given(case=cases())
def test_a_replay_is_equal_to_the_bit(kind: str, case: RouterInputs) -> None:
    router = router_for(kind, case)
    recorded = case.route(router)
    found = replay(router, case, recorded, case.logits)
    assert_same_assignments(found, recorded)
    assert torch.equal(found.gates, recorded.gates)
    assert torch.equal(balance_loss(found), balance_loss(recorded))


@EVERY_KIND
@settings(max_examples=20)
@given(case=cases(), seed=st.integers(0, 1000))
def test_a_replay_follows_the_record_whatever_the_scores(
    kind: str, case: RouterInputs, seed: int
) -> None:
    router = router_for(kind, case)
    recorded = case.route(router)
    generator = torch.Generator().manual_seed(seed)
    moved = torch.randn(case.logits.shape, generator=generator, dtype=torch.float64)
    found = replay(router, case, recorded, moved)
    check_routing(found)
    assert_same_assignments(found, recorded)
    assert torch.equal(found.logits, moved.where(case.valid.unsqueeze(1), found.logits))
    assert found.gates.tolist() == pytest.approx(
        [gate_written_out(kind, found, pair) for pair in kept_pairs(found)], rel=1e-12
    )


def gate_written_out(kind: str, routing: Routing, pair: tuple[int, int]) -> float:
    """The gate from the new scores and the old choices."""
    token, expert = pair
    p = routing.logits[token].softmax(dim=0).tolist()
    if kind == "straight_through":
        return 1.0
    if kind in ("switch", "gshard_raw", "expert_choice"):
        return p[expert]
    return p[expert] / (sum(p[other] for other in routing.choices.expert_ids[token]) + 1e-9)


def test_near_ties_stay_where_they_were() -> None:
    router = router_of_logits(TopKConfig(num_experts=3, top_k=1, normalize=False))
    logits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    recorded = router(logits)
    nudged = logits + torch.tensor([0.0, 1e-6, 2e-6])
    assert router(nudged).expert_ids.tolist() == [1, 2]
    assert router(nudged, forced=recorded.forced).expert_ids.tolist() == [0, 1]


def test_dropped_tokens_stay_dropped_and_count_as_dropped() -> None:
    config = SwitchConfig(num_experts=2, capacity=CapacityConfig(train=1.0, minimum=1))
    router = router_of_logits(config).train()
    recorded = router(torch.tensor([[1.0, 0.0]] * 4))
    found = router(torch.zeros(4, 2), forced=recorded.forced)
    assert kept_pairs(found) == [(0, 0), (1, 0)]
    assert int(found.num_dropped) == int(recorded.num_dropped) == 2


@EVERY_KIND
def test_gradients_flow_through_the_gates_of_forced_experts(kind: str) -> None:
    case = RouterInputs.random(10, 4, seed=3)
    router = router_for(kind, case).double()
    recorded = case.route(router)
    moved = case.logits.roll(1, dims=0)
    weights = torch.linspace(-1, 1, len(recorded.gates), dtype=torch.float64)
    (replay(router, case, recorded, moved).gates * weights).sum().backward()
    found = router.weight.grad
    assert found.abs().sum() > 0.01
    # The same assignments, with gates from plain torch operations.
    weight = torch.eye(4, dtype=torch.float64, requires_grad=True)
    p = (moved @ weight.T).softmax(dim=1)
    own = p[recorded.token_ids, recorded.expert_ids]
    if kind == "straight_through":
        own = own.log()
    elif kind in ("gshard", "st_moe", "top_k"):
        own = own / (p.gather(1, recorded.choices.expert_ids).sum(1) + 1e-9)[recorded.token_ids]
    (own * weights).sum().backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-10, atol=1e-12)


@EVERY_KIND
@settings(max_examples=20)
@given(case=cases(), seed=st.integers(0, 1000))
def test_what_is_padding_now_is_not_served(kind: str, case: RouterInputs, seed: int) -> None:
    router = router_for(kind, case)
    everything = router(case.logits, segments=case.segments)
    found = replay(router, case, everything, case.logits)
    check_routing(found)
    valid = case.valid.tolist()
    assert kept_pairs(found) == [pair for pair in kept_pairs(everything) if valid[pair[0]]]
    # Losses are those of the real tokens alone.
    real = case.valid
    alone = Routing.from_top_k(
        case.logits[real],
        everything.choices.expert_ids[real],
        torch.zeros_like(everything.choices.expert_ids[real], dtype=torch.float64),
        segments=case.segments[real],
    )
    if kind in ("straight_through", "switch", "top_k", "expert_choice"):
        for loss in (balance_loss, sequence_balance_loss):
            torch.testing.assert_close(loss(found), loss(alone), rtol=0, atol=1e-12)


def test_experts_of_ones_own_choosing() -> None:
    router = router_of_logits(TopKConfig(num_experts=4, top_k=2))
    logits = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4], [0, 0, 0, 0]])
    forced = ForcedRouting.of_experts(torch.tensor([[3, 0], [3, 2], [1, 2]]))
    found = router(logits, valid=torch.tensor([True, True, False]), forced=forced)
    check_routing(found)
    assert kept_pairs(found) == [(0, 3), (0, 0), (1, 3), (1, 2)]
    # 1 / (1 + e^3) and 1 / (1 + e^-1).
    expected = [0.047426, 0.952574, 0.731059, 0.268941]
    assert found.gates.tolist() == pytest.approx(expected, abs=1e-6)
    assert found.asked_pairs()[0].tolist() == [0, 0, 1, 1]


def test_a_forced_expert_whose_probability_is_0_keeps_gates_and_gradients_finite() -> None:
    logits = torch.tensor([[200.0, 0.0, 1.0]], requires_grad=True)
    assert logits.softmax(dim=1)[0, 1] == 0
    for config, gate in (
        (SwitchConfig(num_experts=3, gate="straight_through"), 1.0),
        (SwitchConfig(num_experts=3), 0.0),
    ):
        forced = ForcedRouting.of_experts(torch.tensor([[1]]))
        found = router_of_logits(config)(logits, forced=forced)
        assert found.gates.tolist() == [gate]
        (gradient,) = torch.autograd.grad(found.gates.sum(), logits)
        assert gradient.isfinite().all()


def message(router: Any, logits: torch.Tensor, forced: ForcedRouting) -> str:
    with pytest.raises(ModelError) as caught:
        router(logits, forced=forced)
    return str(caught.value)


TOP_2 = router_of_logits(TopKConfig(num_experts=3, top_k=2))
LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])


def forced(tokens: list[int], experts: list[int], choices: list[list[int]]) -> ForcedRouting:
    expert_ids = torch.tensor(choices)
    asked = torch.ones_like(expert_ids, dtype=torch.bool)
    return ForcedRouting(torch.tensor(tokens), torch.tensor(experts), Choices(expert_ids, asked))


@pytest.mark.parametrize("choices", [[[0, 1]] * 3, [[0]] * 2])
def test_a_record_of_another_router_or_other_tokens_is_refused(choices: list[list[int]]) -> None:
    assert message(TOP_2, LOGITS, ForcedRouting.of_experts(torch.tensor(choices))) == (
        "Forced experts must be given for 2 tokens with 2 choices each, but are given for "
        f"{len(choices)} tokens with {len(choices[0])}. Record them with this router on these "
        "tokens."
    )


def test_choices_are_refused_where_experts_choose() -> None:
    router = router_of_logits(ExpertChoiceConfig(num_experts=3))
    assert message(router, LOGITS, ForcedRouting.of_experts(torch.tensor([[0], [1]]))) == (
        "Forced experts must be given for 2 tokens with 0 choices each, but are given for 2 tokens "
        "with 1. Record them with this router on these tokens."
    )


@pytest.mark.parametrize("expert", [-1, 3])
def test_an_expert_that_does_not_exist_is_refused(expert: int) -> None:
    found = message(TOP_2, LOGITS, ForcedRouting.of_experts(torch.tensor([[0, 1], [1, expert]])))
    assert found == (
        f"Forced experts must be 0 to 2, but are {min(expert, 0)} to {max(expert, 1)}. Record them "
        "with this router on these tokens."
    )


@pytest.mark.parametrize("token", [-1, 2])
@pytest.mark.parametrize("kind", ["top_k", "expert_choice"])
def test_a_token_that_does_not_exist_is_refused(kind: str, token: int) -> None:
    top_k = 2 if kind == "top_k" else 0
    choices = torch.tensor([[0, 1]] * 2)[:, :top_k]
    wrong = ForcedRouting(
        torch.tensor([0, token]),
        torch.tensor([0, 1]),
        Choices(choices, torch.ones_like(choices, dtype=torch.bool)),
    )
    assert message(router_of_logits(KINDS[kind](3)), LOGITS, wrong) == (
        f"Forced tokens must be 0 to 1, but are {min(token, 0)} to {max(token, 0)}. Record them "
        "with this router on these tokens."
    )


def test_an_assignment_made_twice_is_refused() -> None:
    assert message(TOP_2, LOGITS, forced([0, 1, 0], [0, 2, 0], [[0, 1], [2, 1]])) == (
        "A token can be forced to an expert once, but 1 of 3 forced assignments are repeated. "
        "Record them with this router on these tokens."
    )


def test_an_assignment_that_its_token_did_not_ask_for_is_refused() -> None:
    expected = (
        "Each forced assignment must be one that its token asked for, but 1 of 2 are not. Give "
        "the choices that the assignments were made from."
    )
    assert message(TOP_2, LOGITS, forced([0, 1], [0, 0], [[0, 1], [2, 1]])) == expected
    given_up = forced([0, 1], [0, 1], [[0, 1], [2, 1]])
    given_up.choices.asked[1, 1] = False
    assert message(TOP_2, LOGITS, given_up) == expected
