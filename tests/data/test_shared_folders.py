"""Every split of every folder of the real data: what is read of it, or why it is refused."""

import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from flanmoe.core.errors import DataError
from flanmoe.data.example import Example
from flanmoe.data.rows import example_from_row
from flanmoe.data.sources.finding import find_source, splits_of

pytestmark = pytest.mark.slow

READ = {
    "alpaca": {"train": 15121},
    "aqua": {"dev": 254, "test": 254},
    "arc_challenge": {"train": 1119, "validation": 299, "test": 1172},
    "arc_easy": {"train": 2251, "validation": 570, "test": 2376},
    "asdiv": {"test": 2305},
    "banking77": {"train": 10003, "test": 3080},
    "bbh": {"test": 3428},
    "bigbench_small": {"test": 715},
    "boolq": {"train": 2000, "validation": 3270},
    "clinc150": {"train": 15100, "validation": 3100, "test": 5500},
    "code_alpaca": {"train_2k": 2015, "train_new": 4535},
    "commonsense_qa": {"train": 9741, "validation": 1221},
    "copa": {"train": 400, "validation": 100},
    "divergent_cot": {"coin_flip_train": 1000, "last_letters_train": 350, "quartz_train": 953},
    "dolly": {"train": 2996},
    "flan_cot": {
        "aqua_train": 2728,
        "creak_train": 6915,
        "ecqa_train": 7112,
        "qasc_train": 1084,
        "sensemaking_train": 6070,
        "strategyqa_train": 2061,
    },
    "gsm8k": {"train": 7473, "test": 1319, "test_model_solutions": 1319},
    "instruction_induction": {"train": 8429, "test": 1431},
    "massive_en": {"train": 11514, "test": 2974},
    "medmcqa": {"validation": 2000},
    "mmlu": {"dev": 190, "validation": 1067, "test": 9765},
    "mnli": {"train": 3000, "validation": 2000},
    "multiwoz": {"train": 7239, "test": 901},
    "openbookqa": {"train": 4957, "validation": 500, "test": 500},
    "p3": {"train": 21277},
    "piqa": {"validation": 1838},
    "pubmed_qa": {"test": 1000},
    "sciq": {"validation": 1000},
    "self_instruct": {"seed": 175, "user_oriented": 252},
    "sgd": {"train": 1500, "test": 399},
    "snips": {"train": 13784, "test": 700},
    "social_iqa": {"validation": 1954},
    "strategyqa": {"train": 2061},
    "superni": {"definitions": 1588, "train": 4342, "test": 918},
    "wic": {"train": 2000, "validation": 638},
    "winogrande": {"validation": 1267},
}

_UNANSWERED = "a record must ask and answer, but this one "
_NEEDS_IMAGE = "the record needs an image "
_NO_OUTPUT = "the record has no target: `output`, `response` is missing or empty."
_NO_COMPLETION = "the record has no target: `completion`, `response` is missing or empty."
_PLAIN = f"{_UNANSWERED}is plain text (`text`)."
_SPANS = f"{_UNANSWERED}marks spans of its text, for which there is no form in words "

# How many records of a split are left out, and how the message begins after file and line.
REFUSED = {
    ("alpaca", "train"): (9, _NO_OUTPUT),
    ("code_alpaca", "train_2k"): (2, _NO_OUTPUT),
    ("sgd", "test"): (1, "`turns`, turn 16: `utterance` must hold text, but is empty."),
    ("bbh", "cot_prompts"): (14, _NO_COMPLETION),
    ("mmlu", "cot_prompts"): (38, _NO_COMPLETION),
    ("divergent_cot", "model_samples"): (
        32,
        "the record has no target: `answer`, `target` is missing or empty.",
    ),
    ("easy_vqa", "train"): (20000, _NEEDS_IMAGE),
    ("easy_vqa", "test"): (9673, _NEEDS_IMAGE),
    ("easy_vqa", "images_train"): (4000, _NEEDS_IMAGE),
    ("easy_vqa", "images_test"): (1000, _NEEDS_IMAGE),
    ("nlvr", "dev"): (989, _NEEDS_IMAGE),
    ("nlvr", "test"): (990, _NEEDS_IMAGE),
    ("flan_templates", "templates"): (1608, f"{_UNANSWERED}is a template;"),
    ("flan_templates", "collection_info"): (1945, f"{_UNANSWERED}describes a task "),
    ("instruction_induction", "instructions"): (
        16,
        f"{_UNANSWERED}only says in which words a task can be asked for (`instructions`).",
    ),
    ("restaurants8k", "train"): (8198, _SPANS),
    ("restaurants8k", "test"): (3731, _SPANS),
    ("sgd", "schema_train"): (26, f"{_UNANSWERED}describes a service "),
    ("sgd", "schema_test"): (21, f"{_UNANSWERED}describes a service "),
    ("vicuna_bench", "test"): (78, f"{_UNANSWERED}holds questions of a user, "),
    ("tiny_shakespeare", "train"): (6740, _PLAIN),
    ("tiny_shakespeare", "validation"): (357, _PLAIN),
    ("web_text", "c4"): (300, _PLAIN),
    ("web_text", "wikipedia"): (30, _PLAIN),
    ("wikitext2", "validation"): (60, _PLAIN),
    ("wikitext2", "test"): (62, _PLAIN),
}

# So many records of each split show its form; all of them are read by `make test-all`.
_A_FEW = 200

_SIZES = {(name, split): size for name, sizes in READ.items() for split, size in sizes.items()}


def _read(
    data_dir: Path,
    name: str,
    split: str,
    *,
    labels: dict[str, str] | None = None,
    limit: int | None = None,
) -> tuple[list[Example], list[str]]:
    examples: list[Example] = []
    problems: list[str] = []
    rows = find_source(name, split=split, data_dir=data_dir).rows()
    for locator, row in islice(rows, limit):
        try:
            examples.append(example_from_row(row, locator, labels=labels))
        except DataError as error:
            problems.append(str(error).removeprefix(f"{locator}: "))
    return examples, problems


def test_every_split_is_in_one_of_the_tables(real_data_dir: Path) -> None:
    folders = [entry for entry in real_data_dir.iterdir() if entry.is_dir()]
    found = {(folder.name, split) for folder in folders for split in splits_of(folder)}
    assert found == {*_SIZES, *REFUSED}


@pytest.mark.parametrize(("name", "split"), sorted({*_SIZES, *REFUSED}))
def test_a_split_is_read_or_refused(real_data_dir: Path, name: str, split: str) -> None:
    examples, problems = _read(real_data_dir, name, split, limit=_A_FEW)
    assert bool(examples) == ((name, split) in _SIZES)
    _, beginning = REFUSED.get((name, split), (0, ""))
    assert all(beginning and problem.startswith(beginning) for problem in problems)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "split"), sorted({*_SIZES, *REFUSED}))
def test_what_is_read_of_a_split(real_data_dir: Path, name: str, split: str) -> None:
    examples, problems = _read(real_data_dir, name, split)
    num_refused, beginning = REFUSED.get((name, split), (0, ""))
    assert (len(examples), len(problems)) == (_SIZES.get((name, split), 0), num_refused)
    assert all(problem.startswith(beginning) for problem in problems)
    assert len({example.key for example in examples}) == len(examples)
    for example in examples:
        assert example.inputs
        assert example.target
        if example.choices:
            assert example.label is not None
            assert example.target == example.choices[example.label]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("split", "num_choices"),
    [
        ("aqua_train", {5: 2728}),
        ("creak_train", {0: 1984, 2: 4931}),
        ("ecqa_train", {0: 31, 5: 7081}),
        ("qasc_train", {8: 1084}),
        ("sensemaking_train", {0: 6070}),
    ],
)
def test_options_leave_the_field_of_the_question_too(
    real_data_dir: Path, split: str, num_choices: dict[int, int]
) -> None:
    examples, _ = _read(real_data_dir, "flan_cot", split)
    assert Counter(len(example.choices) for example in examples) == num_choices
    for example in examples:
        assert example.fields["question"] == example.inputs
        assert bool(example.choices) != bool(re.search(r"Options:\n", example.inputs)) or (
            split == "creak_train"
        )


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("mnli", {"entailment": "yes", "neutral": "perhaps", "contradiction": "no"}),
        ("wic", {"true": "yes", "false": "no"}),
    ],
)
def test_labels_in_words_fit_every_record(
    real_data_dir: Path, name: str, labels: dict[str, str]
) -> None:
    examples, problems = _read(real_data_dir, name, "train", labels=labels)
    assert problems == []
    assert {example.choices for example in examples} == {tuple(labels.values())}
    assert {example.label for example in examples} == set(range(len(labels)))


def test_dialogues_keep_their_turns(real_data_dir: Path) -> None:
    examples, _ = _read(real_data_dir, "sgd", "train")
    assert all(len(example.history) % 2 == 0 and example.history for example in examples)
    assert {role for example in examples for role, _ in example.history} == {"user", "assistant"}
    # What ends a dialogue is seldom worth learning.
    farewells = Counter(example.target for example in examples).most_common(4)
    assert sum(times for _, times in farewells) == 465
    assert all(re.fullmatch(r"Have a (great|good|nice) day[.!]", text) for text, _ in farewells)


def test_a_definition_comes_with_one_example(real_data_dir: Path) -> None:
    examples, _ = _read(real_data_dir, "superni", "definitions")
    assert not any("positive_examples" in example.metadata for example in examples)
    assert all("explanation" in example.metadata for example in examples)
