"""Pairs: one end behind every text, rows against a written-out best fit, the shift against the model's own."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from flanmoe.core.errors import ConfigError, DataError
from flanmoe.data.example import PackedPair, Rendered
from flanmoe.data.packing import PackingConfig, PackingReport
from flanmoe.data.pairs import (
    TokenizedPair,
    assign_pair_rows,
    fitted_pair,
    grouped_pairs,
    packed_pair_row,
    tokenize_pairs,
)
from flanmoe.models.flan_moe_t5.segments import shifted_right
from flanmoe.testing.tiny_models import tiny_text_tokenizer

END = 1


def packed_rows(pairs: Sequence[TokenizedPair], **options: int) -> list[PackedPair]:
    """What a stream makes of the pairs of one window."""
    lengths = {name: options[name] for name in ("length", "target_length")}
    return [packed_pair_row(row, **options) for row in grouped_pairs(pairs, **lengths)]


def pair(inputs: Sequence[int], targets: Sequence[int], task: str = "task") -> TokenizedPair:
    return TokenizedPair(
        input_ids=np.array(inputs, dtype=np.int64),
        target_ids=np.array(targets, dtype=np.int64),
        task=task,
        key=f"{list(inputs)}",
        content_hash="",
    )


def rendered(prompt: str, response: str) -> Rendered:
    return Rendered(prompt=prompt, response=response, task="t", key="k", content_hash="h")


_texts = st.text("ab c", max_size=6)


@given(
    texts=st.lists(st.tuples(_texts, _texts), max_size=6),
    endings=st.integers(0, 2),
)
def test_every_text_ends_once_whether_the_tokenizer_ends_it_or_not(
    tokenizer: Any, texts: list[tuple[str, str]], endings: int
) -> None:
    """Also where the text itself says that it ends."""
    for one in (tiny_text_tokenizer(), tokenizer):
        vocabulary, end = one.get_vocab(), one.eos_token_id
        written = one.eos_token * endings
        pairs = tokenize_pairs(
            [rendered(prompt + written, response + written) for prompt, response in texts], one
        )
        expected = [
            [[*(vocabulary[letter] for letter in text), end] for text in two] for two in texts
        ]
        assert [[p.input_ids.tolist(), p.target_ids.tolist()] for p in pairs] == expected


def test_other_special_tokens_stay_as_the_tokenizer_puts_them() -> None:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    backend.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    like_bart = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    (found,) = tokenize_pairs([rendered("a", "a")], like_bart)
    assert found.input_ids.tolist() == found.target_ids.tolist() == [0, 2, 1]


def test_all_texts_go_to_the_tokenizer_in_one_call() -> None:
    inner, calls = tiny_text_tokenizer(), list[int]()

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def __call__(self, text: Any, **options: Any) -> Any:
            calls.append(len(text))
            return inner(text, **options)

    tokenize_pairs([rendered("ab", "c")] * 7, Counting())
    assert calls == [14]


def test_where_a_pair_came_from_stays_with_it() -> None:
    one = Rendered(prompt="a", response="b", task="sums", key="sums-3", content_hash="abc")
    (found,) = tokenize_pairs([one], tiny_text_tokenizer())
    assert (found.task, found.key, found.content_hash) == ("sums", "sums-3", "abc")


def test_a_tokenizer_without_an_end_is_refused() -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    with pytest.raises(DataError, match="needs an end-of-text token"):
        tokenize_pairs([rendered("a", "a")], endless)


def test_a_row_written_out() -> None:
    row = packed_pair_row(
        [pair([5, 6, END], [7, END], "a"), pair([8, END], [9, 4, END], "b")],
        length=7,
        target_length=6,
        decoder_start_token_id=99,
        padding=3,
    )
    assert row.input_ids.tolist() == [5, 6, END, 8, END, 3, 3]
    assert row.segment_ids.tolist() == [1, 1, 1, 2, 2, 0, 0]
    assert row.decoder_input_ids.tolist() == [99, 7, 99, 9, 4, 3]
    assert row.labels.tolist() == [7, END, 9, 4, END, -100]
    assert row.decoder_segment_ids.tolist() == [1, 1, 2, 2, 2, 0]
    assert row.tasks == ("a", "b")
    assert (row.num_real_tokens, row.num_loss_tokens) == (10, 5)
    assert row.segment_sizes == (3, 5, 5)


def best_fit_written_out(
    sizes: Sequence[tuple[int, int]], capacities: tuple[int, int], most_in_a_row: int = 10**9
) -> list[list[int]]:
    """Look at every row for every pair, with sizes as fractions: the slow definition."""

    def relative(index: int) -> list[float]:
        both = zip(sizes[index], capacities, strict=True)
        # A common multiple keeps the fractions exact.
        return [size * capacities[0] * capacities[1] / capacity for size, capacity in both]

    rows: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda index: (-max(relative(index)), index)):
        best, least = None, float("inf")
        for number, row in enumerate(rows):
            together = [sum(sizes[other][side] for other in (*row, index)) for side in (0, 1)]
            if len(row) == most_in_a_row or any(
                size > capacity for size, capacity in zip(together, capacities, strict=True)
            ):
                continue
            left = sum(relative(other)[side] for other in (*row, index) for side in (0, 1))
            if -left < least:
                best, least = number, -left
        if best is None:
            rows.append([index])
        else:
            rows[best].append(index)
    return sorted(sorted(row) for row in rows)


_sizes = st.lists(st.tuples(st.integers(1, 24), st.integers(1, 10)), max_size=40)


@given(
    sizes=_sizes,
    capacities=st.tuples(st.sampled_from([24, 32, 64]), st.sampled_from([12, 16, 40])),
    most=st.sampled_from([1, 2, 3, 10**9]),
)
def test_rows_equal_the_written_out_best_fit(
    sizes: list[tuple[int, int]], capacities: tuple[int, int], most: int
) -> None:
    rows = assign_pair_rows(
        sizes, capacities=capacities, most_in_a_row=None if most > 100 else most
    )
    assert rows == best_fit_written_out(sizes, capacities, most)
    assert all(len(row) <= most for row in rows)


@given(sizes=_sizes)
def test_neither_side_overflows_and_no_two_rows_could_be_one(sizes: list[tuple[int, int]]) -> None:
    rows = assign_pair_rows(sizes, capacities=(24, 16))
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    filled = np.array([np.sum([sizes[index] for index in row], axis=0) for row in rows])
    assert (filled.reshape(-1, 2) <= (24, 16)).all()
    assert all((filled[i] + filled[j] > (24, 16)).any() for i in range(len(rows)) for j in range(i))


@pytest.mark.parametrize("size", [(0, 1), (1, 0), (11, 1), (1, 6), (-1, 2)])
def test_sizes_outside_the_row_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"between 1 and (10|5), but is"):
        assign_pair_rows([(3, 3), size], capacities=(10, 5))


_pairs = st.lists(
    st.tuples(
        st.lists(st.integers(2, 99), min_size=1, max_size=12),
        st.lists(st.integers(2, 99), min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=20,
)


def _segments(ids: np.ndarray, numbers: np.ndarray, count: int) -> list[list[int]]:
    return [ids[numbers == number].tolist() for number in range(1, count + 1)]


@given(pairs=_pairs, length=st.integers(12, 30), target_length=st.integers(8, 20))
def test_packing_keeps_every_token_of_both_sides_in_order(
    pairs: list[tuple[list[int], list[int]]], length: int, target_length: int
) -> None:
    rows = packed_rows(
        [pair(*texts, task=f"t{index}") for index, texts in enumerate(pairs)],
        length=length,
        target_length=target_length,
        decoder_start_token_id=100,
    )
    found: dict[str, tuple[list[int], list[int]]] = {}
    for row in rows:
        inputs = _segments(row.input_ids, row.segment_ids, len(row.tasks))
        targets = _segments(row.labels, row.decoder_segment_ids, len(row.tasks))
        found |= dict(zip(row.tasks, zip(inputs, targets, strict=True), strict=True))
        assert (np.diff(np.where(row.segment_ids == 0, 99, row.segment_ids)) >= 0).all()
        assert (row.labels[row.decoder_segment_ids == 0] == -100).all()
    assert found == {f"t{index}": texts for index, texts in enumerate(pairs)}
    report = PackingReport.of_rows(rows)
    assert report.real_tokens == sum(len(a) + len(b) for a, b in pairs)
    assert report.loss_tokens == sum(len(b) for _, b in pairs)
    assert report.real_tokens + report.padding_tokens == len(rows) * (length + target_length)
    assert {name: counts.tokens for name, counts in report.tasks.items()} == {
        f"t{index}": len(a) + len(b) for index, (a, b) in enumerate(pairs)
    }


@given(pairs=_pairs, start=st.sampled_from([0, 100]))
def test_the_decoder_is_given_what_the_model_would_give_itself(
    pairs: list[tuple[list[int], list[int]]], start: int
) -> None:
    rows = packed_rows(
        [pair(*texts) for texts in pairs],
        length=20,
        target_length=11,
        decoder_start_token_id=start,
    )
    labels, segments, given_ids = (
        torch.as_tensor(np.stack([getattr(row, name) for row in rows]))
        for name in ("labels", "decoder_segment_ids", "decoder_input_ids")
    )
    expected = shifted_right(labels, segments, start_token_id=start, pad_token_id=0)
    real = torch.ones_like(segments, dtype=torch.bool) if start == 0 else segments != 0
    assert torch.equal(given_ids[real], expected[real])


CONFIG = PackingConfig(length=4, target_length=3)


def test_what_is_too_long_on_either_side_is_dropped_and_counted() -> None:
    pairs = [
        pair([9] * 5, [8], "a"),
        pair([9] * 4, [8] * 3, "a"),
        pair([9], [8] * 4, "b"),
        pair([9] * 9, [8] * 9, "b"),
    ]
    found = [fitted_pair(one, CONFIG) for one in pairs]
    assert [one.sizes for one, _ in found if one is not None] == [(4, 3)]
    done = Counter(
        (one.task, change) for one, (_, change) in zip(pairs, found, strict=True) if change
    )
    assert done == {("a", "dropped"): 1, ("b", "dropped"): 2}


def test_a_cut_input_keeps_its_end_and_a_cut_target_gets_none() -> None:
    config = PackingConfig(length=4, target_length=3, on_too_long="truncate")
    pairs = [
        pair([5, 6, 7, 8, END], [9, END], "a"),
        pair([5, END], [9, 8, 7, END], "b"),
        pair([5, 6, 7, END], [9, 8, END], "c"),
    ]
    found = [fitted_pair(one, config) for one in pairs]
    kept = [one for one, _ in found if one is not None]
    assert [(one.input_ids.tolist(), one.target_ids.tolist()) for one in kept] == [
        ([5, 6, 7, END], [9, END]),
        ([5, END], [9, 8, 7]),
        ([5, 6, 7, END], [9, 8, END]),
    ]
    done = Counter(
        (one.task, change) for one, (_, change) in zip(pairs, found, strict=True) if change
    )
    assert done == {("a", "truncated"): 1, ("b", "truncated"): 1}


def test_what_is_too_long_is_an_error_when_asked_for() -> None:
    config = PackingConfig(length=4, target_length=3, on_too_long="error")
    with pytest.raises(DataError) as caught:
        fitted_pair(pair([5] * 6, [1], "sums"), config)
    assert str(caught.value) == (
        "Example `[5, 5, 5, 5, 5, 5]` of task `sums` must have at most 4 input tokens (`packing.length`) and "
        "3 target tokens (`packing.target_length`), but has 6 and 1. Raise them, or set "
        "`packing.on_too_long` to `drop` or `truncate`."
    )


def test_pairs_need_a_length_for_targets() -> None:
    with pytest.raises(ConfigError, match=r"`packing.target_length` must say how many .* is null"):
        fitted_pair(pair([5], [1]), PackingConfig(length=4))


def test_a_report_adds_up_rows_of_both_kinds_of_loss() -> None:
    """Every label counts, the first of the row too: labels are aligned, not shifted."""
    row = PackedPair(
        input_ids=np.array([5, 0]),
        segment_ids=np.array([1, 0]),
        decoder_input_ids=np.array([0]),
        decoder_segment_ids=np.array([1]),
        labels=np.array([4]),
        tasks=("t",),
    )
    report = PackingReport.of_rows([row, row])
    assert (report.real_tokens, report.padding_tokens, report.loss_tokens) == (4, 2, 2)
    assert report.padding_share == pytest.approx(1 / 3)
