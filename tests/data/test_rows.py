"""Rows to examples: every form that is understood, every message where none fits."""

from typing import Any

import pytest

from flanmoe.core.errors import DataError
from flanmoe.data.example import Example
from flanmoe.data.rows import example_from_row
from flanmoe.data.sources.base import Locator

HERE = Locator("set/train.jsonl", 7)


def read(row: dict[str, Any]) -> Example:
    return example_from_row(row, HERE)


def test_multiple_choice() -> None:
    row = {
        "id": 3,
        "context": "It rained.",
        "question": "Why is it wet?",
        "choices": ["sun", " rain "],
        "label": 1,
        "answer": "rain",
        "rationale": "Rain is wet. So the answer is (B).",
        "subject": "weather",
        "note": None,
    }
    assert read(row) == Example(
        inputs="It rained.\nWhy is it wet?",
        target="rain",
        choices=("sun", "rain"),
        label=1,
        rationales=("Rain is wet.",),
        key="3",
        metadata={"subject": "weather"},
    )


def test_multiple_choice_with_the_index_as_answer() -> None:
    example = read({"question": "Which?", "choices": ["x", "y"], "answer": 0})
    assert (example.label, example.target) == (0, "x")


@pytest.mark.parametrize(
    ("row", "inputs", "target"),
    [
        ({"question": "1 + 1?", "answer": 2}, "1 + 1?", "2"),
        ({"context": "", "question": "Q", "target": "T"}, "Q", "T"),
        ({"instruction": "Add.", "input": "1 1", "output": "2"}, "Add.\n\n1 1", "2"),
        ({"instruction": "Sing.", "input": "", "output": "La."}, "Sing.", "La."),
        (
            {"instruction": "Sum up.", "context": "Long.", "response": "Short."},
            "Sum up.\n\nLong.",
            "Short.",
        ),
        ({"definition": "Negate.", "input": "yes", "output": ["no"]}, "Negate.\n\nyes", "no"),
        ({"inputs": "a b", "targets": "c"}, "a b", "c"),
        ({"prompt": "a b", "completion": "c"}, "a b", "c"),
        ({"input": "a b", "output": "c"}, "a b", "c"),
    ],
)
def test_other_forms(row: dict[str, Any], inputs: str, target: str) -> None:
    example = read(row)
    assert (example.inputs, example.target) == (inputs, target)
    assert example.choices == ()
    assert example.key == "row-7"


def test_options_leave_the_question_and_come_back_as_choices() -> None:
    example = read({"question": "Which?\nOptions:\n(A) x\n(B) y", "answer": "(B)"})
    assert example.inputs == "Which?"
    assert example.choices == ("x", "y")
    assert (example.label, example.target) == (1, "y")
    assert "options_in_text" not in example.metadata


def test_options_that_cannot_be_read_stay_and_are_marked() -> None:
    question = "Which?\nOptions:\n- Sentence A: x\n- Sentence B: y"
    example = read({"question": question, "answer": "Sentence A"})
    assert example.inputs == question
    assert example.choices == ()
    assert example.metadata == {"options_in_text": True}


def test_a_field_of_options_becomes_choices_or_part_of_the_question() -> None:
    row = {"question": "Is it?", "options": "A) Yes B) No", "label": "yes", "answer": "A) Yes"}
    example = read(row)
    assert (example.inputs, example.choices, example.label) == ("Is it?", ("Yes", "No"), 0)
    odd = read({**row, "options": "yes/no", "answer": "yes"})
    assert (odd.inputs, odd.choices) == ("Is it?\nyes/no", ())


def test_several_chains_and_several_targets() -> None:
    chains = [
        {"trigger": "Think.", "rationale": "One. The answer is 4.", "answer": "4"},
        {"trigger": "Think.", "rationale": "Two."},
        {"rationale": ""},
    ]
    example = read({"question": "2 + 2?", "answer": "4", "correct_chains": chains})
    assert example.rationales == ("One.", "Two.")
    many = read({"input": "Greet.", "output": ["Hello.", "Hi."]})
    assert (many.target, many.metadata) == ("Hello.", {"other_targets": ["Hi."]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "Q", "answer": ""},
            "set/train.jsonl:7: the record has no target: `answer`, `target` is missing or empty. "
            "Fill it in, or set `on_bad_record: skip` for the task to leave such records out.",
        ),
        (
            {"question": "Q", "choices": ["x", "y"], "label": None, "answer": None},
            "set/train.jsonl:7: the record has no target: neither `label` nor `answer` is set. Fill "
            "one in, or set `on_bad_record: skip` for the task to leave such records out.",
        ),
        (
            {"question": "Q", "choices": ["x", "y"], "label": 2},
            "set/train.jsonl:7: the label must be between 0 and 1, but is 2.",
        ),
        (
            {"question": "Q", "choices": ["x", "y"], "label": True},
            "set/train.jsonl:7: the label must be between 0 and 1, but is True.",
        ),
        (
            {"question": "Q", "choices": ["x", "y"], "label": 0, "answer": "y"},
            "set/train.jsonl:7: label and answer contradict each other: choice 0 is 'x', the answer "
            "'y'.",
        ),
        (
            {"question": "Q", "choices": ["x"], "label": 0},
            "set/train.jsonl:7: `choices` must hold between 2 and 26 texts, but holds 1.",
        ),
        (
            {"question": "Q", "choices": ["x", " "], "label": 0},
            "set/train.jsonl:7: `choices` must not hold empty texts.",
        ),
        (
            {"question": "Q", "choices": "xy", "label": 0},
            "set/train.jsonl:7: `choices` must be a list of texts, but is 'xy'.",
        ),
        (
            {"question": " ", "answer": "x"},
            "set/train.jsonl:7: the record asks nothing: `question` is empty.",
        ),
        (
            {"question": ["Q"], "answer": "x"},
            "set/train.jsonl:7: the field `question` must be text, but is a list.",
        ),
        (
            {"question": "What is red?", "answer": "box", "image_id": 0},
            "set/train.jsonl:7: the record needs an image (`image_id`), but tasks of text cannot "
            "show one.",
        ),
        (
            {"text": "hello", "intent": "greet"},
            "set/train.jsonl:7: a record must have the fields of a known form (`question`, "
            "`definition + input`, `instruction`, `inputs`, `prompt`, `input`), but has `intent`, "
            "`text`. Rename its fields.",
        ),
    ],
)
def test_records_that_cannot_be_read(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(row)
    assert str(caught.value) == message


def test_equal_content_has_one_hash_whatever_the_source() -> None:
    first = read({"question": "Which?\nOptions:\n(A) x\n(B) y", "answer": "(B)", "id": "a"})
    second = read({"question": " which? ", "choices": ["x", "Y"], "label": 1})
    assert first.content_hash() == second.content_hash()
    assert first.content_hash() != read({"question": "Which?", "answer": "x"}).content_hash()
