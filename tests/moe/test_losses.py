"""Router losses against a worked example, sums written out, and their invariants."""

import dataclasses
import math
import statistics
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flanmoe.moe.losses import (
    CONVENTIONS,
    ConventionName,
    Counting,
    balance_loss,
    importance_loss,
    router_probabilities,
    sequence_balance_loss,
    sequence_importance_loss,
    z_loss,
)
from flanmoe.moe.routing import Choices, Routing

# Six tokens, three experts: the worked example of routers/test_worked_example.py.
LOGITS = torch.tensor(
    [[2, 1, 0], [2, 0, 1], [3, 0, 0], [0, 2, 1], [1, 0, 0.5], [0, 0, 1]], dtype=torch.float32
)


def top_k(logits: torch.Tensor, k: int, **masks: torch.Tensor) -> Routing:
    """Route by the k largest logits, ties to the lower index."""
    order = logits.detach().sort(dim=1, descending=True, stable=True).indices[:, :k]
    gates = router_probabilities(logits).gather(1, order)
    return Routing.from_top_k(logits, order, gates, **masks)


# Every loss of one layer, each way of counting for itself.
LOSSES = {
    "balance": balance_loss,
    "balance_first": partial(balance_loss, counting="first"),
    "sequence_balance": sequence_balance_loss,
    "sequence_balance_first": partial(sequence_balance_loss, counting="first"),
    "importance": importance_loss,
    "sequence_importance": sequence_importance_loss,
    "z": z_loss,
}
COUNTINGS = pytest.mark.parametrize("counting", ["any", "first"])


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    """Random logits, padding and examples in float64, so that the order of sums does not matter.

    Some later choices were given up, and some of what was asked for was dropped.
    """
    num_tokens, num_experts = draw(st.integers(1, 12)), draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = 3 * torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    valid = torch.tensor(draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens)))
    numbers = st.lists(st.integers(0, 3), min_size=num_tokens, max_size=num_tokens)
    k = draw(st.integers(1, num_experts))
    routing = top_k(logits, k, valid=valid, segments=torch.tensor(draw(numbers)))
    stands = torch.rand(num_tokens, k, generator=generator) < 0.8
    stands[:, 0] = True
    asked = routing.choices.asked & stands
    kept = torch.rand(num_tokens, k, generator=generator) < 0.7
    listed = (asked & kept)[routing.choices.asked]
    return dataclasses.replace(
        routing,
        token_ids=routing.token_ids[listed],
        expert_ids=routing.expert_ids[listed],
        gates=routing.gates[listed],
        choices=Choices(routing.choices.expert_ids, asked),
    )


def balance_of(routing: Routing, tokens: list[int], counting: Counting = "any") -> float:
    """The definition, term by term, over some of the tokens."""
    if not tokens:
        return 0.0
    total = 0.0
    for expert in range(routing.num_experts):
        chosen = sum(1 for token in tokens if expert in asked_for(routing, token, counting))
        mean = sum(probability(routing, token, expert) for token in tokens) / len(tokens)
        total += chosen / len(tokens) * mean
    return routing.num_experts * total


def asked_for(routing: Routing, token: int, counting: Counting) -> list[int]:
    """The experts that a token asked for, whether it got them or not."""
    rows = routing.choices.expert_ids[token].tolist(), routing.choices.asked[token].tolist()
    pairs = list(zip(*rows, strict=True))
    return [expert for expert, asked in (pairs if counting == "any" else pairs[:1]) if asked]


def importance_of(routing: Routing, tokens: list[int]) -> float:
    """Squared coefficient of variation of the summed probabilities."""
    if not tokens:
        return 0.0
    sums = [
        sum(probability(routing, token, expert) for token in tokens)
        for expert in range(routing.num_experts)
    ]
    return statistics.pvariance(sums) / statistics.mean(sums) ** 2


def examples_of(routing: Routing) -> list[list[int]]:
    """The valid tokens of each example that has any."""
    valid = valid_tokens(routing)
    numbers = {routing.segments[token].item() for token in valid}
    return [[t for t in valid if routing.segments[t] == number] for number in numbers]


def probability(routing: Routing, token: int, expert: int) -> float:
    exponentials = [math.exp(value) for value in routing.logits[token].tolist()]
    return exponentials[expert] / sum(exponentials)


def valid_tokens(routing: Routing) -> list[int]:
    return [token for token in range(routing.num_tokens) if routing.valid[token]]


@COUNTINGS
@given(routing=routings())
def test_balance_loss_equals_the_written_out_sum(counting: Counting, routing: Routing) -> None:
    expected = balance_of(routing, valid_tokens(routing), counting)
    found = balance_loss(routing, counting=counting).item()
    assert found == pytest.approx(expected, abs=1e-12)


@COUNTINGS
@given(routing=routings())
def test_sequence_balance_loss_equals_the_written_out_mean(
    counting: Counting, routing: Routing
) -> None:
    losses = [balance_of(routing, tokens, counting) for tokens in examples_of(routing)]
    expected = sum(losses) / len(losses) if losses else 0.0
    found = sequence_balance_loss(routing, counting=counting).item()
    assert found == pytest.approx(expected, abs=1e-12)


@given(routing=routings())
def test_importance_loss_equals_the_written_out_variation(routing: Routing) -> None:
    expected = importance_of(routing, valid_tokens(routing))
    assert importance_loss(routing).item() == pytest.approx(expected, abs=1e-12)


@given(routing=routings())
def test_sequence_importance_loss_equals_the_written_out_mean(routing: Routing) -> None:
    losses = [importance_of(routing, tokens) for tokens in examples_of(routing)]
    expected = sum(losses) / len(losses) if losses else 0.0
    assert sequence_importance_loss(routing).item() == pytest.approx(expected, abs=1e-12)


def test_importance_of_the_worked_example() -> None:
    # 3 (.508063^2 + .240591^2 + .251346^2) - 1
    assert importance_loss(top_k(LOGITS, 1)).item() == pytest.approx(0.137560, abs=2e-6)


def test_importance_runs_from_0_to_one_less_than_the_experts() -> None:
    even, collapsed = torch.zeros(5, 8), torch.zeros(5, 8)
    collapsed[:, 3] = 100.0
    for loss in (importance_loss, sequence_importance_loss):
        assert loss(top_k(even, 1)).item() == pytest.approx(0.0, abs=1e-6)
        assert loss(top_k(collapsed, 1)).item() == pytest.approx(7.0, abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=25)
@given(routing=routings())
def test_what_was_dropped_counts_all_the_same(name: str, routing: Routing) -> None:
    nothing = torch.zeros(0, dtype=torch.long)
    dropped = dataclasses.replace(
        routing, token_ids=nothing, expert_ids=nothing, gates=routing.gates[:0]
    )
    assert torch.equal(LOSSES[name](dropped), LOSSES[name](routing))


@pytest.mark.parametrize("name", [name for name in LOSSES if "balance" in name])
@given(routing=routings())
def test_where_experts_choose_there_is_nothing_to_balance(name: str, routing: Routing) -> None:
    logits = routing.logits.clone().requires_grad_()
    nobody = Choices.none(routing.num_tokens, logits.device)
    loss = LOSSES[name](dataclasses.replace(routing, logits=logits, choices=nobody))
    assert loss.item() == 0.0
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient.any()


@given(routing=routings())
def test_z_loss_equals_the_written_out_mean(routing: Routing) -> None:
    valid = valid_tokens(routing)
    squares = [
        math.log(sum(math.exp(value) for value in routing.logits[token].tolist())) ** 2
        for token in valid
    ]
    expected = sum(squares) / len(squares) if squares else 0.0
    assert z_loss(routing).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=25)
@given(routing=routings(), seed=st.integers(0, 1000))
def test_renaming_experts_changes_no_loss(name: str, routing: Routing, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(routing.num_experts, generator=generator)
    new_ids = order.argsort()
    renamed = dataclasses.replace(
        routing,
        expert_ids=new_ids[routing.expert_ids],
        logits=routing.logits[:, order],
        choices=Choices(new_ids[routing.choices.expert_ids], routing.choices.asked),
    )
    loss = LOSSES[name]
    torch.testing.assert_close(loss(renamed), loss(routing), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=25)
@given(routing=routings(), num_padding=st.integers(1, 5))
def test_padding_changes_no_loss(name: str, routing: Routing, num_padding: int) -> None:
    # Not finite on purpose: what a router says about padding must not even be multiplied by 0.
    noise = torch.full((num_padding, routing.num_experts), float("inf"), dtype=torch.float64)
    ids = routing.choices.expert_ids
    unasked = torch.zeros(num_padding, ids.shape[1], dtype=torch.bool)
    padded = dataclasses.replace(
        routing,
        logits=torch.cat([routing.logits, noise]).requires_grad_(),
        valid=torch.cat([routing.valid, torch.zeros(num_padding, dtype=torch.bool)]),
        segments=torch.cat([routing.segments, torch.full((num_padding,), 99)]),
        choices=Choices(
            torch.cat([ids, ids[:1].expand(num_padding, -1)]),
            torch.cat([routing.choices.asked, unasked]),
        ),
    )
    value = LOSSES[name](padded)
    torch.testing.assert_close(value.detach(), LOSSES[name](routing), atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(value, padded.logits)
    assert gradient.isfinite().all()
    assert not gradient[-num_padding:].any()


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_balanced_value_is_the_number_of_choices(k: int) -> None:
    # Each expert is chosen equally often, and on average all are equally likely.
    logits = torch.stack([torch.eye(4)[[i, *others]].sum(0) for i, others in _rounds(k)])
    routing = top_k(5 * logits, k)
    assert routing.expert_counts().unique().numel() == 1
    assert balance_loss(routing).item() == pytest.approx(k, abs=1e-5)


def _rounds(k: int) -> list[tuple[int, list[int]]]:
    return [(i, [(i + step) % 4 for step in range(1, k)]) for i in range(4)]


@pytest.mark.parametrize("k", [1, 2])
def test_a_collapsed_layer_scores_the_number_of_experts(k: int) -> None:
    logits = torch.zeros(10, 8)
    logits[:, :k] = 100.0
    assert balance_loss(top_k(logits, k)).item() == pytest.approx(8.0, abs=1e-4)


@given(routing=routings())
def test_the_gradient_of_the_balance_loss_is_that_of_the_mean_probability(routing: Routing) -> None:
    valid = valid_tokens(routing)
    if not valid:
        return
    logits = routing.logits.clone().requires_grad_()
    live = dataclasses.replace(routing, logits=logits)
    (gradient,) = torch.autograd.grad(balance_loss(live), logits)
    fractions = fractions_of(routing, "any")
    for token in valid:
        p = torch.tensor([probability(routing, token, e) for e in range(routing.num_experts)])
        p = p.double()
        # d/dz_j of E sum_e f_e p_e / T = E / T * p_j (f_j - sum_e f_e p_e), f held fixed.
        expected = routing.num_experts / len(valid) * p * (fractions - (fractions * p).sum())
        torch.testing.assert_close(gradient[token], expected, atol=1e-6, rtol=0)


def test_fractions_of_the_caller_get_no_gradient() -> None:
    fractions = torch.full((3,), 1 / 3, requires_grad=True)
    logits = LOGITS.clone().requires_grad_()
    balance_loss(top_k(logits, 1), fractions=fractions).backward()
    assert fractions.grad is None
    assert logits.grad is not None


def fractions_of(routing: Routing, counting: Counting) -> torch.Tensor:
    """Requests of each expert per valid token."""
    counts = [0] * routing.num_experts
    valid = valid_tokens(routing)
    for token in valid:
        for expert in asked_for(routing, token, counting):
            counts[expert] += 1
    return torch.tensor(counts, dtype=torch.float64) / max(len(valid), 1)


def means_of(routing: Routing) -> torch.Tensor:
    """Mean router probability of each expert over valid tokens."""
    valid = valid_tokens(routing)
    sums = [
        sum(probability(routing, token, expert) for token in valid)
        for expert in range(routing.num_experts)
    ]
    return torch.tensor(sums, dtype=torch.float64) / max(len(valid), 1)


@COUNTINGS
@given(routing=routings(), cut=st.integers(0, 12))
def test_losses_of_parts_add_up_with_the_totals_of_the_whole(
    counting: Counting, routing: Routing, cut: int
) -> None:
    total = max(len(valid_tokens(routing)), 1)
    fractions = fractions_of(routing, counting)
    for whole, part in (
        (
            partial(balance_loss, counting=counting),
            partial(balance_loss, counting=counting, fractions=fractions, num_tokens=total),
        ),
        (importance_loss, partial(importance_loss, means=means_of(routing), num_tokens=total)),
        (z_loss, partial(z_loss, num_tokens=total)),
    ):
        assert_parts_add_up(routing, cut, whole, part)


@COUNTINGS
@given(routing=routings(), cut=st.integers(0, 12))
def test_sequence_losses_add_up_over_micro_batches_of_whole_examples(
    counting: Counting, routing: Routing, cut: int
) -> None:
    order = routing.segments.argsort(stable=True)
    routing = _reordered(routing, order)
    # Examples are not cut: go back to the first token of the example at the cut.
    starts = [
        t for t in range(1, routing.num_tokens) if routing.segments[t - 1] != routing.segments[t]
    ]
    cut = max((start for start in starts if start <= cut), default=0)
    number = max(len(examples_of(routing)), 1)
    balance = partial(sequence_balance_loss, counting=counting)
    for loss in (balance, sequence_importance_loss):
        assert_parts_add_up(routing, cut, loss, partial(loss, num_sequences=number))


def assert_parts_add_up(routing: Routing, cut: int, whole: Any, part: Any) -> None:
    """Values and gradients of two micro-batches add up to those of their step."""
    logits = routing.logits.clone().requires_grad_()
    live = dataclasses.replace(routing, logits=logits)
    cut = min(cut, routing.num_tokens)
    added = part(_part(live, slice(0, cut))) + part(_part(live, slice(cut, None)))
    expected = whole(live)
    torch.testing.assert_close(added, expected, atol=1e-12, rtol=0)
    (found,) = torch.autograd.grad(added, logits)
    (gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(found, gradient, atol=1e-12, rtol=0)


def test_without_the_means_of_the_step_importance_does_not_add_up() -> None:
    # Two micro-batches that collapse onto different experts are even together.
    routing = top_k(torch.tensor([[100.0, 0.0], [0.0, 100.0]]), 1)
    parts = [_part(routing, slice(0, 1)), _part(routing, slice(1, None))]
    assert importance_loss(routing).item() == pytest.approx(0.0, abs=1e-6)
    assert [importance_loss(part).item() for part in parts] == pytest.approx([1.0, 1.0])
    means = torch.full((2,), 0.5)
    tangents = [importance_loss(part, means=means, num_tokens=2).item() for part in parts]
    assert sum(tangents) == pytest.approx(0.0, abs=1e-6)


def test_means_of_the_caller_get_no_gradient() -> None:
    means = torch.full((3,), 1 / 3, requires_grad=True)
    logits = LOGITS.clone().requires_grad_()
    importance_loss(top_k(logits, 1), means=means, num_tokens=6).backward()
    assert means.grad is None
    assert logits.grad is not None


def _part(routing: Routing, tokens: slice) -> Routing:
    return _reordered(routing, torch.arange(routing.num_tokens)[tokens])


def _reordered(routing: Routing, tokens: torch.Tensor) -> Routing:
    """The routing of some of the tokens, in the order given, with nothing kept."""
    choices = Choices(routing.choices.expert_ids[tokens], routing.choices.asked[tokens])
    nothing = torch.zeros(0, dtype=torch.long)
    return Routing(
        token_ids=nothing,
        expert_ids=nothing,
        gates=routing.gates[:0],
        logits=routing.logits[tokens],
        valid=routing.valid[tokens],
        segments=routing.segments[tokens],
        choices=choices,
    )


def test_half_precision_logits_are_raised_and_double_stays() -> None:
    assert router_probabilities(LOGITS.bfloat16()).dtype == torch.float32
    for name, loss in LOSSES.items():
        assert loss(top_k(LOGITS.bfloat16(), 1)).dtype == torch.float32, name
        assert loss(top_k(LOGITS.double(), 2)).dtype == torch.float64, name


def test_a_batch_of_padding_alone_adds_nothing() -> None:
    logits = LOGITS.clone().requires_grad_()
    routing = top_k(logits, 2, valid=torch.zeros(6, dtype=torch.bool))
    for name, loss in LOSSES.items():
        assert loss(routing).item() == 0.0, name
        (gradient,) = torch.autograd.grad(loss(routing), logits)
        assert not gradient.any(), name


# Research note 01, sections 6.5 and 6.6.
def weighted(
    layers: list[Routing], name: ConventionName, *, balance: float, z: float
) -> torch.Tensor:
    """What coefficients of a code base add to the training loss."""
    rules = CONVENTIONS[name]
    balances = torch.stack([balance_loss(layer, counting=rules.counting) for layer in layers])
    z_losses = torch.stack([z_loss(layer) for layer in layers])
    return balance * rules.over_layers(balances) + z * rules.z_factor(balance) * rules.over_layers(
        z_losses
    )


@given(seed=st.integers(0, 1000), num_layers=st.integers(1, 5))
def test_coefficients_of_t5x_carry_over_to_mesh_tf(seed: int, num_layers: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_layers, 9, 4, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    layers = [top_k(layer, 1) for layer in logits.unbind()]
    # A sum over layers instead of their mean, and a z-loss that is multiplied by both coefficients.
    t5x = weighted(layers, "t5x", balance=0.01, z=0.0001)
    mesh_tf = weighted(layers, "mesh_tf", balance=0.01 / num_layers, z=0.0001 / 0.01)
    torch.testing.assert_close(mesh_tf, t5x, rtol=1e-12, atol=0)
    (expected,) = torch.autograd.grad(t5x, logits)
    (found,) = torch.autograd.grad(mesh_tf, logits)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-16)


def test_even_top_2_routing_scores_2_in_t5x_and_hugging_face_and_1_a_layer_in_mesh_tf() -> None:
    even = top_k(torch.stack([torch.eye(4)[[i, (i + 1) % 4]].sum(0) for i in range(4)]), 2)
    # Of the two equal logits the lower index is the first choice: 0, 1, 2 and, of 0 and 3, 0.
    assert even.choices.expert_ids[:, 0].tolist() == [0, 1, 2, 0]
    found = {name: weighted([even] * 3, name, balance=1.0, z=0.0).item() for name in CONVENTIONS}
    expected = {"t5x": 2.0, "mesh_tf": 3.0, "huggingface": 2.0}
    assert found == pytest.approx(expected, abs=1e-6)


def test_layers_that_collapse_onto_different_experts_do_not_look_balanced() -> None:
    layers = [top_k(100 * torch.eye(4)[[expert] * 5], 1) for expert in range(4)]
    # Pooled first, as transformers does, they would score 1.
    assert weighted(layers, "huggingface", balance=1.0, z=0.0).item() == pytest.approx(4.0)
