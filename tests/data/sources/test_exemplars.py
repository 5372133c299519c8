"""Exemplars of the installed evaluation harness."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from flanmoe.core.errors import DataError
from flanmoe.data.example import Example
from flanmoe.data.sources import exemplars
from flanmoe.data.sources.base import Source
from flanmoe.data.sources.exemplars import (
    Exemplars,
    exemplar_index,
    exemplar_source,
    index_of,
    read_task_file,
)
from flanmoe.data.tasks import Task, TaskConfig, load_task


def task(name: str) -> Task:
    return load_task(TaskConfig(name=name))


def all_tasks() -> dict[str, Task]:
    return {name: task(name) for name in exemplar_index().tasks}


def test_the_harness_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lm_eval", raising=False)
    assert exemplar_index.__wrapped__() == exemplar_index()
    assert "lm_eval" not in sys.modules


def test_every_family_is_there_with_its_examples() -> None:
    tasks = Counter(t.cluster for t in all_tasks().values())
    examples = Counter(t.cluster for t in all_tasks().values() for _ in t.examples)
    assert tasks == {
        "bbh": 23,
        "mmlu_cot": 57,
        "gsm8k_cot": 1,
        "acpbench": 22,
        "acpbench_pddl": 8,
        "babilong": 20,
        "jsonschema_bench": 1,
    }
    assert examples == {
        "bbh": 69,
        "mmlu_cot": 281,
        "gsm8k_cot": 8,
        "acpbench": 44,
        "acpbench_pddl": 16,
        "babilong": 54,
        "jsonschema_bench": 6,
    }


def test_no_example_stands_twice() -> None:
    hashes = Counter(e.content_hash() for t in all_tasks().values() for e in t.examples)
    assert set(hashes.values()) == {1}
    assert exemplar_index().num_repeated == 45


def test_options_were_taken_out_wherever_there_are_some() -> None:
    for name, found in all_tasks().items():
        assert not any("options_in_text" in example.metadata for example in found.examples), name
    with_choices = Counter(
        t.cluster for t in all_tasks().values() for example in t.examples if example.choices
    )
    assert with_choices == {"bbh": 57, "mmlu_cot": 281, "acpbench": 14}


def test_every_chain_ends_before_its_answer() -> None:
    for name, found in all_tasks().items():
        for example in found.examples:
            for rationale in example.rationales:
                assert rationale, name
                assert "answer is" not in rationale[-40:], (name, rationale[-60:])
                assert not rationale.startswith("Let's think step by step"), name


def test_only_big_bench_is_for_evaluation_only() -> None:
    for found in all_tasks().values():
        assert found.evaluation_only == (found.cluster == "bbh")


def test_an_mmlu_exemplar() -> None:
    first = task("exemplars/mmlu_cot/anatomy").examples[0]
    assert first.inputs == (
        "Which of the following is the body cavity that contains the pituitary gland?"
    )
    assert first.choices == ("Abdominal", "Cranial", "Pleural", "Spinal")
    assert (first.label, first.target, first.key) == (1, "Cranial", "mmlu_anatomy-1")
    assert first.rationales[0].endswith("it is contained in the Cranial cavity.")


def test_a_bbh_exemplar_has_the_short_answer_and_the_chain() -> None:
    first = task("exemplars/bbh/date_understanding").examples[0]
    assert (first.label, first.target) == (3, "12/14/1937")
    assert len(first.choices) == 6
    assert first.rationales[0].endswith("that is 12/14/1937.")
    assert first.metadata["instruction"] == "Infer the date from context."


def test_bbh_answers_that_are_words_become_choices() -> None:
    words = task("exemplars/bbh/boolean_expressions").examples[0]
    assert (words.inputs, words.choices, words.label) == (
        "not ( ( not not True ) ) is",
        ("False", "True"),
        0,
    )
    counts = task("exemplars/bbh/object_counting").examples[0]
    assert (counts.choices, counts.target) == ((), "6")


def test_the_eight_grade_school_exemplars_count_once() -> None:
    assert task("exemplars/gsm8k_cot").size == 8
    with pytest.raises(DataError) as caught:
        exemplar_source("exemplars/asdiv_cot")
    assert str(caught.value) == (
        "The exemplars of `exemplars/asdiv_cot` are the same as those of `exemplars/gsm8k_cot` and "
        "count once. Use `exemplars/gsm8k_cot`."
    )


def test_a_planning_question_keeps_its_state_and_its_note() -> None:
    choice = task("exemplars/acpbench/areach_mcq").examples[0]
    assert choice.inputs.startswith("This is a ferry domain")
    assert choice.inputs.endswith("\nWhich of the following actions can eventually be applied?")
    assert choice.label == 0
    free = task("exemplars/acpbench/nexta_gen").examples[0]
    assert free.inputs.endswith("closing parenthesis. Provide only the action.")
    assert free.target == "(move f4-0f f3-0f)"
    formal = task("exemplars/acpbench_pddl/nexta_gen").examples[0]
    assert formal.inputs.startswith("(define (domain grid)")


def test_an_unknown_exemplar_gets_the_nearest_name() -> None:
    with pytest.raises(DataError) as caught:
        exemplar_source("exemplars/mmlu_cot/anatmy")
    assert str(caught.value) == (
        "There is no exemplar task `exemplars/mmlu_cot/anatmy`. Did you mean "
        "`exemplars/mmlu_cot/anatomy`? Families: `exemplars/acpbench/*`, `exemplars/acpbench_pddl/*`, "
        "`exemplars/babilong/*`, `exemplars/bbh/*`, `exemplars/gsm8k_cot`, "
        "`exemplars/jsonschema_bench`, `exemplars/mmlu_cot/*`."
    )


def test_a_source_counts_without_reading_again() -> None:
    source = exemplar_source("exemplars/gsm8k_cot")
    assert isinstance(source, Source)
    assert source.size() == len(list(source.rows())) == 8


def _file(folder: Path, name: str, content: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def _samples(*pairs: tuple[str, str]) -> str:
    samples = [{"question": question, "target": target} for question, target in pairs]
    return yaml.safe_dump({"task": "x", "fewshot_config": {"samples": samples}})


def test_function_tags_are_passed_over(tmp_path: Path) -> None:
    _file(tmp_path, "t.yaml", "task: x\nmetric: !function module.run\nlist: [!function a.b, 2]\n")
    assert read_task_file(tmp_path / "t.yaml") == {"task": "x", "metric": None, "list": [None, 2]}


def test_other_tags_do_not_run_code(tmp_path: Path) -> None:
    _file(tmp_path, "t.yaml", "task: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(DataError, match=r"The exemplar file .*t.yaml cannot be read"):
        read_task_file(tmp_path / "t.yaml")


def test_repeats_within_and_across_files_are_left_out(tmp_path: Path) -> None:
    one = ("1 + 1?", "Add. The answer is 2.")
    two = ("2 + 2?", "Add. The answer is 4.")
    _file(tmp_path, "gsm8k/gsm8k-cot.yaml", _samples(one, one))
    _file(tmp_path, "gsm8k/gsm8k-cot-llama.yaml", _samples(one, two))
    _file(tmp_path, "asdiv/asdiv-cot-llama.yaml", _samples(two))
    index = index_of(tmp_path)
    assert {name: kept.size() for name, kept in index.tasks.items()} == {
        "exemplars/gsm8k_cot": 1,
        "exemplars/gsm8k_cot_llama": 1,
    }
    assert index.repeated == {"exemplars/asdiv_cot": "exemplars/gsm8k_cot_llama"}
    assert index.num_repeated == 3


def test_a_worked_example_without_an_answer_is_an_error(tmp_path: Path) -> None:
    _file(tmp_path, "gsm8k/gsm8k-cot.yaml", _samples(("1 + 1?", "Two, I think")))
    with pytest.raises(DataError, match=r"gsm8k-cot.yaml:1: the worked example names no answer"):
        index_of(tmp_path)


def test_a_chain_that_contradicts_the_short_answer_is_an_error(tmp_path: Path) -> None:
    def bbh(target: str) -> str:
        samples = [{"input": "True is", "target": target}]
        return yaml.safe_dump({"task": "x", "fewshot_config": {"samples": samples}})

    _file(tmp_path, "bbh/cot_fewshot/logic.yaml", bbh("It is. So the answer is True."))
    _file(tmp_path, "bbh/fewshot/logic.yaml", bbh("False"))
    with pytest.raises(DataError, match=r"must end in the short answer 'False'.*ends in 'True'"):
        index_of(tmp_path)


def test_without_the_package_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exemplars.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"not installed\. Run `pip install lm-eval`"):
        exemplar_index.__wrapped__()


def test_examples_of_one_task_have_different_keys() -> None:
    for name, found in all_tasks().items():
        keys = [example.key for example in found.examples]
        assert len(set(keys)) == len(keys), name
        assert all(isinstance(example, Example) for example in found.examples)
        assert isinstance(found.source, Exemplars)
