"""Drops of one layer, counted against loops over a routing with capacity."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.moe.routers import CapacityConfig, ExpertChoiceConfig, GShardConfig
from flanmoe.moe.routing import Routing
from flanmoe.training.drops import LayerDrops


def routed(kind: str, num_tokens: int, seed: int) -> Routing:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        config = (
            ExpertChoiceConfig(num_experts=3, capacity_factor=0.5, init_std=1.0)
            if kind == "expert_choice"
            else GShardConfig(
                num_experts=3, capacity=CapacityConfig(train=0.6, minimum=1), init_std=1.0
            )
        )
        router = config.build(hidden_size=4).train()
        hidden, valid = torch.randn(num_tokens, 4), torch.rand(num_tokens) < 0.7
        valid[0] = True
        return router(hidden, valid=valid, segments=torch.arange(num_tokens) // 4)


@pytest.mark.parametrize("kind", ["expert_choice", "gshard"])
@given(num_tokens=st.integers(1, 20), seed=st.integers(0, 1000))
def test_counts_equal_those_of_loops(kind: str, num_tokens: int, seed: int) -> None:
    routing = routed(kind, num_tokens, seed)
    kept = set(zip(routing.token_ids.tolist(), routing.expert_ids.tolist(), strict=True))
    wanted = [
        (token, expert)
        for token in range(num_tokens)
        for expert, asked in zip(
            routing.choices.expert_ids[token].tolist(),
            routing.choices.asked[token].tolist(),
            strict=True,
        )
        if asked
    ]
    real = [token for token in range(num_tokens) if routing.valid[token]]
    served = {token for token, _ in kept}
    drops = LayerDrops.of(routing)
    assert drops.counts.tolist() == [
        len(wanted),
        sum(pair not in kept for pair in wanted),
        len(real),
        sum(token not in served for token in real),
    ]
    assert drops.unserved_share == drops.counts.tolist()[3] / len(real)


def test_sums_describe_batches_together() -> None:
    one, other = (LayerDrops.of(routed("gshard", 12, seed)) for seed in (1, 2))
    total = LayerDrops.none() + one + other
    asked, dropped = (one.counts + other.counts)[:2].tolist()
    assert dropped > 0
    assert total.dropped_share == dropped / asked
    assert total.summed(lambda counts: 2 * counts).dropped_share == dropped / asked
    assert LayerDrops.none().to_mapping() == {"dropped_share": 0.0, "unserved_share": 0.0}
