"""The four scopes on random routing, and what each of them promises."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.models.blocks import moe_blocks
from flanmoe.moe.losses import balance_loss, sequence_balance_loss, z_loss
from flanmoe.moe.routing import Routing
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.training.router_losses import (
    GlobalScope,
    LaggedScope,
    MicroBatchScope,
    RouterLossConfig,
    SequenceScope,
    balance_scope,
    router_losses,
)
from flanmoe.training.rows import StepTotals


def routing(num_tokens: int, num_experts: int, k: int, *, seed: int) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    gates, expert_ids = logits.softmax(dim=1).topk(k)
    valid = torch.rand(num_tokens, generator=generator) < 0.8
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


def summed(scope: Any, parts: list[Routing]) -> float:
    totals = totals_of(parts)
    return float(sum(scope.share(0, part, totals) for part in parts))


@given(parts=steps())
def test_global_equals_the_loss_of_the_step_as_one_batch(parts: list[Routing]) -> None:
    scope = GlobalScope()
    scope.start_step([joined(parts).expert_counts()], totals_of(parts))
    assert summed(scope, parts) == pytest.approx(float(balance_loss(joined(parts))), abs=1e-12)


@given(parts=steps())
def test_sequence_equals_the_loss_of_the_step_as_one_batch(parts: list[Routing]) -> None:
    expected = float(sequence_balance_loss(joined(parts)))
    assert summed(SequenceScope(), parts) == pytest.approx(expected, abs=1e-12)


@given(parts=steps())
def test_micro_batch_is_the_mean_of_their_own_losses(parts: list[Routing]) -> None:
    expected = sum(float(balance_loss(part)) for part in parts) / len(parts)
    assert summed(MicroBatchScope(), parts) == pytest.approx(expected, abs=1e-12)


@given(parts=steps(), before=steps())
def test_lagged_sets_the_last_counts_against_the_new_probabilities(
    parts: list[Routing], before: list[Routing]
) -> None:
    num_experts = parts[0].num_experts
    before = [routing(6, num_experts, 1, seed=1), routing(5, num_experts, 1, seed=2)]
    scope = LaggedScope([num_experts], [1])
    # At first: even use, which makes the loss k whatever the probabilities.
    assert summed(scope, parts) == pytest.approx(
        1.0 if any(part.valid.any() for part in parts) else 0.0, abs=1e-12
    )
    scope.finish_step([joined(before).expert_counts()], totals_of(before))
    fractions = joined(before).expert_counts() / totals_of(before).real_tokens
    expected = float(balance_loss(joined(parts), fractions=fractions.double()))
    assert summed(scope, parts) == pytest.approx(expected, abs=1e-6)
    restored = LaggedScope([num_experts], [1])
    restored.load_state_dict(scope.state_dict())
    assert summed(restored, parts) == summed(scope, parts)


@given(parts=steps())
def test_z_losses_of_micro_batches_add_up(parts: list[Routing]) -> None:
    totals = totals_of(parts)
    scope = SequenceScope()
    values = [router_losses([part], scope=scope, totals=totals).z.sum() for part in parts]
    assert (
        float(sum(values))
        == pytest.approx(
            float(z_loss(joined(parts), num_tokens=max(totals.real_tokens, 1))), abs=1e-12
        )
        or totals.real_tokens == 0
    )


def test_collapse_onto_different_experts_in_each_layer_is_seen() -> None:
    # Pooling the layers first, as transformers does, would score this as perfectly balanced.
    layers = []
    for layer in range(4):
        logits = torch.full((8, 4), -50.0)
        logits[:, layer] = 50.0
        gates, expert_ids = logits.softmax(dim=1).topk(1)
        layers.append(Routing.from_top_k(logits, expert_ids, gates))
    totals = StepTotals(1, 1, 1, 8, 0, 8)
    losses = router_losses(layers, scope=MicroBatchScope(), totals=totals)
    assert losses.balance.tolist() == pytest.approx([4.0] * 4)
    config = RouterLossConfig(balance_coefficient=0.5, z_coefficient=0.0)
    assert float(losses.weighted(config)) == pytest.approx(2.0)


def test_weighting_takes_the_mean_over_layers() -> None:
    layers = [routing(6, 4, 2, seed=1), routing(6, 4, 2, seed=2)]
    totals = StepTotals(1, 1, 2, 6, 0, 6)
    losses = router_losses(layers, scope=MicroBatchScope(), totals=totals)
    config = RouterLossConfig(balance_coefficient=0.3, z_coefficient=0.7)
    expected = 0.3 * float(losses.balance.sum()) / 2 + 0.7 * float(losses.z.sum()) / 2
    assert float(losses.weighted(config)) == pytest.approx(expected)


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
    scope = balance_scope(RouterLossConfig.parse({"scope": name}), blocks)
    assert type(scope) is kind
    assert scope.needs_counts == (name == "global")
    off = RouterLossConfig.parse({"scope": name, "balance_coefficient": 0})
    assert type(balance_scope(off, blocks)) is MicroBatchScope


def test_router_losses_are_off_without_coefficients() -> None:
    assert RouterLossConfig().is_on
    assert RouterLossConfig(balance_coefficient=0).is_on
    assert not RouterLossConfig(balance_coefficient=0, z_coefficient=0).is_on
