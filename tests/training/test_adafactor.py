"""Adafactor against its definition written out, and against transformers' where the two coincide."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.optimization import Adafactor as TheirAdafactor

from flanmoe.training.adafactor import Adafactor

RATE = 0.03


def drawn(
    shape: Sequence[int], number: int, *, seed: int = 0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A weight and a gradient for each step, of very different sizes from row to row and step to step."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)

    def uneven() -> torch.Tensor:
        return normal() * torch.randn((), generator=generator, dtype=torch.float64).exp()

    return 0.1 * normal(), [uneven() * normal().exp() for _ in range(number)]


def changed(
    weight: torch.Tensor, gradients: list[torch.Tensor], optimizer: type = Adafactor, **options: Any
) -> torch.Tensor:
    parameter = nn.Parameter(weight.clone())
    made = optimizer([parameter], **{"lr": RATE, **options})
    for gradient in gradients:
        parameter.grad = gradient.clone()
        made.step()
    return parameter.detach()


def written_out(weight: np.ndarray, gradients: Sequence[np.ndarray]) -> np.ndarray:
    """One matrix, vector or number, entry by entry."""
    is_factored = weight.ndim == 2 and min(weight.shape) >= 128
    weight = weight.copy()
    moments = np.zeros(weight.shape)
    rows, columns = np.zeros(weight.shape[:1]), np.zeros(weight.shape[1:])

    def root_mean_square(values: np.ndarray) -> float:
        return math.sqrt(math.fsum(float(value) ** 2 for value in values.flat) / values.size)

    for step, gradient in enumerate(gradients, start=1):
        kept = 1 - step**-0.8
        squares = gradient**2 + 1e-30
        if is_factored:
            for row in range(weight.shape[0]):
                rows[row] = kept * rows[row] + (1 - kept) * squares[row].mean()
            for column in range(weight.shape[1]):
                columns[column] = kept * columns[column] + (1 - kept) * squares[:, column].mean()
            moments = np.outer(rows, columns) / rows.mean()
        else:
            moments = kept * moments + (1 - kept) * squares
        update = gradient / np.sqrt(moments)
        update = update / max(1.0, root_mean_square(update))
        weight = weight - RATE * max(root_mean_square(weight), 1e-3) * update
    return weight


def each_matrix(weight: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """The definition for every matrix along the last two axes by itself."""
    if weight.ndim <= 2:
        found = written_out(weight.numpy(), [gradient.numpy() for gradient in gradients])
        return torch.from_numpy(np.asarray(found))
    parts = [
        each_matrix(part, [gradient[index] for gradient in gradients])
        for index, part in enumerate(weight)
    ]
    return torch.stack(parts)


SHAPES = [(130, 128), (127, 200), (7,), (), (3, 128, 129), (3, 5, 4), (2, 2, 128, 128)]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_definition(shape: tuple[int, ...]) -> None:
    weight, gradients = drawn(shape, 3)
    found, expected = changed(weight, gradients), each_matrix(weight, gradients)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    assert float((found - weight).abs().max()) > 0


@settings(max_examples=15)
@given(
    shape=st.lists(st.integers(1, 5), max_size=4).map(tuple),
    steps=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_it_is_the_definition_for_any_small_shape(
    shape: tuple[int, ...], steps: int, seed: int
) -> None:
    weight, gradients = drawn(shape, steps, seed=seed)
    torch.testing.assert_close(
        changed(weight, gradients), each_matrix(weight, gradients), rtol=1e-11, atol=1e-13
    )


@pytest.mark.parametrize("shape", [(128, 130), (200, 150), (40,)])
def test_it_is_transformers_where_both_factor_or_neither(shape: tuple[int, ...]) -> None:
    weight, gradients = drawn(shape, 4)
    theirs = {"scale_parameter": True, "relative_step": False, "warmup_init": False}
    torch.testing.assert_close(
        changed(weight, gradients),
        changed(weight, gradients, TheirAdafactor, **theirs),
        rtol=1e-11,
        atol=1e-13,
    )


def test_an_expert_changes_as_if_it_were_alone() -> None:
    weight, gradients = drawn((4, 128, 130), 3)
    weight[2] *= 100
    for gradient in gradients:
        gradient[1] *= 1000
    found = changed(weight, gradients)
    for expert in range(4):
        alone = changed(weight[expert], [gradient[expert] for gradient in gradients])
        torch.testing.assert_close(found[expert], alone, rtol=1e-12, atol=0)
    # transformers takes scale and clipping over all experts.
    theirs = changed(weight, gradients, TheirAdafactor, relative_step=False)
    assert float((theirs - found).abs().max() / (found - weight).abs().max()) > 0.1


def test_a_rate_is_relative_to_the_weights() -> None:
    weight, gradients = drawn((20, 30), 1)
    moved = (changed(weight, gradients) - weight).square().mean().sqrt()
    # At the first step each entry moves by the sign of its gradient.
    torch.testing.assert_close(moved, RATE * weight.square().mean().sqrt())
    nothing = changed(torch.zeros_like(weight), gradients)
    torch.testing.assert_close(nothing, -RATE * 1e-3 * gradients[0].sign())
    torch.testing.assert_close(
        changed(1e4 * weight, [1e-7 * gradients[0]]) / 1e4, changed(weight, gradients)
    )


def test_an_expert_without_tokens_stays() -> None:
    weight, gradients = drawn((2, 128, 128), 2)
    gradients[0][1] = gradients[1][1] = 0
    found = changed(weight.float(), [gradient.float() for gradient in gradients])
    assert found.isfinite().all()
    assert torch.equal(found[1], weight.float()[1])


def test_weight_decay_is_decoupled() -> None:
    weight, gradients = drawn((20, 30), 1)
    plain, decayed = changed(weight, gradients), changed(weight, gradients, weight_decay=0.5)
    torch.testing.assert_close(decayed, plain - RATE * 0.5 * weight)


def test_statistics_of_large_matrices_are_rows_and_columns() -> None:
    weights = [nn.Parameter(torch.ones(shape)) for shape in ((3, 128, 200), (128, 100))]
    optimizer = Adafactor(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    sizes = [
        {name: tuple(value.shape) for name, value in optimizer.state[weight].items()}
        for weight in weights
    ]
    assert sizes == [
        {"step": (), "row": (3, 128, 1), "column": (3, 1, 200)},
        {"step": (), "full": (128, 100)},
    ]


def test_bfloat16_weights_have_float32_statistics() -> None:
    weight = nn.Parameter(torch.ones(128, 128, dtype=torch.bfloat16))
    weight.grad = torch.full_like(weight, 1e-3)
    optimizer = Adafactor([weight], lr=0.5)
    optimizer.step()
    assert optimizer.state[weight]["row"].dtype == torch.float32
    assert torch.equal(weight, torch.full_like(weight, 0.5))


def test_going_on_from_a_saved_state() -> None:
    weight, gradients = drawn((2, 128, 128), 6)
    weight, gradients = weight.float(), [gradient.float() for gradient in gradients]
    whole = changed(weight, gradients)
    parameter = nn.Parameter(weight.clone())
    first = Adafactor([parameter], lr=RATE)
    for gradient in gradients[:3]:
        parameter.grad = gradient
        first.step()
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = Adafactor([parameter], lr=1.0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for gradient in gradients[3:]:
        parameter.grad = gradient
        second.step()
    assert torch.equal(parameter, whole)


def test_a_closure_gives_the_loss() -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = Adafactor([weight], lr=0.25)

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 4.0
    assert float(weight.detach()) == 1.5
