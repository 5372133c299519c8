"""Six tokens and three experts, every value worked out by hand (research note 01, section 6.10)."""

import pytest
import torch

from flanmoe.moe.losses import balance_loss, router_probabilities, z_loss
from flanmoe.moe.routers import (
    CapacityConfig,
    ExpertChoiceConfig,
    GShardConfig,
    RouterConfig,
    SwitchConfig,
    TopKConfig,
)
from flanmoe.moe.routing import Routing
from flanmoe.testing.routing import (
    Pair,
    best_experts_written_out,
    check_routing,
    expert_choice_written_out,
    kept_pairs,
    router_of_logits,
    token_choice_written_out,
)

LOGITS = torch.tensor(
    [[2, 1, 0], [2, 0, 1], [3, 0, 0], [0, 2, 1], [1, 0, 0.5], [0, 0, 1]], dtype=torch.float32
)
PROBABILITIES = [
    [0.665241, 0.244728, 0.090031],
    [0.665241, 0.090031, 0.244728],
    [0.909443, 0.045279, 0.045279],
    [0.090031, 0.665241, 0.244728],
    [0.506480, 0.186324, 0.307196],
    [0.211942, 0.211942, 0.576117],
]
LOG_PARTITIONS = [2.407606, 2.407606, 3.094923, 2.407606, 1.680270, 1.551445]
SECOND_SHARES = [0.268941, 0.268941, 0.047426, 0.268941, 0.377541, 0.268941]


def places(capacity: int) -> CapacityConfig:
    """The capacity as a factor: an even share is 6 / 3 = 2 tokens."""
    return CapacityConfig(train=capacity / 2, minimum=1)


def route(config: RouterConfig, logits: torch.Tensor = LOGITS) -> Routing:
    """Route in training mode, where capacities hold."""
    routing = router_of_logits(config).train()(logits)
    check_routing(routing)
    return routing


def gates(routing: Routing) -> dict[Pair, float]:
    return dict(zip(kept_pairs(routing), routing.gates.tolist(), strict=True))


def close(expected: dict[Pair, float]) -> object:
    return pytest.approx(expected, abs=1e-6)


def written_out(top_k: int, capacity: int, *, by_confidence: bool) -> dict[Pair, int]:
    """Place at its expert of every pair that is kept, by the definition."""
    return token_choice_written_out(
        best_experts_written_out(PROBABILITIES, top_k),
        [[True] * top_k] * 6,
        groups=[0] * 6,
        capacities={0: capacity},
        confidence=[max(row) for row in PROBABILITIES] if by_confidence else None,
    )


def test_probabilities() -> None:
    routing = route(TopKConfig(num_experts=3, top_k=1, normalize=False))
    assert torch.equal(routing.logits, LOGITS)
    for row, expected in zip(router_probabilities(routing.logits), PROBABILITIES, strict=True):
        assert row.tolist() == pytest.approx(expected, abs=1e-6)


def test_z_loss_and_each_log_partition() -> None:
    config = TopKConfig(num_experts=3)
    assert z_loss(route(config)).item() == pytest.approx(5.366422, abs=2e-6)
    for token, expected in enumerate(LOG_PARTITIONS):
        alone = route(config, LOGITS[token : token + 1])
        assert z_loss(alone).sqrt().item() == pytest.approx(expected, abs=1e-6)


def test_mean_probabilities() -> None:
    mean = router_probabilities(route(TopKConfig(num_experts=3)).logits).mean(dim=0)
    assert mean.tolist() == pytest.approx([0.508063, 0.240591, 0.251346], abs=1e-6)


def test_balance_of_top_1() -> None:
    routing = route(SwitchConfig(num_experts=3, capacity=places(6)))
    assert routing.expert_counts().tolist() == [4, 1, 1]
    assert balance_loss(routing).item() == pytest.approx(1.262094, abs=1e-6)


def test_balance_of_top_2_counts_any_choice_or_the_first() -> None:
    routing = route(TopKConfig(num_experts=3))
    assert routing.expert_counts().tolist() == [5, 3, 4]
    assert balance_loss(routing).item() == pytest.approx(2.133736, abs=1e-6)
    assert balance_loss(routing, counting="first").item() == pytest.approx(1.262094, abs=1e-6)


def test_balance_counts_what_was_dropped() -> None:
    top_1 = route(SwitchConfig(num_experts=3, capacity=places(2)))
    top_2 = route(GShardConfig(num_experts=3, second_choice="all", capacity=places(2)))
    assert top_1.expert_counts().tolist() == [2, 1, 1]
    assert int(top_1.num_dropped) == 2
    assert balance_loss(top_1).item() == pytest.approx(1.262094, abs=1e-6)
    assert top_2.expert_counts().tolist() == [2, 2, 2]
    assert int(top_2.num_dropped) == 6
    assert balance_loss(top_2).item() == pytest.approx(2.133736, abs=1e-6)
    assert balance_loss(top_2, counting="first").item() == pytest.approx(1.262094, abs=1e-6)


def test_top_1_with_two_places_in_natural_order() -> None:
    routing = route(SwitchConfig(num_experts=3, capacity=places(2)))
    assert gates(routing) == close(
        {(0, 0): 0.665241, (1, 0): 0.665241, (3, 1): 0.665241, (5, 2): 0.576117}
    )
    assert written_out(1, 2, by_confidence=False) == {(0, 0): 0, (1, 0): 1, (3, 1): 0, (5, 2): 0}


def test_top_1_with_two_places_by_confidence() -> None:
    routing = route(SwitchConfig(num_experts=3, capacity=places(2), order="batch_priority"))
    assert gates(routing) == close(
        {(0, 0): 0.665241, (2, 0): 0.909443, (3, 1): 0.665241, (5, 2): 0.576117}
    )
    assert written_out(1, 2, by_confidence=True) == {(2, 0): 0, (0, 0): 1, (3, 1): 0, (5, 2): 0}


def test_top_2_with_two_places_and_raw_probabilities() -> None:
    routing = route(
        GShardConfig(num_experts=3, normalize=False, second_choice="all", capacity=places(2))
    )
    assert gates(routing) == close(
        {
            (0, 0): 0.665241,
            (0, 1): 0.244728,
            (1, 0): 0.665241,
            (1, 2): 0.244728,
            (3, 1): 0.665241,
            (5, 2): 0.576117,
        }
    )
    assert {2, 4}.isdisjoint(routing.token_ids.tolist())


def test_top_2_with_three_places_by_confidence() -> None:
    routing = route(
        GShardConfig(
            num_experts=3,
            normalize=False,
            second_choice="all",
            capacity=places(3),
            order="batch_priority",
        )
    )
    expected = {
        (2, 0): 0,
        (2, 1): 1,
        (0, 0): 1,
        (0, 1): 2,
        (1, 0): 2,
        (1, 2): 1,
        (3, 1): 0,
        (3, 2): 2,
        (5, 2): 0,
    }
    assert written_out(2, 3, by_confidence=True) == expected
    assert gates(routing) == close({(t, e): PROBABILITIES[t][e] for t, e in expected})


def test_mesh_tf_top_2_with_two_places_keeps_renormalised_gates_as_they_are() -> None:
    routing = route(GShardConfig(num_experts=3, second_choice="all", capacity=places(2)))
    # The second choices of tokens 3 and 5 do not fit, and their first gates are not raised to 1.
    assert gates(routing) == close(
        {
            (0, 0): 0.731059,
            (0, 1): 0.268941,
            (1, 0): 0.731059,
            (1, 2): 0.268941,
            (3, 1): 0.731059,
            (5, 2): 0.731059,
        }
    )


def test_mesh_tf_second_shares_and_the_tie_of_token_5() -> None:
    routing = route(
        GShardConfig(num_experts=3, second_choice="all", capacity=CapacityConfig(train=None))
    )
    assert routing.choices.expert_ids.tolist() == [[0, 1], [0, 2], [0, 1], [1, 2], [0, 2], [2, 0]]
    found = gates(routing)
    seconds = [found[t, e] for t, (_, e) in enumerate(routing.choices.expert_ids.tolist())]
    assert seconds == pytest.approx(SECOND_SHARES, abs=1e-6)


def test_random_keeps_the_second_choice_of_token_2_with_probability_0_237() -> None:
    config = GShardConfig(
        num_experts=3, second_choice="random", threshold=0.2, capacity=CapacityConfig(train=None)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        routing = router_of_logits(config).train()(LOGITS.repeat(100_000, 1))
    asked = routing.choices.asked.view(100_000, 6, 2).double().mean(dim=0)
    assert asked[:, 0].tolist() == [1.0] * 6
    # All other second shares are above the threshold: always kept.
    assert asked[[0, 1, 3, 4, 5], 1].tolist() == [1.0] * 5
    # min(1, g2 / 0.2); the standard deviation of the mean is 0.0013.
    assert asked[2, 1].item() == pytest.approx(0.237130, abs=0.005)


def test_expert_choice_with_two_tokens_an_expert() -> None:
    routing = route(ExpertChoiceConfig(num_experts=3, capacity_factor=1.0))
    expected = {
        (2, 0): 0.909443,
        (0, 0): 0.665241,
        (3, 1): 0.665241,
        (0, 1): 0.244728,
        (5, 2): 0.576117,
        (4, 2): 0.307196,
    }
    assert gates(routing) == close(expected)
    # Token 1 is served by nobody and token 0 twice: of the equal tokens 0 and 1 the earlier wins.
    assert sorted(routing.token_ids.tolist()) == [0, 0, 2, 3, 4, 5]
    pairs = expert_choice_written_out(PROBABILITIES, groups=[0] * 6, capacities={0: 2})
    assert pairs == sorted(expected)
    assert balance_loss(routing).item() == 0.0
