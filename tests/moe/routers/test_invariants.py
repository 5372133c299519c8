"""What holds for every router, and what capacity breaks (research note 01, section 6.11).

The counterexamples at the end are there so that nobody takes for granted what the docs deny: tight
capacity makes tokens depend on later tokens and on other sequences.
"""

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from flanmoe.moe.layer import Experts, ExpertsConfig, SparseFFN
from flanmoe.moe.losses import (
    balance_loss,
    importance_loss,
    sequence_balance_loss,
    sequence_importance_loss,
    z_loss,
)
from flanmoe.moe.routers import (
    CapacityConfig,
    ExpertChoiceConfig,
    GShardConfig,
    RouterConfig,
    StMoeConfig,
    SwitchConfig,
    TopKConfig,
)
from flanmoe.moe.routing import Routing
from flanmoe.testing.routing import (
    Pair,
    RouterInputs,
    check_routing,
    kept_pairs,
    router_of_logits,
)

TIGHT = CapacityConfig(train=0.5, minimum=1, group="segment")
NO_LIMIT = CapacityConfig(train=None)

# Every kind of router, given a number of experts; with randomness where it has any.
KINDS: dict[str, Callable[[int], RouterConfig]] = {
    "switch": lambda n: SwitchConfig(num_experts=n, capacity=TIGHT),
    "switch_by_confidence": lambda n: SwitchConfig(
        num_experts=n, capacity=TIGHT, order="batch_priority"
    ),
    "gshard": lambda n: GShardConfig(num_experts=n, capacity=TIGHT),
    "gshard_raw": lambda n: GShardConfig(
        num_experts=n, capacity=TIGHT, normalize=False, second_choice="all"
    ),
    "st_moe": lambda n: StMoeConfig(num_experts=n, capacity=TIGHT),
    "top_k": lambda n: TopKConfig(num_experts=n, top_k=2),
    "expert_choice": lambda n: ExpertChoiceConfig(num_experts=n, capacity_factor=1.0),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
LOSSES = (
    balance_loss,
    lambda routing: balance_loss(routing, counting="first"),
    sequence_balance_loss,
    importance_loss,
    sequence_importance_loss,
    z_loss,
)


@st.composite
def cases(draw: st.DrawFn, *, ties: bool = True) -> RouterInputs:
    return RouterInputs.random(
        draw(st.integers(0, 14)),
        draw(st.integers(2, 5)),
        seed=draw(st.integers(0, 2**31)),
        ties=ties and draw(st.booleans()),
    )


def router_for(kind: str, case: RouterInputs) -> Any:
    return router_of_logits(KINDS[kind](case.logits.shape[1]))


def gates(routing: Routing) -> dict[Pair, float]:
    return dict(zip(kept_pairs(routing), routing.gates.tolist(), strict=True))


def only(routing: Routing, tokens: list[int]) -> dict[Pair, float]:
    """Gates of some tokens, numbered from 0 in the order given."""
    return {
        (tokens.index(token), expert): gate
        for (token, expert), gate in gates(routing).items()
        if token in tokens
    }


@EVERY_KIND
@settings(max_examples=20)
@given(case=cases())
def test_the_contract_holds(kind: str, case: RouterInputs) -> None:
    routing = case.route(router_for(kind, case).train())
    lengths = Counter(group for group in case.example_groups() if group is not None)
    factor, num_experts = Fraction(1 if kind == "expert_choice" else "0.5"), routing.num_experts
    capacities = {n: max(1, round(factor * lengths[n] / num_experts)) for n in (2, 7, 40)}
    limited = kind != "top_k"
    check_routing(
        routing,
        groups=case.segments.tolist() if limited else None,
        capacities=capacities if limited else None,
    )


@given(
    num_experts=st.integers(1, 6),
    data=st.data(),
    rounds=st.integers(1, 3),
    num_padding=st.integers(0, 3),
)
def test_balanced_routing_scores_the_number_of_choices(
    num_experts: int, data: st.DataObject, rounds: int, num_padding: int
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    # All rotations of one row: each expert is each choice equally often, and equally likely.
    row = torch.linspace(2, -1, num_experts, dtype=torch.float64)
    rotated = torch.stack([row.roll(shift) for shift in range(num_experts)]).repeat(rounds, 1)
    logits = torch.cat([rotated, 5 * torch.eye(num_experts)[:1].expand(num_padding, -1)])
    config = TopKConfig(num_experts=num_experts, top_k=top_k, normalize=False)
    routing = router_of_logits(config)(logits, valid=torch.arange(len(logits)) < len(rotated))
    assert balance_loss(routing).item() == pytest.approx(top_k, abs=1e-12)
    assert balance_loss(routing, counting="first").item() == pytest.approx(1, abs=1e-12)
    assert sequence_balance_loss(routing).item() == pytest.approx(top_k, abs=1e-12)
    assert importance_loss(routing).item() == pytest.approx(0, abs=1e-12)


@EVERY_KIND
@settings(max_examples=20)
@given(case=cases(ties=False), seed=st.integers(0, 1000))
def test_renaming_experts_renames_assignments_and_changes_no_loss(
    kind: str, case: RouterInputs, seed: int
) -> None:
    # Evaluation mode with the limits of training: no draw of the second choice.
    router = router_for(kind, case).eval()
    if kind not in ("top_k", "expert_choice"):
        router.capacity = CapacityConfig(evaluation=0.5, minimum=1, group="segment")
    order = torch.randperm(case.logits.shape[1], generator=torch.Generator().manual_seed(seed))
    before = case.route(router)
    after = router(case.logits[:, order], valid=case.valid, segments=case.segments)
    renamed = {(token, order[expert].item()): g for (token, expert), g in gates(after).items()}
    assert renamed == pytest.approx(gates(before), rel=1e-12)
    for loss in LOSSES:
        torch.testing.assert_close(loss(after), loss(before), atol=1e-12, rtol=0)


@given(case=cases(), normalize=st.booleans())
def test_a_huge_factor_gives_the_unconstrained_mixture(case: RouterInputs, normalize: bool) -> None:
    num_experts = case.logits.shape[1]
    found = []
    for factor in (1e6, None):
        config = GShardConfig(
            num_experts=num_experts,
            normalize=normalize,
            second_choice="all",
            capacity=CapacityConfig(train=factor, minimum=1, group="segment"),
        )
        found.append(gates(case.route(router_of_logits(config).train())))
    dropless = TopKConfig(num_experts=num_experts, top_k=2, normalize=normalize)
    assert found[0] == found[1] == gates(case.route(router_of_logits(dropless)))
    assert len(found[0]) == 2 * int(case.valid.sum())


@given(case=cases(), factor=st.sampled_from([0.5, 1.0, 2.0]))
def test_expert_choice_fills_every_expert_for_every_example(
    case: RouterInputs, factor: float
) -> None:
    num_experts = case.logits.shape[1]
    config = ExpertChoiceConfig(num_experts=num_experts, capacity_factor=factor)
    routing = case.route(router_of_logits(config))
    loads = Counter((int(case.segments[t]), e) for t, e in kept_pairs(routing))
    lengths = Counter(group for group in case.example_groups() if group is not None)
    assert loads == {
        (group, expert): min(max(round(Fraction(str(factor)) * length / num_experts), 1), length)
        for group, length in lengths.items()
        for expert in range(num_experts)
    }


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gshard" and kind != "st_moe"])
@given(case=cases())
def test_with_examples_as_groups_another_example_changes_nothing(
    kind: str, case: RouterInputs
) -> None:
    router = router_for(kind, case).train()
    whole = case.route(router)
    for number in (2, 7, 40):
        own = case.segments == number
        alone = router(case.logits[own], valid=case.valid[own], segments=case.segments[own])
        expected = only(whole, own.nonzero()[:, 0].tolist())
        assert gates(alone) == pytest.approx(expected, rel=1e-12)


@EVERY_KIND
@settings(max_examples=20)
@given(case=cases())
def test_evaluation_repeats_and_draws_no_random_number(kind: str, case: RouterInputs) -> None:
    router = router_for(kind, case).eval()
    state = torch.get_rng_state()
    first, second = case.route(router), case.route(router)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.token_ids, second.token_ids)
    assert torch.equal(first.expert_ids, second.expert_ids)
    assert torch.equal(first.gates, second.gates)


def test_a_random_second_choice_draws_in_training() -> None:
    router = router_of_logits(GShardConfig(num_experts=4, capacity=NO_LIMIT)).train()
    logits = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    assert kept_pairs(router(logits)) != kept_pairs(router(logits))


@pytest.mark.parametrize("normalize", [True, False])
@given(case=cases())
def test_without_a_limit_the_rest_of_the_batch_changes_nothing(
    normalize: bool, case: RouterInputs
) -> None:
    config = GShardConfig(num_experts=case.logits.shape[1], normalize=normalize)
    router = router_of_logits(config).eval()
    whole = case.route(router)
    for token in range(len(case.logits)):
        alone = router(case.logits[token : token + 1], valid=case.valid[token : token + 1])
        assert gates(alone) == pytest.approx(only(whole, [token]), rel=1e-12)


@pytest.mark.parametrize("group", ["segment", "batch"])
@given(case=cases(), cut=st.integers(0, 14), seed=st.integers(0, 1000))
def test_top_1_in_natural_order_does_not_look_ahead(
    group: Any, case: RouterInputs, cut: int, seed: int
) -> None:
    capacity = CapacityConfig(train=0.5, minimum=1, group=group)
    router = router_of_logits(SwitchConfig(num_experts=case.logits.shape[1], capacity=capacity))
    later = case.logits.clone()
    noise = torch.Generator().manual_seed(seed)
    later[cut:] = torch.randn(later[cut:].shape, generator=noise, dtype=torch.float64)
    changed = router(later, valid=case.valid, segments=case.segments)
    earlier = list(range(min(cut, len(later))))
    assert only(changed, earlier) == pytest.approx(only(case.route(router), earlier), rel=1e-12)


@given(data=st.data(), top_k=st.integers(1, 3), case=cases())
def test_dropless_top_k_does_not_look_ahead(
    data: st.DataObject, top_k: int, case: RouterInputs
) -> None:
    top_k = min(top_k, case.logits.shape[1])
    config = TopKConfig(num_experts=case.logits.shape[1], top_k=top_k, normalize=top_k > 1)
    cut = data.draw(st.integers(0, len(case.logits)))
    prefix = router_of_logits(config)(case.logits[:cut], valid=case.valid[:cut])
    whole = only(case.route(router_of_logits(config)), list(range(cut)))
    assert gates(prefix) == pytest.approx(whole, rel=1e-12)


# One example of three tokens; only the last one changes. Logits of four experts.
EARLIER = [[2.0, 1.0, 0.0, -9.0], [0.0, -9.0, 2.0, 1.0]]
LAST = ([-9.0, 2.0, -9.0, 0.0], [-9.0, 0.0, -9.0, 2.0])


def kept_by_the_first_two(config: RouterConfig, last: list[float]) -> set[Pair]:
    routing = router_of_logits(config).train()(torch.tensor([*EARLIER, last]))
    return {pair for pair in kept_pairs(routing) if pair[0] < 2}


def test_top_2_with_tight_capacity_looks_ahead() -> None:
    config = GShardConfig(
        num_experts=4, second_choice="all", capacity=CapacityConfig(train=1.0, minimum=1)
    )
    # The last token's first choice takes the only place before an earlier token's second choice.
    assert kept_by_the_first_two(config, LAST[0]) == {(0, 0), (1, 2), (1, 3)}
    assert kept_by_the_first_two(config, LAST[1]) == {(0, 0), (0, 1), (1, 2)}
    # Without a limit it does not.
    free = config.model_copy(update={"capacity": NO_LIMIT})
    assert kept_by_the_first_two(free, LAST[0]) == kept_by_the_first_two(free, LAST[1])


def test_batch_priority_looks_ahead() -> None:
    capacity = CapacityConfig(train=1.0, minimum=1)
    config = SwitchConfig(num_experts=4, capacity=capacity, order="batch_priority")
    assert kept_by_the_first_two(config, [5.0, 0.0, 0.0, 0.0]) == {(1, 2)}
    assert kept_by_the_first_two(config, [0.5, 0.0, 0.0, 0.0]) == {(0, 0), (1, 2)}


def test_expert_choice_looks_ahead() -> None:
    config = ExpertChoiceConfig(num_experts=4, capacity_factor=1.0)
    assert (0, 0) not in kept_by_the_first_two(config, [5.0, 0.0, 0.0, 0.0])
    assert (0, 0) in kept_by_the_first_two(config, [0.5, 0.0, 0.0, 0.0])


def test_with_the_batch_as_group_another_sequence_takes_places() -> None:
    sequence, other = torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[1.0, 0.0]] * 2)
    whole, segments = torch.cat([other, sequence]), torch.tensor([0, 0, 1, 1])

    def kept(group: Any, tokens: torch.Tensor, numbers: torch.Tensor) -> list[int]:
        capacity = CapacityConfig(train=1.0, minimum=1, group=group)
        router = router_of_logits(SwitchConfig(num_experts=2, capacity=capacity))
        return router(tokens, segments=numbers).token_ids.tolist()

    assert kept("batch", sequence, segments[2:]) == [0]
    assert kept("batch", whole, segments) == [0, 1]
    assert kept("segment", sequence, segments[2:]) == [0]
    assert kept("segment", whole, segments) == [0, 2]


def dense_ffn(experts: Experts, hidden: torch.Tensor, *, expert: int = 0) -> torch.Tensor:
    """One expert as the dense FFN that it was copied from."""
    gate, up = experts.gate_up_proj[expert].chunk(2)
    return (F.silu(hidden @ gate.T) * (hidden @ up.T)) @ experts.down_proj[expert].T


def sparse_ffn(config: RouterConfig, *, same: bool = False) -> SparseFFN:
    """A float64 block of width 6; with `same` all experts are copies of one."""
    torch.manual_seed(0)
    experts = Experts(ExpertsConfig(num_experts=config.num_experts, expert_width=5), 6)
    if same:
        for matrices in experts.parameters():
            matrices.data[:] = matrices.data[0]
    router = config.model_copy(update={"init_std": 0.7}).build(hidden_size=6)
    return SparseFFN(router, experts).double()


HIDDEN = torch.randn(11, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    "config",
    [
        SwitchConfig(num_experts=1),
        SwitchConfig(num_experts=1, gate="straight_through"),
        TopKConfig(num_experts=1, top_k=1, normalize=False),
        ExpertChoiceConfig(num_experts=1, capacity_factor=1.0),
    ],
    ids=["switch", "straight_through", "top_k", "expert_choice"],
)
def test_a_single_expert_is_the_dense_ffn(config: RouterConfig) -> None:
    block = sparse_ffn(config)
    torch.testing.assert_close(block(HIDDEN), dense_ffn(block.experts, HIDDEN), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "config",
    [
        SwitchConfig(num_experts=4, gate="straight_through", capacity=NO_LIMIT),
        GShardConfig(num_experts=4, second_choice="all", capacity=NO_LIMIT),
        TopKConfig(num_experts=4, top_k=3),
    ],
    ids=["straight_through", "gshard", "top_k"],
)
def test_copies_of_the_dense_ffn_with_gates_that_sum_to_1_are_the_dense_ffn(
    config: RouterConfig,
) -> None:
    block = sparse_ffn(config, same=True)
    # The 1e-9 that keeps a sum of gates from being 0.
    torch.testing.assert_close(block(HIDDEN), dense_ffn(block.experts, HIDDEN), rtol=5e-9, atol=0)


@pytest.mark.parametrize("kind", ["switch", "gshard_raw", "expert_choice"])
def test_with_raw_probabilities_copies_are_scaled_by_the_sum_of_kept_gates(kind: str) -> None:
    block = sparse_ffn(KINDS[kind](4), same=True).train()
    routing = block.router(HIDDEN)
    scale = torch.zeros(11, dtype=torch.float64).index_add(0, routing.token_ids, routing.gates)
    assert scale.min() < 0.5
    expected = scale.unsqueeze(1) * dense_ffn(block.experts, HIDDEN)
    torch.testing.assert_close(block(HIDDEN), expected, rtol=0, atol=1e-12)
