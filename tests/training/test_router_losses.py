"""The four scopes and three conventions on random routing, and what each of them promises."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.core.errors import ConfigError
from flanmoe.models.blocks import moe_blocks
from flanmoe.moe.losses import (
    Counting,
    balance_loss,
    importance_loss,
    sequence_balance_loss,
    sequence_importance_loss,
    z_loss,
)
from flanmoe.moe.routing import Choices, Routing
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.training.router_losses import (
    GlobalScope,
    LaggedScope,
    LayerUse,
    LossWeights,
    MicroBatchScope,
    RouterLossConfig,
    SequenceScope,
    router_losses,
    scope_of,
)
from flanmoe.training.rows import StepTotals

ON = LossWeights(1.0, 1.0, 1.0)


def routing(num_tokens: int, num_experts: int, k: int, *, seed: int) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    gates, expert_ids = logits.softmax(dim=1).topk(k)
    valid = torch.rand(num_tokens, generator=generator) < 0.8
    # A step without a real token has no loss; the trainer refuses it.
    valid[0] = True
    segments = torch.arange(num_tokens) // 3
    return Routing.from_top_k(logits, expert_ids, gates, valid=valid, segments=segments)


def joined(parts: list[Routing]) -> Routing:
    """One routing over the tokens of several."""
    token_ids, segments, tokens, examples = [], [], 0, 0
    for part in parts:
        token_ids.append(part.token_ids + tokens)
        segments.append(part.segments + examples)
        tokens += part.num_tokens
        examples += int(part.segments.max()) + 1
    return Routing(
        token_ids=torch.cat(token_ids),
        expert_ids=torch.cat([part.expert_ids for part in parts]),
        gates=torch.cat([part.gates for part in parts]),
        logits=torch.cat([part.logits for part in parts]),
        valid=torch.cat([part.valid for part in parts]),
        segments=torch.cat(segments),
        choices=Choices(
            torch.cat([part.choices.expert_ids for part in parts]),
            torch.cat([part.choices.asked for part in parts]),
        ),
    )


def totals_of(parts: list[Routing]) -> StepTotals:
    real = sum(int(part.valid.sum()) for part in parts)
    whole = joined(parts)
    return StepTotals(
        rows=len(parts),
        micro_batches=len(parts),
        examples=len(whole.segments[whole.valid].unique()),
        real_tokens=real,
        padding_tokens=whole.num_tokens - real,
        loss_tokens=real,
    )


@st.composite
def steps(draw: st.DrawFn) -> list[Routing]:
    """The micro-batches of a step, through one layer."""
    num_experts = draw(st.integers(2, 5))
    k = draw(st.integers(1, num_experts))
    sizes = draw(st.lists(st.integers(4, 9), min_size=1, max_size=4))
    seed = draw(st.integers(0, 10_000))
    return [routing(size, num_experts, k, seed=seed + number) for number, size in enumerate(sizes)]


COUNTINGS: tuple[Counting, ...] = ("any", "first")
both_countings = pytest.mark.parametrize("counting", COUNTINGS)


def summed(scope: Any, parts: list[Routing], loss: str = "balance") -> float:
    totals = totals_of(parts)
    return float(sum(getattr(scope, loss)(0, part, totals) for part in parts))


def started(parts: list[Routing], counting: Counting = "any") -> GlobalScope:
    scope = GlobalScope()
    use = [LayerUse.of(part, counting) for part in parts]
    scope.start_step([sum(use[1:], start=use[0])], totals_of(parts))
    return scope


@both_countings
@given(parts=steps())
def test_global_equals_the_loss_of_the_step_as_one_batch(
    counting: Counting, parts: list[Routing]
) -> None:
    scope, whole = started(parts, counting), joined(parts)
    balance = float(balance_loss(whole, counting=counting))
    assert summed(scope, parts) == pytest.approx(balance, abs=1e-12)
    importance = float(importance_loss(whole))
    assert summed(scope, parts, "importance") == pytest.approx(importance, abs=1e-12)


@both_countings
@given(parts=steps())
def test_sequence_equals_the_loss_of_the_step_as_one_batch(
    counting: Counting, parts: list[Routing]
) -> None:
    scope, whole = SequenceScope(counting), joined(parts)
    balance = float(sequence_balance_loss(whole, counting=counting))
    assert summed(scope, parts) == pytest.approx(balance, abs=1e-12)
    importance = float(sequence_importance_loss(whole))
    assert summed(scope, parts, "importance") == pytest.approx(importance, abs=1e-12)


@both_countings
@given(parts=steps())
def test_micro_batch_is_the_mean_of_their_own_losses(
    counting: Counting, parts: list[Routing]
) -> None:
    scope = MicroBatchScope(counting)
    balance = sum(float(balance_loss(part, counting=counting)) for part in parts) / len(parts)
    assert summed(scope, parts) == pytest.approx(balance, abs=1e-12)
    importance = sum(float(importance_loss(part)) for part in parts) / len(parts)
    assert summed(scope, parts, "importance") == pytest.approx(importance, abs=1e-12)


@given(parts=steps())
def test_gradients_of_the_global_importance_loss_are_those_of_one_batch(
    parts: list[Routing],
) -> None:
    for part in parts:
        part.logits.requires_grad_()
    whole = joined(parts)
    (expected,) = torch.autograd.grad(importance_loss(whole), whole.logits)
    scope, totals = started(parts), totals_of(parts)
    loss = torch.stack([scope.importance(0, part, totals) for part in parts]).sum()
    found = torch.autograd.grad(loss, [part.logits for part in parts])
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-12, rtol=1e-9)


@given(parts=steps())
def test_lagged_sets_the_last_use_against_the_new_probabilities(parts: list[Routing]) -> None:
    num_experts = parts[0].num_experts
    before = [routing(6, num_experts, 1, seed=1), routing(5, num_experts, 1, seed=2)]
    scope = LaggedScope([num_experts], [1])
    # At first: even use, which makes the balance loss k and the importance loss 0 whatever the
    # probabilities.
    assert summed(scope, parts) == pytest.approx(1.0, abs=1e-12)
    assert summed(scope, parts, "importance") == pytest.approx(0.0, abs=1e-12)
    use = [LayerUse.of(part, "any") for part in before]
    scope.finish_step([use[0] + use[1]], totals_of(before))
    fractions = joined(before).expert_counts() / totals_of(before).real_tokens
    expected = float(balance_loss(joined(parts), fractions=fractions.double()))
    assert summed(scope, parts) == pytest.approx(expected, abs=1e-6)
    whole = joined(before)
    means = whole.logits[whole.valid].softmax(dim=1).mean(dim=0)
    tangent = importance_loss(joined(parts), means=means)
    assert summed(scope, parts, "importance") == pytest.approx(float(tangent), abs=1e-9)
    restored = LaggedScope([num_experts], [1])
    restored.load_state_dict(json.loads(json.dumps(scope.state_dict())))
    for loss in ("balance", "importance"):
        assert summed(restored, parts, loss) == summed(scope, parts, loss)


@given(parts=steps())
def test_z_losses_of_micro_batches_add_up(parts: list[Routing]) -> None:
    totals, scope = totals_of(parts), SequenceScope("any")
    losses = [router_losses([part], scope=scope, totals=totals, weights=ON) for part in parts]
    found = float(sum(loss.z.sum() for loss in losses))
    assert found == pytest.approx(float(z_loss(joined(parts))), abs=1e-12)


def test_a_loss_with_weight_0_is_a_reading_without_a_gradient() -> None:
    part = routing(6, 4, 2, seed=1)
    part.logits.requires_grad_()
    scope, totals = MicroBatchScope("any"), totals_of([part])
    off = router_losses([part], scope=scope, totals=totals, weights=LossWeights(1.0, 0.0, 0.0))
    on = router_losses([part], scope=scope, totals=totals, weights=ON)
    assert [value.requires_grad for value in (off.balance, off.importance, off.z)] == [
        True,
        False,
        False,
    ]
    assert (off.importance, off.z) == (on.importance, on.z)


def test_collapse_onto_different_experts_in_each_layer_is_seen() -> None:
    # Pooling the layers first, as transformers does, would score this as perfectly balanced.
    layers = []
    for layer in range(4):
        logits = torch.full((8, 4), -50.0)
        logits[:, layer] = 50.0
        gates, expert_ids = logits.softmax(dim=1).topk(1)
        layers.append(Routing.from_top_k(logits, expert_ids, gates))
    totals = StepTotals(1, 1, 1, 8, 0, 8)
    losses = router_losses(layers, scope=MicroBatchScope("any"), totals=totals, weights=ON)
    assert losses.balance.tolist() == pytest.approx([4.0] * 4)
    config = RouterLossConfig(balance_coefficient=0.5, z_coefficient=0.0)
    assert float(losses.total(config)) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("convention", "over", "z_factor"),
    [("t5x", 1 / 2, 1.0), ("huggingface", 1 / 2, 1.0), ("mesh_tf", 1.0, 0.3)],
)
def test_a_convention_says_what_a_coefficient_multiplies(
    convention: str, over: float, z_factor: float
) -> None:
    layers = [routing(6, 4, 2, seed=1), routing(6, 4, 2, seed=2)]
    totals = StepTotals(1, 1, 2, 6, 0, 6)
    config = RouterLossConfig.parse(
        {
            "balance_coefficient": 0.3,
            "importance_coefficient": 0.2,
            "z_coefficient": 0.7,
            "convention": convention,
            "scope": "micro_batch",
        }
    )
    losses = router_losses(
        layers, scope=scope_of(config, []), totals=totals, weights=config.weights
    )
    counting: Counting = "first" if convention == "mesh_tf" else "any"
    expected = sum(
        0.3 * float(balance_loss(layer, counting=counting))
        + 0.2 * float(importance_loss(layer))
        + z_factor * 0.7 * float(z_loss(layer, num_tokens=6))
        for layer in layers
    )
    assert float(losses.total(config)) == pytest.approx(over * expected)
    assert sum(float(value) for value in losses.weighted(config).values()) == pytest.approx(
        over * expected
    )


def test_an_unknown_convention_is_refused_by_name() -> None:
    with pytest.raises(ConfigError) as caught:
        RouterLossConfig.parse({"convention": "t5"}, origin="recipe.yaml")
    assert "convention" in str(caught.value)
    for known in ("t5x", "mesh_tf", "huggingface"):
        assert known in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sequence", SequenceScope),
        ("global", GlobalScope),
        ("lagged", LaggedScope),
        ("micro_batch", MicroBatchScope),
    ],
)
def test_scopes_by_name(name: str, kind: type) -> None:
    blocks = moe_blocks(tiny_model("mixtral"))
    scope = scope_of(RouterLossConfig.parse({"scope": name}), blocks)
    assert type(scope) is kind
    assert scope.needs_use == (name == "global")
    assert scope.keeps_use == (name == "lagged")
    off = RouterLossConfig.parse({"scope": name, "balance_coefficient": 0})
    assert type(scope_of(off, blocks)) is MicroBatchScope
    importance = RouterLossConfig.parse(
        {"scope": name, "balance_coefficient": 0, "importance_coefficient": 0.1}
    )
    assert type(scope_of(importance, blocks)) is kind


def test_router_losses_are_off_without_coefficients() -> None:
    assert RouterLossConfig().is_on
    assert RouterLossConfig(balance_coefficient=0).is_on
    assert RouterLossConfig(
        balance_coefficient=0, z_coefficient=0, importance_coefficient=0.1
    ).is_on
    # Mesh-TF multiplies the z-loss with the balance coefficient too.
    assert not RouterLossConfig(balance_coefficient=0, convention="mesh_tf").is_on
    assert not RouterLossConfig(balance_coefficient=0, z_coefficient=0).is_on
