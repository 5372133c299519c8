"""Rows to examples: every form that is understood, every message where none fits."""

from typing import Any

import pytest

from flanmoe.core.errors import DataError
from flanmoe.core.names import listing
from flanmoe.data.example import Example
from flanmoe.data.options import letter
from flanmoe.data.rows import SHAPES, example_from_row
from flanmoe.data.sources.base import Locator

HERE = Locator("set/train.jsonl", 7)


def read(row: dict[str, Any], labels: dict[str, str] | None = None) -> Example:
    return example_from_row(row, HERE, labels=labels)


def message(row: dict[str, Any], labels: dict[str, str] | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read(row, labels)
    return str(caught.value)


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
        fields={
            "context": "It rained.",
            "question": "Why is it wet?",
            "answer": "rain",
            "rationale": "Rain is wet. So the answer is (B).",
            "subject": "weather",
        },
        metadata={"subject": "weather"},
    )


def test_multiple_choice_with_the_index_as_answer() -> None:
    example = read({"question": "Which?", "choices": ["x", "y"], "answer": 0})
    assert (example.label, example.target) == (0, "x")


@pytest.mark.parametrize(
    ("row", "inputs", "target"),
    [
        ({"question": "1 + 1?", "answer": 2}, "1 + 1?", "2"),
        ({"question": "Is it?", "answer": False}, "Is it?", "false"),
        ({"context": "", "question": "Q", "target": "T"}, "Q", "T"),
        ({"instruction": "Add.", "input": "1 1", "output": "2"}, "Add.\n\n1 1", "2"),
        ({"instruction": "Sing.", "input": "", "output": "La."}, "Sing.", "La."),
        ({"instruction": "Sing.", "input": None, "output": "La."}, "Sing.", "La."),
        ({"instruction": "Sing.", "output": ["", "La.", "Lo."]}, "Sing.", "La."),
        ({"instruction": "Sing.", "input": " ", "response": "La."}, "Sing.", "La."),
        ({"instruction": "Sing.", "output": "", "response": ["La."]}, "Sing.", "La."),
        (
            {"instruction": "Sum up.", "context": "Long.", "response": "Short."},
            "Sum up.\n\nLong.",
            "Short.",
        ),
        ({"definition": "Negate.", "input": "yes", "output": ["no"]}, "Negate.\n\nyes", "no"),
        ({"inputs": "a b", "targets": "c"}, "a b", "c"),
        ({"prompt": "a b", "completion": "c"}, "a b", "c"),
        ({"input": "a b", "output": "c"}, "a b", "c"),
        ({"task": "t", "dataset": "d", "input": "a b", "output": "c"}, "a b", "c"),
        (
            {"premise": "It rains.", "hypothesis": "It is wet.", "label": "yes"},
            "It rains.\n\nIt is wet.",
            "yes",
        ),
        ({"premise": "P", "hypothesis": "H", "label": 0}, "P\n\nH", "0"),
        ({"sentence1": "One.", "sentence2": "Two.", "label": "same"}, "One.\n\nTwo.", "same"),
        (
            {"word": "bank", "sentence1": "By it.", "sentence2": "In it.", "label": "false"},
            "bank\n\nBy it.\n\nIn it.",
            "false",
        ),
        ({"text": "hello", "intent": "greet", "tokens": ["hello"], "bio": ["O"]}, "hello", "greet"),
        ({"text": "Long.", "summary": "Short."}, "Long.", "Short."),
        ({"text": "I like it.", "label": 1}, "I like it.", "1"),
        ({"sentence": "I like it.", "label": "good"}, "I like it.", "good"),
        ({"items": ["a dog ", "a cat"], "concept": "animals"}, "a dog, a cat", "animals"),
    ],
)
def test_other_forms(row: dict[str, Any], inputs: str, target: str) -> None:
    example = read(row)
    assert (example.inputs, example.target) == (inputs, target)
    assert example.choices == ()
    assert example.key == "row-7"


@pytest.mark.parametrize(
    ("question", "answer", "stem", "choices", "label"),
    [
        ("Which?\nOptions:\n(A) x\n(B) y", "(B)", "Which?", ("x", "y"), 1),
        ("Which?\nOptions:\n- (A) x\n- (B) y", "(A)", "Which?", ("x", "y"), 0),
        ("Which?\nOptions:\n- x\n- y z\n", "y z", "Which?", ("x", "y z"), 1),
        (
            'Claim: "It rains."\nIs the claim right?\nOptions:\n- yes\n- no',
            "no",
            'Claim: "It rains."\nIs the claim right?',
            ("yes", "no"),
            1,
        ),
        ("Which? A. x B. y", "B", "Which?", ("x", "y"), 1),
    ],
)
@pytest.mark.parametrize("context", [None, "", "It rained. (A) first, then more. "])
def test_options_leave_the_question_and_come_back_as_choices(
    context: str | None,
    question: str,
    answer: str,
    stem: str,
    choices: tuple[str, ...],
    label: int,
) -> None:
    row = {"question": question, "answer": answer}
    example = read(row if context is None else {"context": context, **row})
    before = (context or "").strip()
    assert example.inputs == f"{before}\n{stem}".strip()
    assert example.choices == choices
    assert (example.label, example.target) == (label, choices[label])
    assert "options_in_text" not in example.metadata
    kept = {} if context is None else {"context": before}
    assert example.fields == {**kept, "question": stem, "answer": answer}


def test_options_below_a_passage_that_asks_leave_an_empty_question() -> None:
    row = {"context": "Rain. What is it?", "question": "Options:\n- wet\n- dry", "answer": "wet"}
    example = read(row)
    assert (example.inputs, example.choices) == ("Rain. What is it?", ("wet", "dry"))
    assert example.fields == {"context": "Rain. What is it?", "question": "", "answer": "wet"}


def test_options_that_cannot_be_read_stay_and_are_marked() -> None:
    question = "Which?\nOptions:\n- Sentence A: x\n- Sentence B: y"
    example = read({"question": question, "answer": "Sentence A"})
    assert example.inputs == question
    assert example.choices == ()
    assert example.fields["question"] == question
    assert example.metadata == {"options_in_text": True}


def test_a_field_of_options_becomes_choices_or_part_of_the_question() -> None:
    row = {"question": "Is it?", "options": "A) Yes B) No", "label": "yes", "answer": "A) Yes"}
    example = read(row)
    assert (example.inputs, example.choices, example.label) == ("Is it?", ("Yes", "No"), 0)
    assert example.fields == {"question": "Is it?", "label": "yes", "answer": "A) Yes"}
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
            {"ask": "hello", "reply": "greet"},
            "set/train.jsonl:7: a record must have the fields of a known form (`messages`, `question`, "
            "`definition + input`, `instruction`, `inputs`, `prompt`, `input`, `premise + hypothesis`, "
            "`sentence1 + sentence2`, `text + intent`, `text + summary`, `text + label`, `sentence + "
            "label`, `items + concept`), but has `ask`, `reply`. Rename its fields.",
        ),
        (
            {"definition": "Negate.", "positive_examples": []},
            "set/train.jsonl:7: a task definition must have a positive example (`positive_examples`: a "
            "list of mappings with `input` and `output`), but has [].",
        ),
        (
            {"items": ["a", 2], "concept": "letters"},
            "set/train.jsonl:7: the field `items` must be text, but is a list.",
        ),
    ],
)
def test_records_that_cannot_be_read(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(row)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"text": "Once upon a time.", "title": "A tale"}, "is plain text (`text`)"),
        (
            {"text": "at nine", "tokens": ["at", "nine"], "bio": ["O", "B-time"]},
            "marks spans of its text, for which there is no form in words (`tokens`, `bio`)",
        ),
        (
            {"input_pattern": "{text}?", "target_pattern": "{answer}", "dataset": "x"},
            "is a template; tasks use one through `template.family` (`input_pattern`, "
            "`target_pattern`)",
        ),
        (
            {"task": "t", "instructions": ["Say no."]},
            "only says in which words a task can be asked for (`instructions`)",
        ),
        ({"service_name": "Trains", "slots": []}, "describes a service (`service_name`)"),
        (
            {"dataset": "x", "generic_task_category": "y"},
            "describes a task (`dataset`, `generic_task_category`)",
        ),
        (
            {"turns": ["Who?", "Why?"]},
            "holds questions of a user, the answers to which are to be judged (`turns`)",
        ),
    ],
)
def test_records_without_an_answer_are_called_what_they_are(row: dict[str, Any], what: str) -> None:
    assert message(row) == (
        f"set/train.jsonl:7: a record must ask and answer, but this one {what}. Choose another split, "
        "or set `on_bad_record: skip` for the task to leave such records out."
    )


def test_the_message_about_unknown_fields_names_every_form() -> None:
    said = message({"ask": "hello"})
    assert listing([" + ".join(shape.needs) for shape in SHAPES], limit=len(SHAPES)) in said


def test_a_definition_asks_by_its_first_positive_example() -> None:
    first = {"input": "yes", "output": "no", "explanation": "The opposite."}
    other = {"input": "up", "output": "down", "explanation": "The opposite."}
    row = {"task": "t", "definition": "Negate.", "positive_examples": [first]}
    example = read(row)
    assert (example.inputs, example.target) == ("Negate.\n\nyes", "no")
    assert example.metadata == {"task": "t", "explanation": "The opposite."}
    assert example.fields == {"task": "t", "definition": "Negate.", **first}
    several = read({**row, "positive_examples": [first, other]})
    assert several.metadata["positive_examples"] == [other]
    assert several == Example(
        **{name: getattr(example, name) for name in ("inputs", "target", "key", "fields")},
        metadata={**example.metadata, "positive_examples": [other]},
    )


LABELS = {"entailment": "yes", "neutral": "perhaps", "contradiction": "no"}
PAIR = {"premise": "It rains.", "hypothesis": "It is wet."}


@pytest.mark.parametrize(
    ("name", "label"), [("entailment", 0), (" neutral ", 1), (["contradiction"], 2)]
)
def test_labels_in_words_become_choices_in_their_order(name: Any, label: int) -> None:
    example = read({**PAIR, "label": name}, LABELS)
    assert example.choices == ("yes", "perhaps", "no")
    assert (example.label, example.target) == (label, example.choices[label])
    assert example.inputs == "It rains.\n\nIt is wet."
    backwards = read({**PAIR, "label": name}, dict(reversed(LABELS.items())))
    assert backwards.choices == ("no", "perhaps", "yes")
    assert (backwards.label, backwards.target) == (2 - label, example.target)


@pytest.mark.parametrize(
    ("row", "labels", "target"),
    [
        ({"text": "Nice.", "label": 1}, {"0": "bad", "1": "good"}, "good"),
        ({"sentence": "Poor.", "label": 0}, {"0": "bad", "1": "good"}, "bad"),
        (
            {"sentence1": "a", "sentence2": "b", "label": True},
            {"false": "no", "true": "yes"},
            "yes",
        ),
        ({"text": "hello", "intent": "greet"}, {"bye": "leave", "greet": "say hello"}, "say hello"),
        ({"question": "Is it?", "answer": "no"}, {"yes": "right", "no": "wrong"}, "wrong"),
        ({"question": "Is it?", "label": 0}, {"0": "no", "1": "yes"}, "no"),
    ],
)
def test_labels_are_found_as_they_are_written(
    row: dict[str, Any], labels: dict[str, str], target: str
) -> None:
    example = read(row, labels)
    assert example.target == target
    assert example.choices == tuple(labels.values())


def test_a_closing_sentence_with_the_label_in_words_leaves_the_rationale() -> None:
    row = {**PAIR, "label": "entailment", "rationale": "Rain is wet. The answer is yes."}
    assert read(row, LABELS).rationales == ("Rain is wet.",)


def test_more_labels_than_letters_have_names() -> None:
    labels = {str(number): f"word {number}" for number in range(60)}
    example = read({"text": "x", "label": 27, "rationale": "So. The answer is (AB)."}, labels)
    assert (example.label, example.target) == (27, "word 27")
    assert example.rationales == ("So.",)
    names = [letter(index) for index in range(60)]
    assert names[24:29] + names[51:54] == ["Y", "Z", "AA", "AB", "AC", "AZ", "BA", "BB"]
    assert len(set(names)) == 60


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {**PAIR, "label": "maybe"},
            "the label must be one of `entailment`, `neutral`, `contradiction` (`labels` of the task), "
            "but is `maybe`.",
        ),
        (
            {**PAIR, "label": -1},
            "the label must be one of `entailment`, `neutral`, `contradiction` (`labels` of the task), "
            "but is `-1`.",
        ),
        (
            {**PAIR, "label": None},
            "the record has no target: `label`, `answer` is missing or empty. Fill it in, or set "
            "`on_bad_record: skip` for the task to leave such records out.",
        ),
        (
            PAIR,
            "the record has no target: `label`, `answer` is missing or empty. Fill it in, or set "
            "`on_bad_record: skip` for the task to leave such records out.",
        ),
        (
            {**PAIR, "label": ["neutral", "entailment"]},
            "the record must have one label, but has `neutral`, `entailment`.",
        ),
        *(
            (
                row,
                "the record has answer options of its own, so `labels` of the task would have no "
                "effect. Leave `labels` out.",
            )
            for row in (
                {"question": "Which?", "choices": ["x", "y"], "label": 0},
                {"question": "Is it?", "options": "A) Yes B) No", "answer": "A) Yes"},
                {"question": "Is it?\nOptions:\n- yes\n- no", "answer": "yes"},
            )
        ),
        (
            {"messages": [{"role": "user", "content": "Hi."}]},
            "the record has a conversation (`messages`), so `labels` of the task would have no effect. "
            "Leave `labels` out.",
        ),
    ],
)
def test_labels_that_do_not_fit(row: dict[str, Any], problem: str) -> None:
    assert message(row, LABELS) == f"set/train.jsonl:7: {problem}"


def test_equal_content_has_one_hash_whatever_the_source() -> None:
    first = read({"question": "Which?\nOptions:\n(A) x\n(B) y", "answer": "(B)", "id": "a"})
    second = read({"question": " which? ", "choices": ["x", "Y"], "label": 1})
    assert first.content_hash() == second.content_hash()
    assert first.content_hash() != read({"question": "Which?", "answer": "x"}).content_hash()
