"""One sort: which rows are whose, runs of experts, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flanmoe.core.errors import ModelError
from flanmoe.moe.compute.grouping import Grouping, group


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Expert ids (T, k) and the number of experts; the number itself is no expert."""
    num_experts, top_k = draw(st.integers(1, 6)), draw(st.integers(0, 4))
    row = st.lists(st.integers(0, num_experts), min_size=top_k, max_size=top_k)
    rows = draw(st.lists(row, max_size=8))
    return torch.tensor(rows, dtype=torch.long).view(len(rows), top_k), num_experts


def grouped(expert_ids: Tensor, num_experts: int) -> Grouping:
    return group(expert_ids, torch.ones(expert_ids.shape), num_experts)


@given(choices())
def test_rows_are_sorted_by_expert_then_by_token(case: tuple[Tensor, int]) -> None:
    expert_ids, num_experts = case
    grouping = grouped(expert_ids, num_experts)
    flat = expert_ids.flatten().tolist()
    expected = sorted((expert, place) for place, expert in enumerate(flat) if expert < num_experts)
    assert grouping.order.tolist() == [place for _, place in expected]
    top_k = max(expert_ids.shape[1], 1)
    assert grouping.token_ids.tolist() == [place // top_k for _, place in expected]
    assert grouping.counts == tuple(flat.count(expert) for expert in range(num_experts))
    assert grouping.ends.tolist() == [sum(grouping.counts[: e + 1]) for e in range(num_experts)]


@given(choices())
def test_places_lead_back(case: tuple[Tensor, int]) -> None:
    expert_ids, num_experts = case
    grouping = grouped(expert_ids, num_experts)
    for place, row in enumerate(grouping.places().flatten().tolist()):
        if expert_ids.flatten()[place] < num_experts:
            assert grouping.order[row] == place
        else:
            assert row == grouping.order.numel()


@given(choices(), st.integers(1, 40))
def test_runs_hold_every_row_once(case: tuple[Tensor, int], most_rows: int) -> None:
    expert_ids, num_experts = case
    grouping = grouped(expert_ids, num_experts)
    runs = grouping.runs(most_rows)
    rows: list[int] = []
    by_expert = dict.fromkeys(range(num_experts), 0)
    for run in runs:
        assert run.num_rows > 0
        used = [segment.expert for segment in run.used()]
        assert run.num_rows <= most_rows or len(used) == 1
        rows += range(grouping.order.numel())[run.rows]
        assert run.ends.tolist()[-1] == run.num_rows
        for expert, start, end in run.used():
            assert run.ends[expert] == end
            by_expert[run.first_expert + expert] += end - start
    assert rows == list(range(grouping.order.numel()))
    assert tuple(by_expert.values()) == grouping.counts


@pytest.mark.parametrize(
    ("expert", "found"),
    [(-1, "1 of 4 are not, the first is -1"), (4, "1 of 4 are not, the first is 4")],
)
def test_ids_that_are_no_expert_are_refused(expert: int, found: str) -> None:
    with pytest.raises(ModelError) as raised:
        grouped(torch.tensor([[0, 1], [expert, 2]]), 3)
    assert str(raised.value) == (
        f"Expert ids must be between 0 and 2, or 3 for no expert, but {found}. A router must choose from as "
        "many experts as there are."
    )


@pytest.mark.parametrize("gate", [float("nan"), float("inf")])
def test_gates_that_are_no_number_are_refused(gate: float) -> None:
    gates = torch.tensor([[1.0, 1.0], [gate, 1.0]])
    with pytest.raises(ModelError) as raised:
        group(torch.tensor([[0, 1], [1, 2]]), gates, 3)
    assert str(raised.value) == (
        "Gates must be finite, but 1 of 4 are NaN or infinite. The router's scores have overflowed: "
        "lower the learning rate, or go back to the last checkpoint."
    )


def test_the_gate_of_no_expert_is_not_looked_at() -> None:
    gates = torch.tensor([[1.0, float("nan")]])
    assert group(torch.tensor([[0, 3]]), gates, 3).counts == (1, 0, 0)
