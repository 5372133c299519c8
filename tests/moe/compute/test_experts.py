"""The fast expert compute against the sum that defines it: values, gradients, drops, autocast."""

import dataclasses
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from flanmoe.moe.compute import (
    FusedExperts,
    Gated,
    Plain,
    expert_ffn,
    expert_ffn_reference,
    gated,
    work,
)


def _interleaved(product: Tensor) -> Tensor:
    """Gate and up in turn, limited, with a slope: the form of gpt-oss."""
    gate, up = product[..., ::2].clamp(max=1.5), product[..., 1::2].clamp(-1.5, 1.5)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


# What is between the products, and how many times the expert width the first product has.
_COMBINES = {
    "silu": (Gated("silu"), 2),
    "gelu": (Gated("gelu"), 2),
    "gelu_tanh": (Gated("gelu_tanh"), 2),
    "relu": (Plain("relu"), 1),
    "plain gelu": (Plain("gelu"), 1),
    "interleaved": (_interleaved, 2),
    "squared": (lambda product: F.relu(product).square(), 1),
}


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, FusedExperts]:
    """Float64 inputs; expert ids of `num_experts` are dropped assignments."""
    combine, factor = _COMBINES[draw(st.sampled_from(sorted(_COMBINES)))]
    transposed = draw(st.booleans())
    num_tokens = draw(st.integers(0, 9))
    num_experts = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, num_experts))
    hidden_size, width = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    used = draw(st.integers(1, num_experts + 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    def matrices(*shape: int) -> Tensor:
        if not transposed:
            return normal(*shape)
        return normal(shape[0], shape[2], shape[1]).transpose(1, 2)

    biased = draw(st.booleans())
    experts = FusedExperts(
        gate_up=matrices(num_experts, factor * width, hidden_size),
        down=matrices(num_experts, hidden_size, width),
        combine=combine,
        gate_up_bias=normal(num_experts, factor * width) if biased else None,
        down_bias=normal(num_experts, hidden_size) if biased else None,
        output_norm=torch.tanh if draw(st.booleans()) else None,
    )
    expert_ids = torch.randint(used, (num_tokens, top_k), generator=generator)
    if draw(st.booleans()):
        expert_ids = expert_ids + (num_experts + 1 - used)
    hidden = (
        normal(num_tokens, 2 * hidden_size)[:, ::2]
        if transposed
        else normal(num_tokens, hidden_size)
    )
    return hidden, expert_ids, normal(num_tokens, top_k), experts


def _leaves(hidden: Tensor, gates: Tensor, experts: FusedExperts) -> list[Tensor]:
    tensors = (
        hidden,
        gates,
        experts.gate_up,
        experts.down,
        experts.gate_up_bias,
        experts.down_bias,
    )
    return [tensor for tensor in tensors if tensor is not None]


def _gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    loss = (output * weights).sum()
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


@given(cases(), st.sampled_from([1, 64, 2**22]))
def test_equals_the_written_out_sum_and_its_gradients(case: tuple, run_bytes: int) -> None:
    hidden, expert_ids, gates, experts = case
    # From every expert by itself to all of them in one run.
    with mock.patch.object(work, "_RUN_BYTES", run_bytes):
        fast = expert_ffn(hidden, expert_ids, gates, experts)
        slow = expert_ffn_reference(hidden, expert_ids, gates, experts)
        torch.testing.assert_close(fast, slow)
        if not slow.requires_grad:  # no token, or every assignment dropped
            return
        leaves = _leaves(hidden, gates, experts)
        for found, expected in zip(_gradients(fast, leaves), _gradients(slow, leaves), strict=True):
            torch.testing.assert_close(found, expected)


def _random_case(*, num_tokens: int = 64, dtype: torch.dtype = torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(0)
    experts = FusedExperts(
        gate_up=torch.randn(4, 12, 8, generator=generator, dtype=dtype),
        down=torch.randn(4, 8, 6, generator=generator, dtype=dtype),
        combine=gated(F.silu),
    )
    hidden = torch.randn(num_tokens, 8, generator=generator, dtype=dtype)
    expert_ids = torch.rand(num_tokens, 4, generator=generator).topk(2, dim=-1).indices
    gates = torch.rand(num_tokens, 2, generator=generator)
    return hidden, expert_ids, gates, experts


def test_matrices_may_be_transposed_views() -> None:
    hidden, expert_ids, gates, experts = _random_case()
    stored = FusedExperts(
        gate_up=experts.gate_up.transpose(1, 2).contiguous().transpose(1, 2),
        down=experts.down.transpose(1, 2).contiguous().transpose(1, 2),
        combine=experts.combine,
    )
    torch.testing.assert_close(
        expert_ffn(hidden, expert_ids, gates, stored),
        expert_ffn(hidden, expert_ids, gates, experts),
    )


def test_choices_are_added_in_float32_when_weights_are_bfloat16() -> None:
    # One expert that returns 1 and one that returns 2^-9: their sum is not a bfloat16, but half of
    # the difference decides which way the sum rounds once the third choice is added.
    width = hidden_size = 1
    values = torch.tensor([1.0, 2.0**-9, 2.0**-9], dtype=torch.bfloat16)
    experts = FusedExperts(
        gate_up=torch.ones(3, 2 * width, hidden_size, dtype=torch.bfloat16),
        down=values.view(3, 1, 1),
        combine=lambda product: product[..., :1],
    )
    hidden = torch.ones(1, 1, dtype=torch.bfloat16)
    gates = torch.ones(1, 3)
    found = expert_ffn(hidden, torch.tensor([[0, 1, 2]]), gates, experts)
    # bfloat16 has 8 bits: 1 + 2^-9 + 2^-9 = 1 + 2^-8 is half a step above 1 and ties to even (1),
    # so use float32 accumulation's own rounding of the exact sum as the expectation.
    exact = values.double().sum().to(torch.bfloat16)
    assert found.item() == exact.item()
    assert found.dtype == torch.bfloat16


def test_gates_keep_their_float32_precision() -> None:
    # The product of a bfloat16 gate would lose the 2^-12; the float32 sum keeps it until
    # the final rounding.
    experts = FusedExperts(
        gate_up=torch.ones(2, 2, 1, dtype=torch.bfloat16),
        down=torch.tensor([1.0, -1.0], dtype=torch.bfloat16).view(2, 1, 1),
        combine=lambda product: product[..., :1],
    )
    gates = torch.tensor([[1.0 + 2.0**-12, 1.0]])
    found = expert_ffn(
        torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([[0, 1]]), gates, experts
    )
    assert found.item() == 2.0**-12


def test_autocast_computes_in_bfloat16_and_gives_float32_gradients() -> None:
    hidden, expert_ids, gates, experts = _random_case()
    experts.gate_up.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = expert_ffn(hidden, expert_ids, gates, experts)
    exact = expert_ffn(hidden, expert_ids, gates, experts)
    assert output.dtype == torch.float32
    assert 0 < (output - exact).abs().max() < 0.05 * exact.abs().max()
    (gradient,) = torch.autograd.grad(output.sum(), [experts.gate_up])
    (expected,) = torch.autograd.grad(exact.sum(), [experts.gate_up])
    assert gradient.dtype == torch.float32
    assert F.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.999


def test_autocast_with_rounded_up_rows_equals_each_expert_by_itself() -> None:
    # 300 tokens give every expert well over 32 rows and no multiple of 32.
    hidden, expert_ids, gates, experts = _random_case(num_tokens=300)
    counts = torch.bincount(expert_ids.flatten())
    assert (counts > 32).all()
    assert (counts % 32 != 0).any()
    hidden.requires_grad_()
    experts.down.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = expert_ffn(hidden, expert_ids, gates, experts)
        alone = torch.zeros_like(output)
        for expert in range(4):
            product = F.linear(hidden, experts.gate_up[expert])
            row = F.linear(experts.combine(product), experts.down[expert]).float()
            alone = alone + row * (gates * (expert_ids == expert)).sum(1, keepdim=True)
    torch.testing.assert_close(output, alone, rtol=1e-5, atol=1e-5)
    leaves = [hidden, experts.down]
    found = torch.autograd.grad(output.sum(), leaves)
    expected = torch.autograd.grad(alone.sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.05 * theirs.abs().mean().item())


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    hidden, expert_ids, gates, experts = _random_case(dtype=torch.float64)
    whole = expert_ffn(hidden, expert_ids, gates, experts)
    alone = expert_ffn(hidden[17:18], expert_ids[17:18], gates[17:18], experts)
    torch.testing.assert_close(whole[17:18], alone, rtol=1e-14, atol=1e-14)


def test_repeats_to_the_bit() -> None:
    hidden, expert_ids, gates, experts = _random_case(num_tokens=512)
    first = expert_ffn(hidden, expert_ids, gates, experts)
    assert torch.equal(first, expert_ffn(hidden, expert_ids, gates, experts))


@pytest.mark.parametrize("num_tokens", [0, 5])
def test_all_assignments_dropped_gives_zeros(num_tokens: int) -> None:
    hidden, expert_ids, gates, experts = _random_case(num_tokens=num_tokens)
    found = expert_ffn(hidden, torch.full_like(expert_ids, 4), gates, experts)
    assert torch.equal(found, torch.zeros_like(hidden))


def _with_dropout(
    case: tuple, rate: float, *, seed: int
) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
    """Run the experts with dropout, and draw the mask of every (token, choice) again by hand.

    The generator gives one number for each hidden unit: expert after expert, an expert's tokens in
    their order.
    """
    hidden, expert_ids, gates, experts = case
    masks: dict[tuple[int, int], Tensor] = {}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        dropped = dataclasses.replace(experts, hidden_dropout=rate)
        output = expert_ffn(hidden, expert_ids, gates, dropped)
        torch.manual_seed(seed)
        for expert in range(experts.num_experts):
            visits = (expert_ids == expert).nonzero().tolist()
            if visits:
                kept = hidden.new_empty(len(visits), experts.down.shape[2]).bernoulli_(1 - rate)
                masks |= {
                    (t, c): row / (1 - rate) for (t, c), row in zip(visits, kept, strict=True)
                }
    return output, masks


def _masked_sum(case: tuple, masks: dict[tuple[int, int], Tensor]) -> Tensor:
    """Return the sum over tokens and choices, each visit's hidden units times its mask."""
    hidden, expert_ids, gates, experts = case
    rows = [torch.zeros_like(row) for row in hidden]
    for (token, choice), mask in masks.items():
        expert = int(expert_ids[token, choice])
        product = experts.gate_up[expert] @ hidden[token]
        if experts.gate_up_bias is not None:
            product = product + experts.gate_up_bias[expert]
        output = experts.down[expert] @ (experts.combine(product) * mask)
        if experts.down_bias is not None:
            output = output + experts.down_bias[expert]
        if experts.output_norm is not None:
            output = experts.output_norm(output)
        rows[token] = rows[token] + gates[token, choice] * output
    return torch.stack(rows) if rows else torch.zeros_like(hidden)


@given(cases(), st.floats(0.05, 0.95), st.integers(0, 2**32))
def test_dropout_is_a_mask_on_the_hidden_units(case: tuple, rate: float, seed: int) -> None:
    fast, masks = _with_dropout(case, rate, seed=seed)
    slow = _masked_sum(case, masks)
    torch.testing.assert_close(fast, slow)
    if not slow.requires_grad:
        return
    hidden, _, gates, experts = case
    leaves = _leaves(hidden, gates, experts)
    for found, expected in zip(_gradients(fast, leaves), _gradients(slow, leaves), strict=True):
        torch.testing.assert_close(found, expected)


def test_dropout_is_the_same_for_the_same_seed_where_rows_are_rounded_up() -> None:
    case = _random_case(num_tokens=300)
    with torch.autocast("cpu", torch.bfloat16):
        first, _ = _with_dropout(case, 0.5, seed=1)
        again, _ = _with_dropout(case, 0.5, seed=1)
        other, _ = _with_dropout(case, 0.5, seed=2)
        without = expert_ffn(*case)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # Half of the units at twice their value: no row is what it was.
    assert (first != without).any(dim=1).all()


def test_without_dropout_nothing_is_drawn() -> None:
    case = _random_case()
    before = torch.get_rng_state()
    expert_ffn(*case)
    assert torch.equal(torch.get_rng_state(), before)
