"""Lengths, their figures and repeats, against the standard library and definitions written out."""

import math
import statistics
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.data import statistics as ours
from flanmoe.data.chat import render_chat
from flanmoe.data.example import Example, Rendered
from flanmoe.data.packing import tokenize
from flanmoe.data.renderers import renderer_named
from flanmoe.data.statistics import Bin, Length, Lengths, histogram, length_of, repeats, summary

_NUMBERS = st.lists(st.integers(0, 5000), min_size=1, max_size=60)


@given(values=_NUMBERS)
def test_figures_are_those_of_the_standard_library(values: list[int]) -> None:
    found = summary(np.asarray(values))
    assert found is not None
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert found.median == pytest.approx(statistics.median(values))
    assert found.maximum == max(values)
    # The smallest value that at least 95 % of them do not exceed, by counting.
    reaches = [
        value
        for value in values
        if sum(other <= value for other in values) * 20 >= len(values) * 19
    ]
    assert found.p95 == min(reaches)


@given(values=_NUMBERS)
def test_every_number_stands_in_its_bin(values: list[int]) -> None:
    bins = histogram(np.asarray(values))
    assert [each.number for each in bins] == [
        sum(each.above < value <= each.at_most for value in values) for each in bins
    ]
    assert sum(each.number for each in bins) == len(values)
    assert bins[0].number
    assert bins[-1].number
    assert all(math.log2(each.at_most).is_integer() for each in bins)
    assert [each.above for each in bins[1:]] == [each.at_most for each in bins[:-1]]


def test_bins_end_at_powers_of_two() -> None:
    assert histogram(np.asarray([0, 16, 17, 64])) == (
        Bin(-1, 16, 2),
        Bin(16, 32, 1),
        Bin(32, 64, 1),
    )


def test_nothing_has_no_figures() -> None:
    nothing = Lengths.of([])
    assert summary(nothing.tokens) is None
    assert histogram(nothing.tokens) == ()


def test_lengths_are_gathered_in_order() -> None:
    lengths = Lengths.of([Length(1, 2, 3, 4), Length(5, 6, 7, 8)])
    assert lengths.prompt_characters.tolist() == [1, 5]
    assert lengths.response_characters.tolist() == [2, 6]
    assert lengths.prompt_tokens.tolist() == [3, 7]
    assert lengths.response_tokens.tolist() == [4, 8]
    assert lengths.tokens.tolist() == [7, 15]


def _rendered(tokenizer: Any, inputs: str, target: str) -> Rendered:
    example = Example(inputs=inputs, target=target)
    return render_chat(example, renderer_named("auto"), tokenizer, "task")


def test_a_length_is_what_packing_counts(tokenizer: Any) -> None:
    rendered = _rendered(tokenizer, "How many?", "Five.")
    tokens = tokenize(rendered, tokenizer)
    found = length_of(rendered, tokenizer)
    assert found.tokens == len(tokens)
    assert found.response_tokens == int(tokens.loss_mask.sum()) == len("Five.") + 1
    assert found.prompt_characters == len(rendered.prompt)
    assert found.response_characters == len(rendered.response)


def test_a_long_text_goes_through_in_pieces(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = _rendered(tokenizer, "question " * 50, "answer " * 50)
    whole = length_of(rendered, tokenizer)
    monkeypatch.setattr(ours, "_LONGEST_AT_ONCE", 100)
    pieces = length_of(rendered, tokenizer)
    # One token a character, so only a special token can be cut in two: into its characters.
    assert whole.tokens <= pieces.tokens <= whole.tokens + 30
    assert pieces.response_characters == whole.response_characters


def test_a_very_long_text_takes_little_memory(tokenizer: Any) -> None:
    rendered = _rendered(tokenizer, "long " * 400_000, "yes")
    tracemalloc.start()
    try:
        assert length_of(rendered, tokenizer).tokens >= 2_000_000
        assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    finally:
        tracemalloc.stop()


@given(letters=st.lists(st.sampled_from("abcde"), max_size=20))
def test_repeats_are_rows_whose_hash_came_before(letters: list[str]) -> None:
    hashes = [Example(inputs=letter, target="").content_hash() for letter in letters]
    expected = [
        [row, letters.index(letter)]
        for row, letter in enumerate(letters)
        if letters.index(letter) < row
    ]
    assert repeats(hashes).tolist() == expected
