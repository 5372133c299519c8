"""Experts that train apart from the frozen ones of their block, against a block that trains as a whole."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from flanmoe.moe.compute import (
    ExpertOutputs,
    FusedExperts,
    expert_ffn,
    expert_ffn_reference,
    gated,
)
from flanmoe.moe.compute.chosen import ChosenExperts

HIDDEN, WIDTH, TOKENS = 5, 4, 8
NAMES = ("gate_up", "down", "gate_up_bias", "down_bias")


def block_of(num_experts: int, generator: torch.Generator, **options: Any) -> FusedExperts:
    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return FusedExperts(
        gate_up=drawn(num_experts, 2 * WIDTH, HIDDEN),
        down=drawn(num_experts, HIDDEN, WIDTH),
        combine=gated(F.silu),
        gate_up_bias=drawn(num_experts, 2 * WIDTH),
        down_bias=drawn(num_experts, HIDDEN),
        **options,
    )


def tensors(block: FusedExperts) -> dict[str, torch.Tensor]:
    return {name: getattr(block, name) for name in NAMES}


def with_copies(block: FusedExperts, numbers: list[int]) -> tuple[FusedExperts, ChosenExperts]:
    chosen = ChosenExperts(numbers, block.num_experts, tensors(block))
    copies = dataclasses.replace(block, **dict(chosen.weights.items()))
    return dataclasses.replace(block, split=chosen.split(block, copies)), chosen


@settings(max_examples=20)
@given(data=st.data(), num_experts=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_outputs_and_gradients_are_those_of_the_whole_block(
    data: st.DataObject, num_experts: int, seed: int
) -> None:
    numbers = sorted(data.draw(st.sets(st.integers(0, num_experts - 1), min_size=1)))
    generator = torch.Generator().manual_seed(seed)
    block = block_of(num_experts, generator)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).requires_grad_()
    gates = torch.rand(TOKENS, 2, generator=generator, dtype=torch.float64).requires_grad_()
    # An id of `num_experts` stands for no expert.
    expert_ids = torch.randint(0, num_experts + 1, (TOKENS, 2), generator=generator)
    apart, chosen = with_copies(block, numbers)
    found = expert_ffn(hidden, expert_ids, gates, apart)
    whole = {name: value.clone().requires_grad_() for name, value in tensors(block).items()}
    expected = expert_ffn_reference(hidden, expert_ids, gates, dataclasses.replace(block, **whole))
    torch.testing.assert_close(found, expected)
    back = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    of_inputs = torch.autograd.grad(
        expected, [hidden, gates, *whole.values()], back, allow_unused=True
    )
    own = [chosen.weights[name] for name in NAMES]
    found_gradients = torch.autograd.grad(found, [hidden, gates, *own], back)
    for one, other in zip(found_gradients[:2], of_inputs[:2], strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)
    for name, one, other in zip(NAMES, found_gradients[2:], of_inputs[2:], strict=True):
        gradient = torch.zeros_like(whole[name]) if other is None else other
        torch.testing.assert_close(one, gradient[numbers])


def test_frozen_experts_get_no_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    apart, chosen = with_copies(block_of(4, generator), [1, 3])
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    expert_ids = torch.randint(0, 4, (TOKENS, 2), generator=generator)
    gates = torch.rand(TOKENS, 2, generator=generator, dtype=torch.float64)
    expert_ffn(hidden, expert_ids, gates, apart).sum().backward()
    assert all(tensor.grad is None for tensor in tensors(apart).values())
    assert all(weight.grad.abs().sum() > 0 for weight in chosen.parameters())
    assert [weight.shape[0] for weight in chosen.parameters()] == [2, 2, 2, 2]


def test_an_observer_is_shown_the_numbers_of_the_block() -> None:
    generator = torch.Generator().manual_seed(0)
    shown: list[ExpertOutputs] = []
    plain: list[ExpertOutputs] = []
    block = block_of(4, generator, observer=shown.append)
    apart, _ = with_copies(block, [0, 3])
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    expert_ids = torch.randint(0, 4, (TOKENS, 2), generator=generator)
    gates = torch.rand(TOKENS, 2, generator=generator, dtype=torch.float64)
    expert_ffn(hidden, expert_ids, gates, apart)
    expert_ffn(hidden, expert_ids, gates, dataclasses.replace(block, observer=plain.append))
    assert [sorted(set(part.expert_ids.tolist())) for part in shown] == [[1, 2], [0, 3]]
    (expected,) = plain
    together = [torch.cat(values) for values in zip(*shown, strict=True)]
    # In the order of the whole block: by expert, then by token.
    order = (together[1] * TOKENS + together[2]).argsort(stable=True)
    for found, value in zip(together, expected, strict=True):
        torch.testing.assert_close(found[order], value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_copies_have_at_least_32_bits(dtype: torch.dtype) -> None:
    chosen = ChosenExperts([0], 2, {"down_proj": torch.ones(2, 3, 4, dtype=dtype)})
    assert chosen.weights["down_proj"].dtype == torch.float32
