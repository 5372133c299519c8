"""Sums over routing, against loops over tokens, for every way of routing."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from flanmoe.moe.routers import CapacityConfig, ExpertChoiceConfig, GShardConfig, SwitchConfig
from flanmoe.moe.routing import Routing
from flanmoe.moe.routing_sums import RoutingSums

NUM_EXPERTS = 4
KINDS = ("native", "switch", "gshard", "expert_choice")


def own_router(kind: str) -> Any:
    tight = CapacityConfig(train=0.6, minimum=1)
    match kind:
        case "switch":
            return SwitchConfig(num_experts=NUM_EXPERTS, capacity=tight, init_std=1.0)
        case "gshard":
            return GShardConfig(num_experts=NUM_EXPERTS, capacity=tight, init_std=1.0)
        case _:
            return ExpertChoiceConfig(num_experts=NUM_EXPERTS, capacity_factor=0.7, init_std=1.0)


def routed(kind: str, num_tokens: int, seed: int) -> Routing:
    """Some tokens are padding, the first is not."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        hidden, valid = torch.randn(num_tokens, 5), torch.rand(num_tokens) < 0.7
        valid[0] = True
        segments = torch.arange(num_tokens) // 4
        if kind != "native":
            router = own_router(kind).build(hidden_size=5).train()
            return router(hidden, valid=valid, segments=segments)
        logits = hidden @ torch.randn(5, NUM_EXPERTS)
        gates, experts = logits.softmax(dim=1).topk(2)
        return Routing.from_top_k(logits, experts, gates, valid=valid, segments=segments)


def written_out(routing: Routing, groups: list[int], num_groups: int) -> dict[str, Any]:
    """Every sum by going through the tokens one by one."""
    sums: dict[str, Any] = {
        name: [0] * num_groups for name in ("tokens", "asked", "dropped", "unserved")
    }
    sums |= {name: [0.0] * num_groups for name in ("entropy", "confidence", "squared_logits")}
    sums["assignments"] = [[0] * NUM_EXPERTS for _ in range(num_groups)]
    sums["gate_mass"] = [[0.0] * NUM_EXPERTS for _ in range(num_groups)]
    sums["coactivation"] = [
        [[0] * NUM_EXPERTS for _ in range(NUM_EXPERTS)] for _ in range(num_groups)
    ]
    kept: dict[int, dict[int, float]] = {}
    for token, expert, gate in zip(
        routing.token_ids.tolist(), routing.expert_ids.tolist(), routing.gates.tolist(), strict=True
    ):
        kept.setdefault(token, {})[expert] = gate
    for token, group in enumerate(groups):
        if not routing.valid[token]:
            continue
        own = kept.get(token, {})
        wanted = [
            expert
            for expert, asked in zip(
                routing.choices.expert_ids[token].tolist(),
                routing.choices.asked[token].tolist(),
                strict=True,
            )
            if asked
        ]
        logits = routing.logits[token].tolist()
        weights = [math.exp(logit - max(logits)) for logit in logits]
        probabilities = [weight / sum(weights) for weight in weights]
        mean = sum(logits) / NUM_EXPERTS
        sums["tokens"][group] += 1
        sums["asked"][group] += len(wanted)
        sums["dropped"][group] += sum(expert not in own for expert in wanted)
        sums["unserved"][group] += not own
        sums["entropy"][group] -= sum(p * math.log(p) for p in probabilities)
        sums["confidence"][group] += max(probabilities)
        sums["squared_logits"][group] += sum((x - mean) ** 2 for x in logits) / NUM_EXPERTS
        for expert, gate in own.items():
            sums["assignments"][group][expert] += 1
            sums["gate_mass"][group][expert] += gate
            for other in own:
                sums["coactivation"][group][expert][other] += 1
    return sums


def require_same(found: RoutingSums, expected: dict[str, Any]) -> None:
    assert found.tensors().keys() == expected.keys()
    for name, value in found.tensors().items():
        wanted = torch.tensor(expected[name], dtype=value.dtype)
        torch.testing.assert_close(value, wanted, rtol=2e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(num_tokens=st.integers(1, 24), num_groups=st.integers(1, 4), data=st.data())
def test_sums_equal_those_of_loops(
    kind: str, num_tokens: int, num_groups: int, data: st.DataObject
) -> None:
    routing = routed(kind, num_tokens, data.draw(st.integers(0, 1000)))
    one = st.integers(0, num_groups - 1)
    groups = data.draw(st.lists(one, min_size=num_tokens, max_size=num_tokens))
    # The group of padding is arbitrary.
    given_groups = torch.where(routing.valid, torch.tensor(groups), 10**6)
    found = RoutingSums.of(routing, given_groups, num_groups=num_groups, coactivation=True)
    require_same(found, written_out(routing, groups, num_groups))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(first=st.integers(1, 12), second=st.integers(1, 12), seed=st.integers(0, 1000))
def test_batches_add_up(kind: str, first: int, second: int, seed: int) -> None:
    routings = [routed(kind, first, seed), routed(kind, second, seed + 1)]
    groups = [[token % 3 for token in range(number)] for number in (first, second)]
    total = RoutingSums.none(3, NUM_EXPERTS, coactivation=True)
    expected = written_out(routings[0], groups[0], 3)
    for routing, own in zip(routings, groups, strict=True):
        total += RoutingSums.of(routing, torch.tensor(own), num_groups=3, coactivation=True)
    other = written_out(routings[1], groups[1], 3)
    both = {
        name: (torch.tensor(expected[name]) + torch.tensor(other[name])).tolist()
        for name in expected
    }
    require_same(total, both)
    alone = written_out(routings[0], [0] * first, 1)
    together = RoutingSums.of(
        routings[0], torch.tensor(groups[0]), num_groups=3, coactivation=True
    ).together()
    require_same(together, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_without_groups_there_is_one(kind: str) -> None:
    routing = routed(kind, 15, 3)
    expected = written_out(routing, [0] * 15, 1)
    del expected["coactivation"]
    require_same(RoutingSums.of(routing), expected)


def test_some_groups_only() -> None:
    sums = RoutingSums.of(routed("native", 20, 1), torch.arange(20) % 4, num_groups=4)
    chosen = sums.of_groups(torch.tensor([3, 1]))
    for name, value in sums.tensors().items():
        assert chosen.tensors()[name].equal(value[[3, 1]])


@pytest.mark.parametrize("coactivation", [True, False])
def test_sums_survive_as_plain_types_to_the_last_bit(coactivation: bool) -> None:
    groups = torch.arange(20) % 3
    sums = RoutingSums.of(routed("gshard", 20, 1), groups, num_groups=3, coactivation=coactivation)
    again = RoutingSums.from_state(sums.state_dict())
    assert again.tensors().keys() == sums.tensors().keys()
    for name, value in sums.tensors().items():
        assert torch.equal(again.tensors()[name], value), name


def test_what_stands_in_padding_does_not_matter() -> None:
    routing = routed("native", 20, 1)
    assert not routing.valid.all()
    before = RoutingSums.of(routing)
    routing.logits[~routing.valid] = float("nan")
    for name, value in RoutingSums.of(routing).tensors().items():
        assert torch.equal(value, before.tensors()[name]), name


def test_sums_carry_no_gradient() -> None:
    routing = routed("native", 8, 1)
    routing.logits.requires_grad_()
    assert not any(value.requires_grad for value in RoutingSums.of(routing).tensors().values())


class _Counted(TorchDispatchMode):
    """Counts what would start work on an accelerator: everything but views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_small_operations_of_a_layer_are_few() -> None:
    routing, groups = routed("native", 64, 1), torch.arange(64) % 3
    with _Counted() as counted:
        RoutingSums.of(routing, groups, num_groups=3)
    assert len(counted.names) <= 34, counted.names
