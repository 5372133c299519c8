"""`flanmoe eval`: suites, the plan, what is refused, going on after a stop, comparing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flanmoe.cli.main import invoke

ObjectOf = Callable[[list[str]], dict[str, Any]]
SMOKE = ["--suite", "smoke", "--max-new-tokens", "4", "--batch-size", "4"]


def test_the_smoke_suite_needs_no_data(base: Path, tmp_path: Path, object_of: ObjectOf) -> None:
    out = tmp_path / "out"
    said = object_of(["eval", str(base), *SMOKE, "--out", str(out)])
    assert {group["group"]: group["partial"] for group in said["groups"]} == {
        "letters_direct": False,
        "written_direct": False,
        "written_cot": False,
    }
    assert said["num_examples"] == 14
    assert not said["partial"]
    # What is shown is not asked.
    left_out = {one["task"]: one["number"] for one in said["left_out"]}
    assert left_out["written_cot/gsm8k_cot"] == 4
    rows = {row["group"]: (row["questions"], row["new_tokens"]) for row in said["plan"]["groups"]}
    assert rows == {"letters_direct": (6, 0), "written_direct": (4, 16), "written_cot": (4, 16)}
    # The default on a CPU.
    assert said["settings"]["limit"] == 100
    examples = [json.loads(line) for line in (out / "examples.jsonl").read_text().splitlines()]
    assert len(examples) == 14
    assert all(example["prompt_hash"] and example["score"] is not None for example in examples)


def test_the_plan_is_printed_before_the_scores(
    base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["eval", str(base), *SMOKE, "--limit", "0"]) == 0
    said = capfd.readouterr().err
    assert "every question" in said
    assert said.index("new tokens at most") < said.index("Scores of")
    assert said.index("Scores of") < said.index("Chance-normalised")


def test_an_evaluation_goes_on_and_ends_the_same(
    base: Path, tmp_path: Path, object_of: ObjectOf, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["eval", str(base), *SMOKE, "--out", str(out)]
    first = object_of(arguments)
    examples = (out / "examples.jsonl").read_text()
    (out / "examples.jsonl").unlink()
    (out / "scores.json").unlink()
    assert invoke(arguments) == 2
    said = capfd.readouterr().err
    assert "go on with the evaluation that is in it with `--resume`" in said
    finished = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    seconds = [row["spent"]["seconds"] for row in finished if "spent" in row]
    again = object_of([*arguments, "--resume"])
    assert again["normalised_average"] == first["normalised_average"]
    assert again["clusters"] == first["clusters"]
    assert (out / "examples.jsonl").read_text() == examples
    # Nothing was left to compute, and what the first leg cost is kept.
    assert again["tokens"] == first["tokens"]
    assert seconds[-1] < again["seconds"]
    assert invoke([*arguments, "--resume", "--limit", "5"]) == 2
    assert "but differ in settings" in capfd.readouterr().err


def test_routing_is_recorded_beside_the_same_scores(
    sparse: Path, tmp_path: Path, object_of: ObjectOf
) -> None:
    arguments = ["eval", str(sparse), *SMOKE]
    out = tmp_path / "out"
    found = object_of([*arguments, "--out", str(out), "--routing"])
    plain = object_of(arguments)
    assert found["clusters"] == plain["clusters"]
    routing = json.loads((out / "routing.json").read_text())
    assert [row["name"] for row in routing["tasks"]["rows"]] == [
        task["task"] for task in found["tasks"]
    ]
    assert [row["name"] for row in routing["clusters"]["rows"]] == list(found["clusters"])
    assert routing["not_recorded"] == []
    # What is written is read again, but for the last token of each answer.
    read = sum(row["tokens"] for row in routing["tasks"]["rows"])
    assert found["tokens"] <= read <= found["tokens"] + found["generated_tokens"]
    for row in routing["tasks"]["rows"]:
        for layer, top_k in zip(row["layers"], routing["top_k"], strict=True):
            assert sum(layer["counts"]) == top_k * row["tokens"]
    assert (out / "routing.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--routing"], "`--out` names no folder"),
        (["--routing", "--out", "OUT"], "LlamaForCausalLM has no experts"),
        (["--routing", "--out", "OUT", "--resume"], "must see every request"),
        (["--capacity-drops"], "needs experts that take a limited number of tokens, but Llama"),
    ],
)
def test_what_a_dense_model_cannot_do_is_refused(
    arguments: list[str],
    sentence: str,
    base: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    written = [str(tmp_path / "new") if one == "OUT" else one for one in arguments]
    assert invoke(["eval", str(base), *SMOKE, *written]) == 2
    assert sentence in capfd.readouterr().err


def test_two_results_of_a_suite_are_compared_by_group(
    base: Path, tmp_path: Path, object_of: ObjectOf, capfd: pytest.CaptureFixture[str]
) -> None:
    folders = [str(tmp_path / name) for name in ("a", "b")]
    for folder in folders:
        object_of(["eval", str(base), *SMOKE, "--out", folder])
    compared = object_of(["eval", "--compare", *folders])
    assert list(compared["groups"]) == ["letters_direct", "written_direct", "written_cot"]
    assert compared["pooled"]["accuracy"]["difference"]["mean"] == 0
    capfd.readouterr()
    assert invoke(["eval", "--compare", *folders]) == 0
    assert "written_cot: accuracy over tasks" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--suite", "flam"],
            "The suite `flam` is not known. Did you mean `flan`? Known: `flan`, `held-out`, `smoke`.",
        ),
        (
            ["--suite", "flan", "--task", "gsm8k"],
            "The suite `flan` must be evaluated by itself, but `--task gsm8k` stands beside it.",
        ),
        (
            ["--suite", "smoke", "--resume"],
            "`--resume` goes on with what an evaluation left in a folder, but `--out` names none.",
        ),
        (
            ["--task", "lm-eval/arc_easy", "--split", "test"],
            "but `lm-eval/arc_easy` is a task of lm-eval and has none.",
        ),
        (
            ["--task", "lm-eval/x", "--lm-eval-tasks", "nowhere"],
            "`--lm-eval-tasks` must name a folder with YAML tasks, but nowhere is no folder.",
        ),
        (
            ["--suite", "smoke", "--limit", "1"],
            "each of the 2 tasks of `letters_direct`, but is 1.",
        ),
        (
            ["--task", "hellaswag"],
            "lm-eval has a task of this name, with data of its own: `lm-eval/hellaswag`.",
        ),
        (
            ["--suite", "flan", "--data-dir", "."],
            "for none of 176: The data folder . holds no data set `mmlu`.",
        ),
    ],
)
def test_mistakes_are_one_sentence_before_a_model_is_loaded(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLANMOE_DATA", raising=False)
    assert invoke(["eval", "nowhere/at-all", *arguments]) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert printed.err.startswith("Error: ")


def test_resuming_needs_something_to_go_on_with(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert invoke(["eval", str(base), *SMOKE, "--out", str(tmp_path), "--resume"]) == 2
    assert (
        "must hold an evaluation to go on with, but has no requests.jsonl" in capfd.readouterr().err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_recipe_scores_a_suite_and_reports_it_without_losses(
    base: Path, tmp_path: Path, object_of: ObjectOf
) -> None:
    stages = [{"stage": "evaluate", "suite": "smoke", "max_new_tokens": 4, "limit": 3}]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"name": "scores", "model": str(base), "stages": stages}))
    planned = object_of(["plan", str(recipe)])
    assert planned["arms"]["scores"]["seconds"] > 0
    said = object_of(["run", str(recipe), "--out", str(tmp_path / "out")])
    before = said["arms"]["scores"]["before"]
    # Three questions a group.
    assert before["accuracy_examples"] == 9
    assert "loss" not in before
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "written_cot/gsm8k_cot" in report


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({}, "needs either `tasks` or a `suite`, but found neither"),
        ({"suite": "smoke", "tasks": ["arc_easy"]}, "either `tasks` or a `suite`, but found both"),
        ({"suite": "smok"}, "but is `smok`. Did you mean `smoke`?"),
    ],
)
def test_a_recipe_names_tasks_or_a_suite(
    stage: dict[str, Any], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    stages = [{"stage": "evaluate", **stage}]
    recipe.write_text(yaml.safe_dump({"name": "scores", "model": "nowhere", "stages": stages}))
    assert invoke(["plan", str(recipe)]) == 2
    assert said in capfd.readouterr().err


def test_a_task_of_ones_own_for_lm_eval(
    base: Path, tmp_path: Path, object_of: ObjectOf, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1?", "options": ["1", "2"], "right": 1}\n' * 3)
    task = {
        "task": "own_sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}} ",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(yaml.safe_dump(task))
    arguments = ["eval", str(base), "--task", "lm-eval/own_sums", "--limit", "2"]
    said = object_of([*arguments, "--lm-eval-tasks", str(tmp_path / "tasks")])
    (row,) = said["plan"]["groups"]
    assert (row["group"], row["questions"], row["shots"]) == ("lm-eval/own_sums", 2, None)
    (score,) = said["tasks"]
    assert (score["task"], score["num_examples"]) == ("lm-eval/own_sums", 2)
    assert score["headline"]["accuracy"]["mean"] == said["harness"]["lm-eval/own_sums"]["acc,none"]
