"""Tasks: what a config means, what is read, what is left out and counted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flanmoe.core.errors import ConfigError, DataError
from flanmoe.data.renderers import Exchange, Occasion, renderer_named
from flanmoe.data.tasks import (
    CHOICE_SCORER,
    REFERENCE_SCORER,
    Rejected,
    TaskConfig,
    expand,
    load_task,
    load_tasks,
    without_format,
)

Write = Callable[..., Path]

GOOD = {"question": "1 + 1?", "answer": "2"}
BAD = {"question": "1 + 1?", "answer": ""}


def message(run: Callable[[], Any], kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as caught:
        run()
    return str(caught.value)


def test_a_task_of_the_data_folder(data_dir: Path) -> None:
    task = load_task(TaskConfig(name="some"), data_dir=data_dir)
    assert (task.name, task.cluster, task.size) == ("some", "some", 12)
    assert task.examples[0].key == "some-1"
    assert task.examples is task.examples
    assert task.scorer == REFERENCE_SCORER
    assert not task.evaluation_only
    assert task.rejected == ()


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path, write_rows: Write) -> None:
    task = load_task(TaskConfig(name=str(write_rows(tmp_path / "rows.jsonl", [BAD]))))
    assert "has no target" in message(lambda: task.examples)


def test_a_bad_record_stops_with_file_and_line(tmp_path: Path, write_rows: Write) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [GOOD, BAD])
    assert message(lambda: load_task(TaskConfig(name=str(file))).size) == (
        f"{file}:2: the record has no target: `answer`, `target` is missing or empty. Fill it in, or "
        "set `on_bad_record: skip` for the task to leave such records out."
    )


def test_bad_records_can_be_left_out_and_are_listed(tmp_path: Path, write_rows: Write) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [BAD, GOOD, {"tale": "x"}])
    task = load_task(TaskConfig(name=str(file), on_bad_record="skip"))
    assert task.size == 1
    assert [rejected.locator for rejected in task.rejected] == [f"{file}:1", f"{file}:3"]
    assert isinstance(task.rejected[0], Rejected)
    assert "has no target" in task.rejected[0].reason
    assert "known form" in task.rejected[1].reason


def test_lines_that_are_no_records_stop_or_are_left_out_as_asked(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "q", "answer": "a"}\nnot json\n')
    strict = load_task(TaskConfig(name=str(file)))
    assert "rows.jsonl:2: the line is not valid JSON" in message(lambda: strict.size)
    lenient = load_task(TaskConfig(name=str(file), on_bad_record="skip"))
    assert lenient.size == 1
    (record,) = lenient.rejected
    assert record.locator == f"{file}:2"
    assert "the line is not valid JSON" in record.reason


def test_an_empty_set_is_an_error(tmp_path: Path, write_rows: Write) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [])
    assert message(lambda: load_task(TaskConfig(name=str(file))).size) == (
        f"The task `{file}` must hold at least one example, but its source has 0 records. "
        "Check the file."
    )
    only_bad = write_rows(tmp_path / "bad.jsonl", [BAD, BAD])
    task = load_task(TaskConfig(name=str(only_bad), on_bad_record="skip"))
    assert message(lambda: task.size).startswith(
        f"The task `{only_bad}` must hold at least one example, but none of its 2 records can be "
        f"used; the first: {only_bad}:1: the record has no target"
    )


def test_a_family_becomes_its_tasks() -> None:
    config = TaskConfig(name="exemplars/mmlu_cot/*", renderer="direct", rate=2.0)
    found = expand([config, TaskConfig(name="exemplars/gsm8k_cot")])
    assert len(found) == 58
    assert found[0] == TaskConfig(
        name="exemplars/mmlu_cot/abstract_algebra",
        renderer="direct",
        rate=2.0,
        group="exemplars/mmlu_cot/*",
    )
    assert found[-1] == TaskConfig(name="exemplars/gsm8k_cot")
    tasks = load_tasks([config])
    assert {task.cluster for task in tasks} == {"mmlu_cot"}
    assert tasks[0].renderer is renderer_named("direct")


def test_parts_of_a_family_can_be_left_out() -> None:
    config = TaskConfig(name="exemplars/*", exclude=("bbh/*", "mmlu_cot/college_*", "gsm8k_cot"))
    names = [single.name for single in expand([config])]
    assert not any("bbh" in name or "college" in name or "gsm8k" in name for name in names)
    assert "exemplars/mmlu_cot/anatomy" in names
    assert "exemplars/babilong/qa1" in names


def test_patterns_that_match_nothing_are_errors() -> None:
    assert message(
        lambda: expand([TaskConfig(name="exemplars/babilong/*", exclude=("qa99",))])
    ).startswith(
        "The `exclude` pattern `qa99` matches no task below `exemplars/babilong/`. Did you mean `qa9`?"
    )
    assert (
        message(lambda: expand([TaskConfig(name="exemplars/babilong/*", exclude=("qa*",))]))
        == "The task `exemplars/babilong/*` leaves nothing: `exclude` matches all of it."
    )
    assert message(lambda: expand([TaskConfig(name="exemplars/mmlu/*")])) == (
        "No tasks are called `exemplars/mmlu/*`. Did you mean `exemplars/mmlu_cot/*`? `/*` works for "
        "exemplars: `exemplars/acpbench/*`, `exemplars/acpbench_pddl/*`, `exemplars/babilong/*`, "
        "`exemplars/bbh/*`, `exemplars/mmlu_cot/*`."
    )


def test_one_task_cannot_be_a_family() -> None:
    assert message(lambda: load_task(TaskConfig(name="exemplars/bbh/*")), ConfigError) == (
        "One task is needed here, but `exemplars/bbh/*` stands for all tasks of a family. Name one of "
        "them."
    )


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (
            {"name": "gsm8k", "renderer": "dirct"},
            "  renderer: must be one of `auto`, `chain_of_thought`, `direct`, `instruction`, but is "
            "`dirct`. Did you mean `direct`?",
        ),
        ({"name": "gsm8k", "rates": 1}, "  rates: unknown key `rates`. Did you mean `rate`?"),
        (
            {"name": "gsm8k", "exclude": ["x"]},
            "  (top level): `exclude` only works with a family such as `exemplars/mmlu_cot/*`, but is "
            "set for `gsm8k`",
        ),
    ],
)
def test_mistakes_in_a_config(values: dict[str, Any], problem: str) -> None:
    assert problem in message(lambda: TaskConfig.parse(values), ConfigError)


@pytest.mark.parametrize(
    ("config", "identity"),
    [
        (TaskConfig(name="gsm8k"), "gsm8k"),
        (TaskConfig(name="gsm8k", split="test"), "gsm8k:test"),
        (TaskConfig(name="gsm8k", renderer="direct"), "gsm8k@direct"),
        (
            TaskConfig(name="openai/gsm8k", subset="main", split="test", renderer="direct"),
            "openai/gsm8k[main]:test@direct",
        ),
    ],
)
def test_the_name_in_reports_says_what_is_not_the_default(
    config: TaskConfig, identity: str
) -> None:
    assert config.identity == identity


@pytest.mark.parametrize("identity", ["a[b]:c@d", "a[b]:c"])
def test_a_task_without_its_format(identity: str) -> None:
    assert without_format(identity) == "a[b]:c"


def test_the_scorer_follows_from_the_examples(tmp_path: Path, write_rows: Write) -> None:
    choice = {"question": "Which?", "choices": ["x", "y"], "label": 0}
    file = write_rows(tmp_path / "choices.jsonl", [choice])
    assert load_task(TaskConfig(name=str(file))).scorer == CHOICE_SCORER
    mixed = write_rows(tmp_path / "mixed.jsonl", [choice, GOOD])
    assert load_task(TaskConfig(name=str(mixed))).scorer == REFERENCE_SCORER


def test_a_cluster_can_be_named(data_dir: Path) -> None:
    assert load_task(TaskConfig(name="few", cluster="sums"), data_dir=data_dir).cluster == "sums"


REAL = {
    "gsm8k": ("train", 7473, 0),
    "alpaca": ("train", 15121, 9),
    "flan_cot": ("strategyqa_train", 2061, 0),
    "arc_challenge": ("test", 1172, 0),
    "superni": ("test", 918, 0),
}


@pytest.mark.parametrize("name", REAL)
def test_real_data_is_read(real_data_dir: Path, name: str, occasion: Occasion) -> None:
    split, size, num_rejected = REAL[name]
    config = TaskConfig(name=name, split=split, on_bad_record="skip")
    task = load_task(config, data_dir=real_data_dir)
    assert (task.size, len(task.rejected)) == (size, num_rejected)
    exchange = task.renderer(task.examples[0], occasion)
    assert exchange.user
    assert exchange.response


def test_real_rationales_lose_their_calculator_marks(
    real_data_dir: Path, occasion: Occasion
) -> None:
    task = load_task(TaskConfig(name="gsm8k"), data_dir=real_data_dir)
    assert not any("<<" in example.rationales[0] for example in task.examples)
    response = task.renderer(task.examples[0], occasion).response
    assert response.endswith("\nThe answer is 72.")


def test_exemplars_have_the_hashes_of_the_same_questions_elsewhere(real_data_dir: Path) -> None:
    """MMLU's exemplars come from its dev split; there the options stand in a field of their own."""
    dev = load_task(TaskConfig(name="mmlu", split="dev"), data_dir=real_data_dir)
    known = {example.content_hash() for example in dev.examples}
    subjects = {example.metadata["subject"] for example in dev.examples}
    exemplars = [
        example
        for task in load_tasks([TaskConfig(name="exemplars/mmlu_cot/*")])
        for example in task.examples
        if task.name.rpartition("/")[2] in subjects
    ]
    # The rest differ in a character or two between the two copies.
    assert sum(example.content_hash() in known for example in exemplars) == 177
    assert len(exemplars) == 187


def test_real_big_bench_hard_is_for_evaluation_only(real_data_dir: Path) -> None:
    for name in ("bbh", "bigbench_small"):
        task = load_task(TaskConfig(name=name, split="test"), data_dir=real_data_dir)
        assert task.evaluation_only


def test_flans_templates_are_those_of_the_data_folder(
    tmp_path: Path, write_rows: Write, occasion: Occasion
) -> None:
    patterns = [
        {
            "file": "flan/v2/templates.py",
            "group": "PATTERNS",
            "dataset": "skies",
            "index": 0,
            "input_pattern": "{sky}. Rain?",
            "target_pattern": "{answer}",
        }
    ]
    write_rows(tmp_path / "flan_templates" / "templates.jsonl.gz", patterns)
    write_rows(
        tmp_path / "skies" / "train.jsonl", [{"question": "?", "sky": "Grey", "answer": "yes"}]
    )
    config = TaskConfig.parse({"name": "skies", "template": {"family": "flan/skies"}})
    task = load_task(config, data_dir=tmp_path)
    assert task.renderer(task.examples[0], occasion) == Exchange(user="Grey. Rain?", response="yes")


def test_a_number_of_examples_is_drawn_once_and_nested(tmp_path: Path, write_rows: Write) -> None:
    rows = [{"question": f"q{number}", "answer": f"a{number}"} for number in range(50)]
    name = str(write_rows(tmp_path / "rows.jsonl", rows))

    def kept(number: int | None) -> list[str]:
        task = load_task(TaskConfig(name=name, max_examples=number))
        assert [one.content_hash() for one in task.examples] == list(task.content_hashes)
        assert task.num_left_out == 0
        return [example.target for example in task.examples]

    every = kept(None)
    assert kept(50) == kept(80) == every
    few, more = kept(5), kept(20)
    assert (len(few), len(more)) == (5, 20)
    assert few == kept(5) != every[:5]
    # A larger number keeps the examples of a smaller one; all stay in the order of the file.
    assert set(few) < set(more) < set(every)
    assert more == sorted(more, key=every.index)


def test_what_is_removed_from_a_few_examples_is_counted_alone(
    tmp_path: Path, write_rows: Write
) -> None:
    rows = [{"question": f"q{number}", "answer": f"a{number}"} for number in range(50)]
    task = load_task(
        TaskConfig(name=str(write_rows(tmp_path / "rows.jsonl", rows)), max_examples=6)
    )
    left = task.without(np.array([0, 2]))
    assert (left.size, left.num_left_out) == (4, 2)
    assert [one.target for one in left.examples] == [
        one.target for place, one in enumerate(task.examples) if place not in (0, 2)
    ]
