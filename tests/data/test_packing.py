"""Packing against a written-out best fit, and the loss mask against its definition."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import flanmoe.data.packing as packing_module
from flanmoe.core.errors import DataError
from flanmoe.data.example import Packed, Rendered
from flanmoe.data.packing import (
    IGNORED_LABEL,
    PackingConfig,
    PackingReport,
    PackingTally,
    TaskCounts,
    TokenizedExample,
    assign_rows,
    fit,
    merged,
    pack,
    packed_row,
    report_from_state,
    tokenize,
    tokenize_all,
)

Tokens = Callable[..., TokenizedExample]


def best_fit_written_out(
    lengths: Sequence[int], capacity: int, most_in_a_row: int = 10**9
) -> list[list[int]]:
    """Look at every row for every example: the slow definition of best-fit decreasing."""
    rows: list[list[int]] = []
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    for index in order:
        best, best_space = None, capacity + 1
        for number, row in enumerate(rows):
            space = capacity - sum(lengths[other] for other in row)
            if len(row) < most_in_a_row and lengths[index] <= space < best_space:
                best, best_space = number, space
        if best is None:
            rows.append([index])
        else:
            rows[best].append(index)
    return sorted(sorted(row) for row in rows)


@given(
    lengths=st.lists(st.integers(1, 40), max_size=60),
    capacity=st.integers(40, 90),
)
def test_rows_equal_the_written_out_best_fit(lengths: list[int], capacity: int) -> None:
    assert assign_rows(lengths, capacity=capacity) == best_fit_written_out(lengths, capacity)


@given(
    lengths=st.lists(st.integers(1, 40), max_size=40),
    capacity=st.integers(40, 90),
    most=st.integers(1, 4),
)
def test_rows_hold_no_more_examples_than_asked_for(
    lengths: list[int], capacity: int, most: int
) -> None:
    rows = assign_rows(lengths, capacity=capacity, most_in_a_row=most)
    assert rows == best_fit_written_out(lengths, capacity, most)
    assert all(len(row) <= most for row in rows)
    if most == 1:
        assert rows == [[index] for index in range(len(lengths))]


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=50))
def test_every_example_stands_in_one_row_and_no_two_rows_could_be_one(lengths: list[int]) -> None:
    rows = assign_rows(lengths, capacity=30)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sizes = [sum(lengths[index] for index in row) for row in rows]
    assert max(sizes) <= 30
    assert all(a + b > 30 for i, a in enumerate(sizes) for b in sizes[:i])


def test_many_examples_pack_in_no_time_and_leave_little_padding() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(20, 400) for _ in range(50_000)]
    rows = assign_rows(lengths, capacity=1024)
    assert sum(lengths) / (len(rows) * 1024) > 0.99


@pytest.mark.parametrize("lengths", [[0], [11], [3, -1]])
def test_lengths_outside_the_row_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="between 1 and 10, but is"):
        assign_rows(lengths, capacity=10)


def test_a_row_written_out(tokens: Tokens) -> None:
    row = packed_row([tokens([5, 6, 7], "a"), tokens([8], "b"), tokens([9, 4], "a")], length=9)
    assert row.input_ids.tolist() == [5, 6, 7, 8, 9, 4, 0, 0, 0]
    assert row.labels.tolist() == [-100, 6, 7, -100, -100, 4, -100, -100, -100]
    assert row.segment_ids.tolist() == [1, 1, 1, 2, 3, 3, 0, 0, 0]
    assert row.position_ids.tolist() == [0, 1, 2, 0, 0, 1, 0, 1, 2]
    assert row.tasks == ("a", "b", "a")
    assert row.num_real_tokens == 6
    assert row.num_loss_tokens == 3


def test_the_first_token_of_a_segment_is_never_a_label(tokens: Tokens) -> None:
    everywhere = TokenizedExample(np.array([3, 4]), np.array([True, True]), "t", "k", "h")
    row = packed_row([tokens([5, 6]), everywhere], length=4)
    assert row.labels.tolist() == [IGNORED_LABEL, 6, IGNORED_LABEL, 4]


def _segments(row: Packed) -> list[list[int]]:
    return [row.input_ids[row.segment_ids == n].tolist() for n in range(1, len(row.tasks) + 1)]


@given(
    examples=st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=12), max_size=25),
    length=st.integers(12, 30),
)
def test_packing_keeps_every_token_in_order(examples: list[list[int]], length: int) -> None:
    tokenized = [
        TokenizedExample(np.array(ids), np.arange(len(ids)) > 0, f"t{index}", "k", "h")
        for index, ids in enumerate(examples)
    ]
    rows = pack(tokenized, length=length)
    found = {task: ids for row in rows for task, ids in zip(row.tasks, _segments(row), strict=True)}
    assert found == {f"t{index}": ids for index, ids in enumerate(examples)}
    for row in rows:
        starts = np.flatnonzero(np.diff(row.segment_ids, prepend=-1))
        assert (row.position_ids[starts] == 0).all()
        steps = np.diff(row.position_ids)
        assert (steps[np.setdiff1d(np.arange(length - 1), starts - 1)] == 1).all()
    report = PackingReport.of_rows(rows)
    assert report.real_tokens == sum(map(len, examples))
    assert report.loss_tokens == sum(len(ids) - 1 for ids in examples)
    assert report.real_tokens + report.padding_tokens == length * len(rows)


def test_too_long_is_dropped_and_counted(tokens: Tokens) -> None:
    config = PackingConfig(length=4)
    kept, report = fit([tokens([1] * 5, "a"), tokens([1] * 4, "a"), tokens([1] * 9, "b")], config)
    assert [len(example) for example in kept] == [4]
    assert report.tasks == {"a": TaskCounts(dropped=1), "b": TaskCounts(dropped=1)}
    assert report.num_dropped == 2


def test_too_long_is_truncated_at_its_end_and_counted(tokens: Tokens) -> None:
    config = PackingConfig(length=4, on_too_long="truncate")
    prompt_only = TokenizedExample(np.arange(6), np.arange(6) > 3, "b", "k", "h")
    kept, report = fit([tokens([1, 2, 3, 4, 5], "a"), prompt_only], config)
    assert [example.input_ids.tolist() for example in kept] == [[1, 2, 3, 4]]
    assert report.tasks == {"a": TaskCounts(truncated=1), "b": TaskCounts(dropped=1)}


def test_too_long_is_an_error_when_asked_for(tokens: Tokens) -> None:
    config = PackingConfig(length=4, on_too_long="error")
    with pytest.raises(DataError) as caught:
        fit([tokens([1, 2, 3, 4, 5], "sums")], config)
    assert str(caught.value) == (
        "Example `[1, 2, 3, 4, 5]` of task `sums` must have at most 4 tokens (`packing.length`), but "
        "has 5. Raise `packing.length`, or set `packing.on_too_long` to `drop` or `truncate`."
    )


def test_reports_merge_and_show_shares(tokens: Tokens) -> None:
    first = PackingReport.of_rows([packed_row([tokens([1, 2, 3], "a")], length=4)])
    second = PackingReport.of_rows([packed_row([tokens([1], "b"), tokens([2], "a")], length=4)])
    both = merged([first, second, PackingReport(tasks={"b": TaskCounts(dropped=2)})])
    nothing = dict.fromkeys(TaskCounts.model_fields, 0)
    assert both.to_mapping() == {
        "rows": 2,
        "real_tokens": 5,
        "padding_tokens": 3,
        "loss_tokens": 2,
        "tasks": {
            "a": {**nothing, "examples": 2, "tokens": 4},
            "b": {**nothing, "examples": 1, "tokens": 1, "dropped": 2},
        },
        "padding_share": 3 / 8,
        "examples": 3,
        "dropped": 2,
        "truncated": 0,
        "without_exemplars": 0,
    }
    assert PackingReport().padding_share == 0.0


@given(data=st.data())
def test_a_tally_counts_what_reports_add_up_to(data: st.DataObject) -> None:
    names = st.sampled_from(["a", "b", "c"])
    changes = st.tuples(names, st.sampled_from(["dropped", "truncated", "without_exemplars"]))
    rows = st.lists(st.tuples(names, st.integers(1, 4)), min_size=1, max_size=4)
    start = PackingTally(PackingReport(rows=2, real_tokens=7, tasks={"b": TaskCounts(dropped=1)}))
    tally, before, expected = start.copy(), start.report(), start.report()
    for step in data.draw(st.lists(changes | rows, max_size=8)):
        if isinstance(step, tuple):
            tally.add_change(*step)
            expected = expected + PackingReport(tasks={step[0]: TaskCounts(**{step[1]: 1})})
        else:
            parts = [
                TokenizedExample(np.ones(size, int), np.arange(size) > 0, name, "k", "h")
                for name, size in step
            ]
            row = packed_row(parts, length=16)
            tally.add_row(row)
            expected = expected + PackingReport.of_rows([row])
            assert PackingReport.of_rows([row]) == _report_written_out(row)
    assert tally.report() == expected
    assert list(tally.report().tasks) == list(expected.tasks)
    assert report_from_state(tally.report().model_dump(mode="json")) == expected
    assert start.report() == before


def _report_written_out(row: Packed) -> PackingReport:
    """Go through a row token by token."""
    tasks: dict[str, TaskCounts] = {}
    for segment, name in enumerate(row.tasks, start=1):
        size = sum(1 for place in row.segment_ids if place == segment)
        tasks[name] = tasks.get(name, TaskCounts()) + TaskCounts(examples=1, tokens=size)
    real = sum(1 for place in row.segment_ids if place)
    return PackingReport(
        rows=1,
        real_tokens=real,
        padding_tokens=len(row.segment_ids) - real,
        loss_tokens=sum(1 for label in row.labels[1:] if label != IGNORED_LABEL),
        tasks=tasks,
    )


def _rendered(prompt: str, response: str) -> Rendered:
    return Rendered(prompt=prompt, response=response, task="t", key="k", content_hash="h")


@given(prompt=st.text("ab c\n", min_size=1, max_size=20), response=st.text("ab c", max_size=20))
def test_the_loss_covers_exactly_the_response(tokenizer: Any, prompt: str, response: str) -> None:
    example = tokenize(_rendered(prompt, response), tokenizer)
    assert tokenizer.decode(example.input_ids[example.loss_mask]) == response
    assert tokenizer.decode(example.input_ids) == prompt + response


def mask_written_out(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> list[bool]:
    """The slow definition of the loss mask: token by token, span by span."""
    mask: list[bool] = []
    reached = 0
    for start, end in offsets:
        # The space before a word, which byte-level tokenizers leave out, belongs to the token.
        first = min(start, reached)
        mask.append(any(begin <= first and end <= stop for begin, stop in spans))
        reached = max(reached, end)
    return [bool(index and value) for index, value in enumerate(mask)]


_spans = st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda ends: (min(ends), max(ends)))


@given(offsets=st.lists(_spans, max_size=20), spans=st.lists(_spans, max_size=3))
def test_the_loss_mask_equals_its_written_out_definition(
    offsets: list[tuple[int, int]], spans: list[tuple[int, int]]
) -> None:
    """Also where offsets go back, overlap or are empty."""
    assert packing_module._loss_mask(offsets, spans).tolist() == mask_written_out(offsets, spans)


_texts = st.tuples(st.text("ab c\n", max_size=8), st.text("ab c", max_size=8))


@given(pairs=st.lists(_texts, max_size=8))
def test_many_texts_at_once_equal_one_at_a_time(
    tokenizer: Any, pairs: list[tuple[str, str]]
) -> None:
    rendered = [_rendered(*pair) for pair in pairs]
    many = tokenize_all(rendered, tokenizer)
    assert len(many) == len(rendered)
    for one, together in zip(rendered, many, strict=True):
        encoding = tokenizer(one.text, add_special_tokens=False, return_offsets_mapping=True)
        assert together.input_ids.tolist() == encoding["input_ids"]
        expected = mask_written_out(encoding["offset_mapping"], one.loss_spans)
        assert together.loss_mask.tolist() == expected


def _merging(merges: list[tuple[str, str]], alphabet: str) -> PreTrainedTokenizerFast:
    pieces = [*alphabet, *("".join(pair) for pair in merges)]
    model = models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="e")


def test_a_token_across_the_border_belongs_to_the_prompt() -> None:
    merging = _merging([("a", "b")], "abxce")
    example = tokenize(_rendered("xa", "bc"), merging)
    assert merging.convert_ids_to_tokens(example.input_ids) == ["x", "ab", "c"]
    assert example.loss_mask.tolist() == [False, False, True]


def test_a_space_that_offsets_leave_out_counts_as_part_of_the_token() -> None:
    """GPT-2 style tokenizers report " yes" at the characters of "yes"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("y", "e"), ("ye", "s"), ("Ġ", "yes")]
    pieces = [*alphabet, *("".join(pair) for pair in merges)]
    plain = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.post_processor = processors.ByteLevel(trim_offsets=True)
    plain.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="!")
    example = tokenize(_rendered("q: ", "yes!"), fast)
    assert fast.convert_ids_to_tokens(example.input_ids) == ["q", ":", "Ġyes", "!"]
    assert example.loss_mask.tolist() == [False, False, False, True]
    whole = tokenize(_rendered("q:", " yes é😀!"), fast)
    assert fast.decode(whole.input_ids[whole.loss_mask]) == " yes é😀!"


def test_a_slow_tokenizer_is_refused() -> None:
    class SlowTokenizer:
        is_fast = False
        chat_template = bos_token = bos_token_id = eos_token = eos_token_id = pad_token_id = None

        def __call__(self, text: str, **options: Any) -> dict[str, Any]:
            return {}

        def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
            return ""

    with pytest.raises(DataError) as caught:
        tokenize(_rendered("a", "b"), SlowTokenizer())
    assert str(caught.value) == (
        "Packing needs a fast tokenizer (one that gives character offsets), but SlowTokenizer is a "
        "slow one. Load it with `use_fast=True`."
    )
