"""Every way to multiply segments against the products written out, and the table that chooses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flanmoe.moe.compute import products
from flanmoe.moe.compute.grouping import Grouping, group
from flanmoe.moe.compute.products import (
    CHOICES,
    ROW_MULTIPLE,
    Choice,
    new_gradient,
    product_choice,
    segment_add,
    segment_mm,
    segment_outer,
    segment_sum,
)


def sorted_rows(counts: list[int]) -> Grouping:
    expert_ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).view(-1, 1)
    return group(expert_ids, torch.ones(expert_ids.shape), len(counts))


@pytest.fixture(params=["expert", "rounded", "grouped"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Take one path whatever the device and the dtype; torch has grouped_mm on the CPU too."""
    only = Choice(request.param, lambda rows, matrices: True, "")
    monkeypatch.setattr(products, "CHOICES", (only,))
    return request.param


# Below, at and above what rows are rounded up to, and experts without any.
COUNTS = ([3, 0, 40, 33, 0], [32, 64], [1], [0, 0, 5], [70, 31, 1])


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_rows_times_matrices(
    path: str, counts: list[int], transposed: bool, accumulate: bool
) -> None:
    segments = sorted_rows(counts).whole
    rows = normal(sum(counts), 8)
    matrices = (
        normal(len(counts), 16, 8).transpose(1, 2) if transposed else normal(len(counts), 8, 16)
    )
    before = normal(sum(counts), 16) if accumulate else torch.zeros(sum(counts), 16)
    expected = before.clone()
    for expert, start, end in segments.used():
        expected[start:end] += rows[start:end] @ matrices[expert]
    found = segment_mm(rows, matrices, segments, out=before.clone(), accumulate=accumulate)
    torch.testing.assert_close(found, expected)
    if not accumulate:
        torch.testing.assert_close(segment_mm(rows, matrices, segments), expected)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_columns(path: str, counts: list[int], transposed: bool) -> None:
    segments = sorted_rows(counts).whole
    left, right = normal(sum(counts), 8), normal(sum(counts), 16)
    out = (
        torch.full((len(counts), 16, 8), 7.0).transpose(1, 2)
        if transposed
        else torch.full((len(counts), 8, 16), 7.0)
    )
    expected = out.clone()
    for expert, start, end in segments.used():
        expected[expert] = left[start:end].t() @ right[start:end]
    segment_outer(left, right, segments, out=out)
    torch.testing.assert_close(out, expected)


def test_only_the_experts_of_a_run_are_touched(path: str) -> None:
    grouping = sorted_rows([3, 0, 40, 33, 2])
    rows, matrices = normal(78, 8), normal(5, 8, 16)
    whole = segment_mm(rows, matrices, grouping.whole)
    out = torch.full((5, 8, 16), 7.0)
    runs = grouping.runs(45)
    assert [run.experts for run in runs] == [slice(0, 3), slice(3, 5)]
    for run in runs:
        torch.testing.assert_close(segment_mm(rows[run.rows], matrices, run), whole[run.rows])
        segment_outer(rows[run.rows], whole[run.rows], run, out=out)
    assert (out[1] == 7).all()
    torch.testing.assert_close(out[4], rows[76:].t() @ whole[76:])


@pytest.mark.parametrize("path_taken", ["expert", "rounded", "grouped"])
def test_gradients_of_float32_weights_from_bfloat16_rows(
    path_taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = Choice(path_taken, lambda rows, matrices: True, "")  # pyright: ignore
    monkeypatch.setattr(products, "CHOICES", (only,))
    segments = sorted_rows([3, 0, 40]).whole
    left, right = normal(43, 8).bfloat16(), normal(43, 16).bfloat16()
    out = new_gradient(torch.empty(3, 8, 16), segments.counts, dtype=torch.float32)
    segment_outer(left, right, segments, out=out)
    assert (out[1] == 0).all()
    exact = left[3:].double().t() @ right[3:].double()
    torch.testing.assert_close(out[2].double(), exact, rtol=2**-7, atol=1e-2)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_biases(counts: list[int]) -> None:
    segments = sorted_rows(counts).whole
    rows, vectors, weights = normal(sum(counts), 4), normal(len(counts), 4), normal(sum(counts))
    found = rows.clone()
    segment_add(found, vectors, segments)
    plain, weighted = (torch.full((len(counts), 4), 7.0) for _ in range(2))
    segment_sum(rows, segments, out=plain)
    segment_sum(rows, segments, out=weighted, weights=weights)
    start = 0
    for expert, count in enumerate(counts):
        own = slice(start, start + count)
        torch.testing.assert_close(found[own], rows[own] + vectors[expert])
        if count:
            torch.testing.assert_close(plain[expert], rows[own].sum(0))
            torch.testing.assert_close(weighted[expert], (rows[own] * weights[own, None]).sum(0))
        else:
            assert (plain[expert] == 7).all()
            assert (weighted[expert] == 7).all()
        start += count


@pytest.mark.parametrize("counts", [(2, 0, 1), (1, 1, 1), (0, 0, 0)])
def test_room_for_gradients_has_the_strides_of_weights(counts: tuple[int, ...]) -> None:
    like = torch.empty(3, 4, 5).transpose(1, 2)
    found = new_gradient(like, counts, dtype=torch.float64)
    assert found.stride() == like.stride()
    assert found.dtype == torch.float64
    for expert, count in enumerate(counts):
        assert count or (found[expert] == 0).all()


def test_the_table_on_this_machine() -> None:
    matrices = torch.empty(2, 8, 16)
    assert product_choice(torch.empty(3, 8), matrices).path == "expert"
    found = product_choice(torch.empty(3, 8).bfloat16(), matrices.bfloat16())
    assert found.path == "rounded"
    assert str(ROW_MULTIPLE) in found.reason
    # Whatever nothing else takes is taken by the last one.
    assert CHOICES[-1].taken(torch.empty(0, 3, dtype=torch.float64), matrices)
