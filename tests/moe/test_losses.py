"""Router losses against a worked example, sums written out, and their invariants."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.moe.losses import (
    balance_loss,
    router_probabilities,
    sequence_balance_loss,
    z_loss,
)
from flanmoe.moe.routing import Routing

# Six tokens, three experts; every value below was computed by hand from these logits.
LOGITS = torch.tensor(
    [[2, 1, 0], [2, 0, 1], [3, 0, 0], [0, 2, 1], [1, 0, 0.5], [0, 0, 1]], dtype=torch.float32
)
LOG_PARTITIONS = [2.407606, 2.407606, 3.094923, 2.407606, 1.680270, 1.551445]
MEAN_PROBABILITIES = [0.508063, 0.240591, 0.251346]
PROBABILITIES = [
    [0.665241, 0.244728, 0.090031],
    [0.665241, 0.090031, 0.244728],
    [0.909443, 0.045279, 0.045279],
    [0.090031, 0.665241, 0.244728],
    [0.506480, 0.186324, 0.307196],
    [0.211942, 0.211942, 0.576117],
]


def top_k(logits: torch.Tensor, k: int, **masks: torch.Tensor) -> Routing:
    """Route by the k largest logits, ties to the lower index."""
    order = logits.detach().sort(dim=1, descending=True, stable=True).indices[:, :k]
    gates = router_probabilities(logits).gather(1, order)
    return Routing.from_top_k(logits, order, gates, **masks)


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    """Random logits, padding and examples in float64, so that the order of sums does not matter."""
    num_tokens, num_experts = draw(st.integers(1, 12)), draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = 3 * torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    valid = torch.tensor(draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens)))
    numbers = st.lists(st.integers(0, 3), min_size=num_tokens, max_size=num_tokens)
    k = draw(st.integers(1, num_experts))
    return top_k(logits, k, valid=valid, segments=torch.tensor(draw(numbers)))


def balance_of(routing: Routing, tokens: list[int]) -> float:
    """The definition, term by term, over some of the tokens."""
    if not tokens:
        return 0.0
    total = 0.0
    for expert in range(routing.num_experts):
        pairs = zip(routing.token_ids.tolist(), routing.expert_ids.tolist(), strict=True)
        chosen = sum(1 for token, choice in pairs if choice == expert and token in tokens)
        mean = sum(probability(routing, token, expert) for token in tokens) / len(tokens)
        total += chosen / len(tokens) * mean
    return routing.num_experts * total


def probability(routing: Routing, token: int, expert: int) -> float:
    exponentials = [math.exp(value) for value in routing.logits[token].tolist()]
    return exponentials[expert] / sum(exponentials)


def valid_tokens(routing: Routing) -> list[int]:
    return [token for token in range(routing.num_tokens) if routing.valid[token]]


def test_probabilities_of_the_worked_example() -> None:
    torch.testing.assert_close(
        router_probabilities(LOGITS), torch.tensor(PROBABILITIES), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        router_probabilities(LOGITS).mean(dim=0),
        torch.tensor(MEAN_PROBABILITIES),
        atol=1e-6,
        rtol=0,
    )


def test_z_loss_of_the_worked_example() -> None:
    assert sum(value**2 for value in LOG_PARTITIONS) / 6 == pytest.approx(5.366422, abs=1e-5)
    assert z_loss(top_k(LOGITS, 1)).item() == pytest.approx(5.366422, abs=1e-5)
    for token, value in enumerate(LOG_PARTITIONS):
        alone = top_k(LOGITS[token : token + 1], 1)
        assert z_loss(alone).item() == pytest.approx(value**2, abs=1e-5)


def test_balance_loss_of_the_worked_example_top_1() -> None:
    routing = top_k(LOGITS, 1)
    assert routing.expert_counts().tolist() == [4, 1, 1]
    assert balance_loss(routing).item() == pytest.approx(1.262094, abs=1e-6)


def test_balance_loss_of_the_worked_example_top_2() -> None:
    routing = top_k(LOGITS, 2)
    assert routing.expert_counts().tolist() == [5, 3, 4]
    assert balance_loss(routing).item() == pytest.approx(2.133736, abs=1e-6)


@given(routing=routings())
def test_balance_loss_equals_the_written_out_sum(routing: Routing) -> None:
    expected = balance_of(routing, valid_tokens(routing))
    assert balance_loss(routing).item() == pytest.approx(expected, abs=1e-12)


@given(routing=routings())
def test_sequence_balance_loss_equals_the_written_out_mean(routing: Routing) -> None:
    valid = valid_tokens(routing)
    examples = {routing.segments[token].item() for token in valid}
    losses = [
        balance_of(routing, [token for token in valid if routing.segments[token] == example])
        for example in examples
    ]
    expected = sum(losses) / len(losses) if losses else 0.0
    assert sequence_balance_loss(routing).item() == pytest.approx(expected, abs=1e-12)


@given(routing=routings())
def test_z_loss_equals_the_written_out_mean(routing: Routing) -> None:
    valid = valid_tokens(routing)
    squares = [
        math.log(sum(math.exp(value) for value in routing.logits[token].tolist())) ** 2
        for token in valid
    ]
    expected = sum(squares) / len(squares) if squares else 0.0
    assert z_loss(routing).item() == pytest.approx(expected, abs=1e-12)


@given(routing=routings(), seed=st.integers(0, 1000))
def test_renaming_experts_changes_no_loss(routing: Routing, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(routing.num_experts, generator=generator)
    renamed = Routing(
        token_ids=routing.token_ids,
        expert_ids=order.argsort()[routing.expert_ids],
        gates=routing.gates,
        logits=routing.logits[:, order],
        valid=routing.valid,
        segments=routing.segments,
    )
    for loss in (balance_loss, sequence_balance_loss, z_loss):
        torch.testing.assert_close(loss(renamed), loss(routing), atol=1e-12, rtol=0)


@given(routing=routings(), num_padding=st.integers(1, 5))
def test_padding_changes_no_loss(routing: Routing, num_padding: int) -> None:
    # Not finite on purpose: what a router says about padding must not even be multiplied by 0.
    noise = torch.full((num_padding, routing.num_experts), float("inf"), dtype=torch.float64)
    padded = Routing(
        token_ids=routing.token_ids,
        expert_ids=routing.expert_ids,
        gates=routing.gates,
        logits=torch.cat([routing.logits, noise]).requires_grad_(),
        valid=torch.cat([routing.valid, torch.zeros(num_padding, dtype=torch.bool)]),
        segments=torch.cat([routing.segments, torch.full((num_padding,), 99)]),
    )
    for loss in (balance_loss, sequence_balance_loss, z_loss):
        value = loss(padded)
        torch.testing.assert_close(value.detach(), loss(routing), atol=1e-12, rtol=0)
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
    live = Routing(
        routing.token_ids,
        routing.expert_ids,
        routing.gates,
        logits,
        routing.valid,
        routing.segments,
    )
    (gradient,) = torch.autograd.grad(balance_loss(live), logits)
    fractions = routing.expert_counts().double() / len(valid)
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


@given(routing=routings(), cut=st.integers(0, 12))
def test_losses_of_parts_add_up_with_the_totals_of_the_whole(routing: Routing, cut: int) -> None:
    cut = min(cut, routing.num_tokens)
    total = max(len(valid_tokens(routing)), 1)
    fractions = routing.expert_counts() / total
    parts = [_part(routing, slice(0, cut)), _part(routing, slice(cut, None))]
    balance = sum(balance_loss(part, fractions=fractions, num_tokens=total) for part in parts)
    z = sum(z_loss(part, num_tokens=total) for part in parts)
    torch.testing.assert_close(balance, balance_loss(routing), atol=1e-6, rtol=0)
    torch.testing.assert_close(z, z_loss(routing), atol=1e-12, rtol=0)


def _part(routing: Routing, tokens: slice) -> Routing:
    inside = torch.zeros(routing.num_tokens, dtype=torch.bool)
    inside[tokens] = True
    kept = inside[routing.token_ids]
    return Routing(
        token_ids=routing.token_ids[kept] - (tokens.start or 0),
        expert_ids=routing.expert_ids[kept],
        gates=routing.gates[kept],
        logits=routing.logits[tokens],
        valid=routing.valid[tokens],
        segments=routing.segments[tokens],
    )


def test_half_precision_logits_are_raised_and_double_stays() -> None:
    assert router_probabilities(LOGITS.bfloat16()).dtype == torch.float32
    assert z_loss(top_k(LOGITS.bfloat16(), 1)).dtype == torch.float32
    for loss in (balance_loss, sequence_balance_loss, z_loss):
        assert loss(top_k(LOGITS.double(), 2)).dtype == torch.float64
