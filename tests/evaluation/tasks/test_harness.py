"""lm-eval's own tasks: found by name, taken apart, without data left out, kept per example."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from flanmoe.core.errors import ConfigError, DataError, ModelError
from flanmoe.core.seeds import SeedTree
from flanmoe.evaluation.results import SuiteResult
from flanmoe.evaluation.suites import SuiteConfig, evaluate_suite, load_evaluation
from flanmoe.evaluation.tasks.harness import harness_knows, load_harness_group, run_harness
from flanmoe.testing.tiny_models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROWS = [{"question": f"{n} + 1?", "choices": ["1", str(n + 1)], "label": n % 2} for n in range(6)]
PICKED: dict[str, Any] = {
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}} ",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": "acc"}],
}
WRITTEN: dict[str, Any] = {
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{question}} ",
    "doc_to_target": "{{choices[1]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with two tasks that have data, one that has none, and a group of all three."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, settings, file in (
        ("own_picked", PICKED, data),
        ("own_written", WRITTEN, data),
        ("own_absent", PICKED, tmp_path / "absent.jsonl"),
    ):
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}
        _write(folder / f"{name}.yaml", {"task": name, **source, **settings})
    _write(
        folder / "group.yaml",
        {"group": "own_all", "task": ["own_picked", "own_written", "own_absent"]},
    )
    return folder


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")


def _evaluate(own: Path, *names: str, limit: int | None = None) -> SuiteResult:
    config = SuiteConfig(tasks=names, lm_eval_tasks=str(own), limit=limit)
    return evaluate_suite(tiny_model("llama"), TOKENIZER, config, data_dir=None, seeds=SeedTree(0))


def test_a_group_is_taken_apart_and_what_has_no_data_is_named(own: Path) -> None:
    group = load_harness_group("lm-eval/own_all", own=own)
    assert list(group.tasks) == ["lm-eval/own_picked", "lm-eval/own_written"]
    (skip,) = group.skipped
    assert (skip.task, skip.group) == ("lm-eval/own_absent", "lm-eval/own_all")
    assert "absent.jsonl" in skip.reason


def test_scores_are_those_of_lm_eval(own: Path) -> None:
    found = _evaluate(own, "lm-eval/own_all")
    assert [task.task for task in found.tasks] == ["lm-eval/own_picked", "lm-eval/own_written"]
    assert list(found.clusters) == ["lm-eval/own_all"]
    assert found.partial
    picked, written = found.tasks
    assert picked.headline.accuracy is not None
    assert picked.headline.accuracy.mean == found.harness["lm-eval/own_picked"]["acc,none"]
    assert picked.headline.chance == 0.5
    assert written.headline.accuracy is not None
    assert (
        written.headline.accuracy.mean == found.harness["lm-eval/own_written"]["exact_match,none"]
    )
    # lm-eval says nothing of what guessing would score.
    assert written.headline.chance is None
    first, *_, last = found.examples
    assert (first.key, first.output, len(first.choice_scores)) == ("0", None, 2)
    assert isinstance(last.output, str)
    assert last.loss is None
    assert len({record.content_hash for record in found.examples[:6]}) == 6


def test_a_limit_draws_questions_and_a_larger_one_keeps_them(own: Path) -> None:
    keys = [
        {record.key for record in _evaluate(own, "lm-eval/own_picked", limit=limit).examples}
        for limit in (2, 4)
    ]
    assert [len(some) for some in keys] == [2, 4]
    assert keys[0] < keys[1]


def test_ours_and_theirs_in_one_evaluation(own: Path) -> None:
    found = _evaluate(own, "exemplars/bbh/navigate", "lm-eval/own_picked")
    ours, theirs = found.tasks
    assert ours.headline.loss is not None
    assert theirs.headline.loss is None
    # Over tasks, what each has.
    assert found.macro.loss == found.clusters["bbh"].loss
    assert found.macro.accuracy is not None
    assert found.macro.accuracy.num_values == 2


def test_one_without_any_data_is_refused(own: Path) -> None:
    config = SuiteConfig(tasks=("lm-eval/own_absent",), lm_eval_tasks=str(own))
    with pytest.raises(
        DataError, match=r"for none of 1: lm-eval cannot load its data: .*absent\.jsonl"
    ):
        load_evaluation(config, data_dir=None)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`--lm-eval-tasks` must name a folder"):
        load_harness_group("lm-eval/x", own=tmp_path / "nowhere")


def test_settings_of_ours_have_no_effect_on_theirs() -> None:
    with pytest.raises(ValueError, match="brings its own settings, but `split` is set"):
        SuiteConfig(tasks=({"name": "lm-eval/arc_easy", "split": "test"},))


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(DataError, match=r"no task `arc_eazy`\. Did you mean `arc_easy`\?"):
        load_harness_group("lm-eval/arc_eazy", own=None)


def test_a_plain_name_that_lm_eval_has_says_how_to_ask_for_it(tmp_path: Path) -> None:
    assert harness_knows("hellaswag")
    assert harness_knows("ai2_arc")
    assert not harness_knows("hellaswagg")
    with pytest.raises(DataError, match=r"with data of its own: `lm-eval/hellaswag`\."):
        load_evaluation(SuiteConfig(tasks=("hellaswag",)), data_dir=tmp_path)


def test_code_that_a_model_wrote_is_not_run(own: Path) -> None:
    _write(
        own / "code.yaml",
        {
            **yaml.safe_load((own / "own_written.yaml").read_text()),
            "task": "own_code",
            "unsafe_code": True,
        },
    )
    with pytest.raises(DataError, match="`lm-eval/own_code` runs code that the model wrote"):
        load_harness_group("lm-eval/own_code", own=own)


def test_a_likelihood_that_is_no_number_names_the_question(own: Path) -> None:
    class Broken:
        rank, world_size = 0, 1

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(float("nan"), False) for _ in requests]

    tasks = load_harness_group("lm-eval/own_picked", own=own).tasks
    with pytest.raises(ModelError, match="example `3` of task `lm-eval/own_picked`"):
        run_harness(Broken(), tasks, {"lm-eval/own_picked": [3]})
