"""What a step holds, counted against loops over its rows."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.core.errors import DataError
from flanmoe.data.collate import collate
from flanmoe.data.example import Packed
from flanmoe.training.rows import (
    FixedRows,
    StepTotals,
    example_numbers,
    micro_batches,
    target_positions,
    valid_tokens,
)


def made_row(lengths: list[int], length: int, labelled: list[bool]) -> Packed:
    segments = np.concatenate(
        [np.full(size, number + 1) for number, size in enumerate(lengths)]
        + [np.zeros(length - sum(lengths), int)]
    )
    positions = np.concatenate(
        [np.arange(size) for size in lengths] + [np.arange(length - sum(lengths))]
    )
    ids = np.arange(length) + 5
    keep = np.array(labelled) & (segments != 0) & (positions != 0)
    return Packed(ids, np.where(keep, ids, -100), segments, positions, ("t",) * len(lengths))


# For each micro-batch and row: the lengths of its examples, and which tokens are labels. The rows are
# built in the tests: the shape checks draw random names, which strategies must not.
_ROW = st.tuples(
    st.lists(st.integers(1, 3), min_size=0, max_size=3),
    st.lists(st.booleans(), min_size=9, max_size=9),
)
_BATCHES = st.lists(st.lists(_ROW, min_size=1, max_size=3), min_size=1, max_size=3)
Drawn = list[list[tuple[list[int], list[bool]]]]


def made(drawn: Drawn) -> list[list[Packed]]:
    return [[made_row(lengths, 9, labelled) for lengths, labelled in rows] for rows in drawn]


@given(drawn=_BATCHES)
def test_totals_equal_counts_over_the_rows(drawn: Drawn) -> None:
    batches = made(drawn)
    totals = StepTotals.of([collate(rows) for rows in batches])
    rows = [row for batch in batches for row in batch]
    assert totals == StepTotals(
        rows=len(rows),
        micro_batches=len(batches),
        examples=sum(len(set(row.segment_ids.tolist()) - {0}) for row in rows),
        real_tokens=sum(row.num_real_tokens for row in rows),
        padding_tokens=sum(9 - row.num_real_tokens for row in rows),
        loss_tokens=sum(row.num_loss_tokens for row in rows),
    )
    assert totals.tokens == 9 * len(rows)


@given(drawn=_BATCHES)
def test_examples_of_different_rows_have_different_numbers(drawn: Drawn) -> None:
    for rows in made(drawn):
        batch = collate(rows)
        numbers = example_numbers(batch).tolist()
        names = [(row, int(s)) for row, item in enumerate(rows) for s in item.segment_ids]
        together = {(one, other) for one, other in zip(numbers, names, strict=True)}
        assert len(together) == len({one for one, _ in together}) == len(set(names))
        assert valid_tokens(batch).tolist() == [segment != 0 for _, segment in names]


@given(drawn=_BATCHES)
def test_targets_are_kept_where_any_row_has_one(drawn: Drawn) -> None:
    for rows in made(drawn):
        expected = [
            position
            for position in range(8)
            if any(row.labels[position + 1] != -100 for row in rows)
        ]
        assert target_positions(collate(rows)).tolist() == expected


def test_fixed_rows_repeat_and_go_back(packed_rows: Callable[..., list[Packed]]) -> None:
    rows = packed_rows(3)
    stream = FixedRows(rows)
    given_rows = [next(stream) for _ in range(5)]
    assert given_rows == [*rows, rows[0], rows[1]]
    stream.load_state_dict(stream.state_after(4))
    assert next(stream) is rows[1]


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        FixedRows([])
    assert str(caught.value) == (
        "Training needs at least 1 packed row, but there are 0. Add examples."
    )


def test_the_loader_takes_nothing_from_the_global_random_state(
    packed_rows: Callable[..., list[Packed]],
) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    loader = iter(micro_batches(FixedRows(packed_rows(3)), rows=2))
    shapes = [next(loader)["input_ids"].shape for _ in range(2)]
    assert shapes == [(2, 24), (2, 24)]
    assert torch.equal(torch.random.get_rng_state(), before)
