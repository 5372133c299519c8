"""Overlap of training with evaluation: the hashed sums against sets of tuples of words, written out."""

import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example as case
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.data import word_rows
from flanmoe.data.contamination import (
    NUM_WORDS,
    EvaluationIndex,
    OverlapReport,
    RuleCounts,
    overlapping_rows,
    overlaps,
)
from flanmoe.data.example import Example
from flanmoe.data.word_rows import folded_words

_STRICTEST_FIRST = ("exact", "whole", "ngram")
Tasks = dict[str, list[Example]]


def slow_words(text: str) -> list[str]:
    """Fold a text character by character."""
    kept = [letter for letter in text.casefold() if letter.isalnum() or letter.isspace()]
    return "".join(kept).split()


def rows_of_words(example: Example, num_words: int) -> set[tuple[str, ...]]:
    """All rows of so many words; all words where there are fewer; nothing where there is none."""
    words = slow_words(f"{example.inputs} {example.target}")
    if len(words) < num_words:
        return {tuple(words)} if words else set()
    return {tuple(words[at : at + num_words]) for at in range(len(words) - num_words + 1)}


def slow_rule(trained: Example, evaluated: Example, num_words: int) -> str | None:
    """The strictest rule that holds between two examples."""
    if trained.content_hash() == evaluated.content_hash():
        return "exact"
    shared = rows_of_words(trained, num_words) & rows_of_words(evaluated, num_words)
    if not shared:
        return None
    return "ngram" if len(next(iter(shared))) == num_words else "whole"


def slow_counts(
    counted: Sequence[Example], others: Sequence[Example], num_words: int
) -> RuleCounts:
    """How many of `counted` overlap with any of the others, by the strictest rule."""
    counts = dict.fromkeys(_STRICTEST_FIRST, 0)
    for one in counted:
        rules = {slow_rule(one, other, num_words) for other in others}
        strictest = next((rule for rule in _STRICTEST_FIRST if rule in rules), None)
        if strictest is not None:
            counts[strictest] += 1
    return RuleCounts(**counts)


def everything(tasks: Tasks) -> list[Example]:
    """The examples of all tasks."""
    return [example for examples in tasks.values() for example in examples]


def streamed(tasks: Tasks) -> dict[str, Iterator[Example]]:
    """Each task as something that can be read once."""
    return {name: iter(examples) for name, examples in tasks.items()}


# Two words and few of them, so that rows meet again, in one example and between examples.
_WORDS = st.lists(st.sampled_from(["a", "B,", "b", "_", "ÄRGER", "don't"]), max_size=9)


# Examples are made in the tests: beartype draws at random, which Hypothesis forbids in strategies.
_DRAWN = st.fixed_dictionaries(
    dict.fromkeys("xyz", st.lists(st.tuples(_WORDS, _WORDS), max_size=4))
)
_Drawn = dict[str, list[tuple[list[str], list[str]]]]


def tasks_of(drawn: _Drawn, side: str) -> Tasks:
    """Make tasks whose names and keys begin with `side`."""
    return {
        f"{side}-{name}": [
            Example(inputs=" ".join(asks), target=" ".join(answers), key=f"{side}{name}{number}")
            for number, (asks, answers) in enumerate(rows)
        ]
        for name, rows in drawn.items()
    }


@given(train=_DRAWN, test=_DRAWN, num_words=st.integers(1, 6))
def test_the_report_counts_what_sets_of_tuples_say(
    train: _Drawn, test: _Drawn, num_words: int
) -> None:
    trained, evaluated = tasks_of(train, "t"), tasks_of(test, "e")
    index = EvaluationIndex.of(streamed(evaluated), num_words=num_words)
    report = overlaps(streamed(trained), index)
    assert report.training == {
        name: slow_counts(examples, everything(evaluated), num_words)
        for name, examples in trained.items()
    }
    assert report.evaluated == {
        name: slow_counts(examples, everything(trained), num_words)
        for name, examples in evaluated.items()
    }
    expected = {
        (training_name, name): (
            slow_counts(examples, others, num_words),
            slow_counts(others, examples, num_words),
        )
        for training_name, examples in trained.items()
        for name, others in evaluated.items()
    }
    assert {
        (pair.training_task, pair.evaluated_task): (pair.training, pair.evaluated)
        for pair in report.pairs
    } == {names: both for names, both in expected.items() if both[0].total}
    assert report.training_sizes == {name: len(part) for name, part in trained.items()}
    assert report.evaluated_sizes == {name: len(part) for name, part in evaluated.items()}


@given(train=_DRAWN, test=_DRAWN, num_words=st.integers(1, 6))
def test_the_rows_to_leave_out_are_those_that_sets_of_tuples_say(
    train: _Drawn, test: _Drawn, num_words: int
) -> None:
    trained, evaluated = tasks_of(train, "t"), tasks_of(test, "e")
    index = EvaluationIndex.of(evaluated, num_words=num_words)
    examples = everything(trained)
    rows = overlapping_rows(examples, index)
    assert rows.tolist() == [
        row
        for row, one in enumerate(examples)
        if any(slow_rule(one, other, num_words) for other in everything(evaluated))
    ]


@given(train=_DRAWN, test=_DRAWN, num_words=st.integers(1, 6))
def test_what_is_shown_is_shared(train: _Drawn, test: _Drawn, num_words: int) -> None:
    trained, evaluated = tasks_of(train, "t"), tasks_of(test, "e")
    report = overlaps(trained, EvaluationIndex.of(evaluated, num_words=num_words), most_shown=2)
    by_key = {one.key: one for one in (*everything(trained), *everything(evaluated))}
    for pair in report.pairs:
        assert 1 <= len(pair.shown) <= 2
        for shown in pair.shown:
            one, other = by_key[shown.training_key], by_key[shown.evaluated_key]
            assert one in trained[pair.training_task]
            assert other in evaluated[pair.evaluated_task]
            assert slow_rule(one, other, num_words) == shown.rule
            texts = [" ".join(slow_words(f"{each.inputs} {each.target}")) for each in (one, other)]
            assert all(f" {shown.text} " in f" {text} " for text in texts)


@given(text=st.text())
@case(text="İstanbul, don't! naïve_words ½ हिन्दी\t13-gram")
def test_folding_is_lower_case_without_punctuation(text: str) -> None:
    assert folded_words(text) == slow_words(text)


def _numbered(first: int, number: int) -> str:
    return " ".join(f"word{at}" for at in range(first, first + number))


@pytest.mark.parametrize(
    ("asked", "trained", "rule"),
    [
        (_numbered(0, 13), f"before {_numbered(0, 13)} after", "ngram"),
        (_numbered(0, 13), f"before {_numbered(0, 12)} after", None),
        (_numbered(0, 40), _numbered(20, 13), "ngram"),
        (_numbered(0, 12), f"before {_numbered(0, 12)} after", None),
        (_numbered(0, 12), f"WORD0 -- {_numbered(1, 11)}!", "whole"),
        (_numbered(0, 12), f"{_numbered(0, 11)} word11", "exact"),
        ("+ - ?", "+ - ?", "exact"),
        ("+ - ?", "* / ?", None),
    ],
)
def test_thirteen_words_are_the_limit(asked: str, trained: str, rule: str | None) -> None:
    assert NUM_WORDS == 13
    index = EvaluationIndex.of({"asked": [Example(inputs=asked, target="")]})
    report = overlaps({"trained": [Example(inputs=trained, target="")]}, index)
    assert [shown.rule for pair in report.pairs for shown in pair.shown] == ([rule] if rule else [])


def test_words_of_neighbours_make_no_row() -> None:
    index = EvaluationIndex.of({"asked": [Example(inputs=_numbered(0, 13), target="")]})
    halves = [
        Example(inputs=_numbered(0, 6), target=""),
        Example(inputs=_numbered(6, 20), target=""),
    ]
    assert overlaps({"trained": halves}, index).pairs == ()


def test_what_is_shown_is_the_first_row_that_both_have() -> None:
    asked = [Example(inputs=_numbered(0, 30), target="end", key="q")]
    trained = [Example(inputs=f"x {_numbered(5, 20)} y", target="end", key="t")]
    (pair,) = overlaps({"t": trained}, EvaluationIndex.of({"e": asked})).pairs
    (shown,) = pair.shown
    assert (shown.training_key, shown.evaluated_key) == ("t", "q")
    assert shown.text == _numbered(5, 13)


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = {
        "e": [Example(inputs=_numbered(at, 15), target="", key=f"{at}") for at in range(9)]
    }
    trained = {"t": [Example(inputs=_numbered(at, 14), target="") for at in range(0, 60, 3)]}

    def report() -> tuple[OverlapReport, list[int]]:
        index = EvaluationIndex.of(evaluated)
        return overlaps(trained, index), overlapping_rows(trained["t"], index).tolist()

    whole = report()
    assert whole[0].training["t"].total > 1
    monkeypatch.setattr(word_rows, "_BATCH_EXAMPLES", 2)
    assert report() == whole
    monkeypatch.setattr(word_rows, "_BATCH_CHARACTERS", 1)
    assert report() == whole


def test_nothing_evaluated_and_nothing_trained_on_share_nothing() -> None:
    examples = [Example(inputs=_numbered(0, 20), target="")]
    nothing = EvaluationIndex.of({})
    assert overlaps({"t": examples}, nothing).pairs == ()
    assert overlapping_rows(examples, nothing).tolist() == []
    assert overlapping_rows([], EvaluationIndex.of({"e": examples})).tolist() == []
    with pytest.raises(ValueError, match="`num_words` must be at least 1, but is 0"):
        EvaluationIndex.of({}, num_words=0)


def test_the_index_states_its_memory() -> None:
    examples = [Example(inputs=_numbered(100 * at, 50), target="") for at in range(400)]
    index = EvaluationIndex.of({"e": examples})
    num_rows = 400 * (50 - 13 + 1)
    # 24 bytes a row of words, 8 for its example and 8 for its task; the rest is of the examples.
    assert 40 * num_rows <= index.num_bytes <= 40 * num_rows + 400 * 64 + 1000


def test_training_is_never_held_as_a_whole() -> None:
    index = EvaluationIndex.of({"e": [Example(inputs=_numbered(0, 20), target="")]})

    def peak_bytes(number: int) -> int:
        stream = (Example(inputs=f"{at} " + "longer " * 60_000, target="") for at in range(number))
        tracemalloc.start()
        try:
            assert overlaps({"t": stream}, index).training_sizes == {"t": number}
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak_bytes(24) < 1.2 * peak_bytes(6)


def test_hashes_are_the_same_in_every_process() -> None:
    examples: Mapping[str, list[Example]] = {"e": [Example(inputs=_numbered(0, 14), target="")]}
    index = EvaluationIndex.of(examples)
    hashes = index.grams.hashes
    assert all(one < other for one, other in pairwise(hashes.tolist()))
    assert np.array_equal(hashes, EXPECTED_HASHES)


# Written down once: a change of the hash would make stored indexes of two versions disagree.
EXPECTED_HASHES = np.asarray([10230974241101656606, 10353925481407047167], dtype=np.uint64)
