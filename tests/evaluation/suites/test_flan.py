"""The suite of FLAN-MoE: what belongs to it, its chance levels, its average against published numbers."""

import os
from collections import Counter
from pathlib import Path

import pytest

from flanmoe.core.seeds import SeedTree
from flanmoe.data.sources.exemplars import exemplar_source
from flanmoe.data.tasks import TaskConfig, load_task
from flanmoe.evaluation.metrics import normalised_average
from flanmoe.evaluation.suites.choice import choose
from flanmoe.evaluation.suites.config import SuiteConfig
from flanmoe.evaluation.suites.flan import BBH_TASKS, MMLU_SUBJECTS, flan_suite
from flanmoe.evaluation.suites.groups import PromptedGroup
from flanmoe.evaluation.suites.loading import load_evaluation

SUITE = flan_suite()
GROUPS = {group.name: group for group in SUITE.groups}

# Chung et al. (arXiv 2210.11416), table 5: normalised average, then MMLU direct and chain of thought, BBH
# direct and chain of thought, TyDiQA, MGSM; each model before and after instruction tuning.
PRINTED = [
    (-9.2, 26.7, 5.6, 27.0, 7.2, 0.0, 0.4),
    (-3.1, 28.7, 12.1, 29.1, 19.2, 1.1, 0.2),
    (-5.1, 25.7, 14.5, 27.8, 14.6, 0.0, 0.5),
    (6.5, 35.9, 33.7, 31.3, 27.9, 4.1, 0.4),
    (-5.0, 25.1, 15.0, 27.7, 16.1, 0.0, 0.3),
    (13.8, 45.1, 40.5, 37.5, 31.5, 12.3, 0.7),
    (-4.1, 25.7, 14.5, 27.4, 19.2, 0.0, 0.8),
    (19.1, 52.4, 45.5, 41.0, 35.2, 16.6, 1.9),
    (-2.9, 25.9, 18.7, 29.5, 19.3, 0.0, 1.0),
    (23.7, 55.1, 48.6, 45.3, 41.4, 19.0, 4.9),
    (6.4, 24.3, 24.1, 30.8, 30.1, 25.0, 3.4),
    (21.9, 49.3, 41.3, 36.4, 31.1, 47.5, 8.2),
    (28.4, 55.1, 49.0, 37.4, 43.0, 40.5, 18.2),
    (38.8, 59.6, 56.9, 47.5, 44.9, 58.7, 28.5),
    (49.1, 71.3, 62.9, 49.1, 63.7, 52.9, 45.9),
    (58.4, 73.5, 70.9, 57.9, 66.3, 67.8, 57.0),
]


def test_constant_chances_reproduce_the_printed_averages() -> None:
    chances = (25.0, 25.0, 25.7, 25.7, 0.0, 0.0)
    errors = [abs(normalised_average(row[1:], chances) - row[0]) for row in PRINTED]
    assert len(errors) == 16
    assert sum(errors) / len(errors) < 0.55
    # Without the chance levels nothing is reproduced.
    raw = [abs(normalised_average(row[1:], (0.0,) * 6) - row[0]) for row in PRINTED]
    assert sum(raw) / len(raw) > 5


def test_what_belongs_to_the_suite() -> None:
    assert {name: (group.mode, group.shots, group.held) for name, group in GROUPS.items()} == {
        "mmlu_direct": ("direct", 5, "out"),
        "mmlu_cot": ("chain_of_thought", 5, "out"),
        "bbh_direct": ("direct", 3, "out"),
        "bbh_cot": ("chain_of_thought", 3, "out"),
        "reasoning_cot": ("chain_of_thought", 8, "in"),
        "qa_direct": ("direct", 0, "in"),
    }
    assert (len(set(MMLU_SUBJECTS)), len(BBH_TASKS)) == (57, 27)
    assert [group.num_tasks for group in SUITE.groups] == [57, 57, 23, 23, 4, 4]
    assert SUITE.averaged == ("mmlu_direct", "bbh_direct", "reasoning_cot", "qa_direct")
    parts = Counter(task.part_of for task in GROUPS["bbh_cot"].tasks if task.part_of)
    assert parts == {"logical_deduction": 3, "tracking_shuffled_objects": 3}


def _mean_chance(group: PromptedGroup) -> float:
    wholes: dict[str, list[float]] = {}
    for task in group.tasks:
        wholes.setdefault(task.part_of or task.name, []).append(task.chance)
    return sum(sum(own) / len(own) for own in wholes.values()) / len(wholes)


def test_chance_levels() -> None:
    assert {task.chance for task in GROUPS["mmlu_direct"].tasks} == {0.25}
    hard = {task.name: task.chance for task in GROUPS["bbh_direct"].tasks}
    free = {name for name, chance in hard.items() if chance == 0}
    assert free == {"dyck_languages", "multistep_arithmetic_two", "object_counting", "word_sorting"}
    assert hard["logical_deduction_seven_objects"] == 1 / 7
    assert _mean_chance(GROUPS["bbh_direct"]) == pytest.approx(0.273, abs=5e-4)
    assert [task.chance for task in GROUPS["reasoning_cot"].tasks] == [0, 0, 0, 0.5]
    assert [task.chance for task in GROUPS["qa_direct"].tasks] == [0.25, 0.25, 0.5, 0.25]


def test_worked_examples_that_lm_eval_ships_are_there() -> None:
    numbers: dict[str, Counter[int]] = {}
    for group in SUITE.groups:
        for task in group.tasks:
            if task.exemplars and task.exemplars.source.name.startswith("exemplars/"):
                size = exemplar_source(task.exemplars.source.name).size()
                numbers.setdefault(group.name, Counter())[min(size, group.shots)] += 1
    assert numbers == {
        # Four subjects have four worked examples.
        "mmlu_cot": {5: 53, 4: 4},
        "bbh_direct": {3: 27},
        "bbh_cot": {3: 27},
        "reasoning_cot": {8: 3},
    }


def test_prompts_of_big_bench_hard_show_options_as_their_examples_have_them() -> None:
    for task in GROUPS["bbh_direct"].tasks:
        assert task.exemplars is not None
        examples = load_task(task.exemplars.source).examples
        if task.style.lettered:
            assert all(example.choices for example in examples)
        elif task.style.options == "dashed":
            assert {len(example.choices) for example in examples} == {2}
        else:
            assert not any("Options:" in example.inputs for example in examples)


@pytest.fixture(scope="module")
def data_dir() -> Path:
    named = os.environ.get("FLANMOE_DATA")
    if not named or not (Path(named) / "mmlu").is_dir() or not (Path(named) / "bbh").is_dir():
        pytest.skip("needs the data sets mmlu and bbh in FLANMOE_DATA")
    return Path(named)


def test_the_chance_among_coloured_objects_is_that_of_the_data(data_dir: Path) -> None:
    task = load_task(TaskConfig(name="bbh", split="test"), data_dir=data_dir)
    name = "reasoning_about_colored_objects"
    numbers = [len(one.choices) for one in task.examples if one.fields["task"] == name]
    expected = sum(1 / number for number in numbers) / len(numbers)
    chance = next(task.chance for task in GROUPS["bbh_cot"].tasks if task.name == name)
    assert chance == pytest.approx(expected)


def test_both_modes_ask_the_same_questions_of_the_real_data(data_dir: Path) -> None:
    loaded = load_evaluation(SuiteConfig(suite="flan"), data_dir=data_dir)
    chosen = choose(loaded, 60, seeds=SeedTree(0))
    asked = {
        group.group.config.name: [
            (questions.config.name, [example.key for example in examples])
            for questions, examples in group.tasks
        ]
        for group in chosen.prompted
    }
    assert asked["mmlu_direct"] == asked["mmlu_cot"]
    assert asked["bbh_direct"] == asked["bbh_cot"]
    for own in asked.values():
        counts = [len(keys) for _, keys in own]
        assert sum(counts) == 60
        assert max(counts) - min(counts) <= 1


def test_what_the_real_data_lacks_is_skipped_by_name(data_dir: Path) -> None:
    loaded = load_evaluation(SuiteConfig(suite="flan"), data_dir=data_dir)
    subjects = {
        one.fields["subject"]
        for one in load_task(
            TaskConfig(name="mmlu", split="validation"), data_dir=data_dir
        ).examples
    }
    skipped = {skip.task for skip in loaded.skipped}
    for subject in MMLU_SUBJECTS:
        for group in ("mmlu_direct", "mmlu_cot"):
            assert (f"{group}/{subject}" in skipped) == (subject not in subjects)
    assert loaded.prompted is not None
    left_out = {one.task: one.number for one in loaded.left_out}
    assert left_out["reasoning_cot/strategyqa"] == 8
