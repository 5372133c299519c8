"""The small verbs end to end on tiny saved models: one JSON object on stdout, and it is right."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flanmoe.cli.main import invoke
from flanmoe.data.tasks import TaskConfig, load_tasks
from flanmoe.evaluation.results import write_training_hashes
from flanmoe.models.loading import load_model
from flanmoe.stages.held_model import HeldModel
from flanmoe.testing.tiny_models import tiny_tokenizer

TASK = "exemplars/gsm8k_cot"
ObjectOf = Callable[[list[str]], dict[str, Any]]


@pytest.fixture(scope="module")
def sparse(base: Path) -> Path:
    """The same upcycled by the command."""
    folder = base.parent / "sparse"
    assert invoke(["upcycle", str(base), str(folder), "--num-experts", "4"]) == 0
    return folder


def test_upcycle_says_how_far_it_is_from_the_dense_model(
    base: Path, tmp_path: Path, object_of: ObjectOf
) -> None:
    out = tmp_path / "sparse"
    said = object_of(["upcycle", str(base), str(out), "--num-experts", "4"])
    assert said["step0_max_abs_diff"] < 1e-3
    assert said["sparse"]["total"] > said["dense"]["total"]
    assert load_model(str(out)).config.model_type == "mixtral"


def test_upcycle_shows_how_far_it_is(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["upcycle", str(base), str(tmp_path / "sparse"), "--num-experts", "4"]) == 0
    assert "upcycling: 3/3 parts" in capfd.readouterr().err


def test_eval_scores_and_compare_pairs(
    base: Path, sparse: Path, tmp_path: Path, object_of: ObjectOf
) -> None:
    results = {}
    for name, model in (("dense", base), ("sparse", sparse)):
        arguments = ["eval", str(model), "--task", TASK, "--limit", "4", "--out"]
        results[name] = object_of(
            [*arguments, str(tmp_path / name), "--batch-size", "2", "--precision", "float32"]
        )
        assert results[name]["num_examples"] == 4
        assert results[name]["pooled"]["loss"]["standard_error"] > 0
    # Upcycled exactly, so both are the same function.
    means = [result["pooled"]["loss"]["mean"] for result in results.values()]
    assert means[0] == pytest.approx(means[1], abs=1e-4)
    compared = object_of(["eval", "--compare", str(tmp_path / "dense"), str(tmp_path / "sparse")])
    assert compared["pooled"]["loss"]["difference"]["mean"] == pytest.approx(0, abs=1e-4)


def test_chat_answers_as_generate_does(base: Path, object_of: ObjectOf) -> None:
    arguments = ["chat", str(base), "--prompt", "What is 1 + 1?", "--max-new-tokens", "5"]
    said = object_of(arguments)
    assert [turn["role"] for turn in said["turns"]] == ["user", "assistant"]
    assert 1 <= said["new_tokens"] <= 5
    tokenizer = tiny_tokenizer()
    prompt = tokenizer.apply_chat_template(said["turns"][:1], add_generation_prompt=True)
    tokens = torch.tensor([prompt["input_ids"]])
    expected = load_model(str(base)).generate(tokens, max_new_tokens=5, do_sample=False)
    text = tokenizer.decode(expected[0, tokens.shape[1] :], skip_special_tokens=True)
    assert said["turns"][1]["content"] == text.strip()


def test_preview_shows_prompt_and_loss_span(
    base: Path, tmp_path: Path, object_of: ObjectOf
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    said = object_of(["data", "preview", str(rows), "--model", str(base)])
    (task,) = said["tasks"].values()
    assert task["size"] == 1
    (example,) = task["examples"]
    assert "1 + 1?" in example["prompt"]
    assert "2" in example["response"]
    assert 0 < example["loss_tokens"] < example["tokens"]


def write_rows(path: Path, rows: list[dict[str, str]]) -> str:
    """Write a JSON-lines file and return its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sentence_of(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """Run a command that is refused, and return the one sentence that it says."""
    capfd.readouterr()
    assert invoke(arguments) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


SUMS = [{"question": f"{number} + 1?", "answer": str(number + 1)} for number in range(4)]


def test_an_upcycled_model_still_knows_what_it_has_seen(
    base: Path, tmp_path: Path, object_of: ObjectOf
) -> None:
    tuned, sparse = tmp_path / "tuned", tmp_path / "sparse"
    shutil.copytree(base, tuned)
    rows = write_rows(tmp_path / "rows.jsonl", SUMS)
    (task,) = load_tasks([TaskConfig(name=rows)])
    write_training_hashes(tuned, [example.content_hash() for example in task.examples[:3]])
    object_of(["upcycle", str(tuned), str(sparse), "--num-experts", "4"])
    said = object_of(["eval", str(sparse), "--task", rows])
    assert (said["num_examples"], said["num_seen"]) == (4, 3)


def test_a_split_stands_where_there_are_splits(
    base: Path, tmp_path: Path, object_of: ObjectOf
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", SUMS)
    write_rows(tmp_path / "sums" / "test.jsonl", SUMS[:2])
    write_rows(tmp_path / "sums" / "train.jsonl", SUMS[:3])
    arguments = ["eval", str(base), "--data-dir", str(tmp_path), "--task", "sums"]
    said = object_of([*arguments, "--task", rows, "--task", "exemplars/bbh/snarks"])
    assert [task["task"] for task in said["tasks"]] == ["sums:test", rows, "exemplars/bbh/snarks"]
    said = object_of([*arguments, "--split", "train"])
    assert [(task["task"], task["num_examples"]) for task in said["tasks"]] == [("sums", 3)]


@pytest.mark.parametrize(
    "command", [["eval", "--task"], ["inspect", "--task"], ["data", "preview", "--model"]]
)
@pytest.mark.parametrize("split", ["test", "train"])
def test_a_split_of_a_file_is_refused(
    command: list[str],
    split: str,
    sparse: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", SUMS)
    verb, option = command[:-1], command[-1]
    task = ["--task", rows] if option == "--task" else []
    first = [str(sparse)] if option == "--task" else [rows, "--model", str(sparse)]
    assert sentence_of([*verb, *first, *task, "--split", split], capfd) == (
        f"Error: `--split` must go with tasks that have splits, but `{rows}` is a file and has none. "
        "Leave `--split` out."
    )


def test_a_split_beside_a_suite_alone_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "nowhere", "--suite", "held-out", "--split", "test"]
    assert "but the suite `held-out` brings its own splits" in sentence_of(arguments, capfd)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["some-model"], "MODEL"),
        (["--out", "somewhere"], "--out"),
        (["--suite", "held-out"], "--suite"),
        (["--batch-size", "8"], "--batch-size"),
    ],
)
def test_what_has_no_effect_beside_compare_is_refused(
    extra: list[str],
    named: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Set for a whole shell, so not an option of this command.
    monkeypatch.setenv("FLANMOE_DATA", "somewhere")
    assert sentence_of(["eval", *extra, "--compare", "a", "b"], capfd) == (
        f"Error: `{named}` has no effect beside `--compare A B`, which reads two results. "
        "Leave it out."
    )


def test_an_evaluation_of_nothing_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert sentence_of(["eval"], capfd) == (
        "Error: An evaluation needs a MODEL or `--compare A B`, but has neither."
    )


@pytest.mark.parametrize(("option", "value"), [("--split", "train"), ("--model", "some-model")])
def test_what_a_recipe_says_itself_is_refused_beside_it(
    option: str, value: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    assert sentence_of(["data", "preview", str(file), option, value], capfd) == (
        f"Error: `{option}` has no effect beside the file {file}, which names its own. Leave it out."
    )


def test_preview_shows_what_is_rejected_and_why(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], object_of: ObjectOf
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [SUMS[0], {"question": "2 + 2?"}, SUMS[1]])
    arguments = ["data", "preview", rows, "--model", str(base)]
    (task,) = object_of(arguments)["tasks"].values()
    assert (task["size"], task["rejected"], len(task["examples"])) == (2, 1, 2)
    (record,) = task["rejected_records"]
    assert record["locator"] == f"{rows}:2"
    assert "the record has no target" in record["reason"]
    assert invoke(arguments) == 0
    assert f"rejected: {rows}:2: the record has no target" in capfd.readouterr().err


def test_preview_of_a_recipe_shows_what_is_rejected(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], object_of: ObjectOf
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "2 + 2?"}] * 12 + SUMS)
    stage = {"stage": "tune", "data": {"tasks": [rows]}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"name": "bad", "model": str(base), "stages": [stage]}))
    (task,) = object_of(["data", "preview", str(recipe)])["tasks"].values()
    assert [record["locator"] for record in task["rejected_records"]] == [
        f"{rows}:{number}" for number in range(1, 13)
    ]
    assert invoke(["data", "preview", str(recipe)]) == 0
    said = capfd.readouterr().err
    assert said.count("rejected: ") == 10
    assert "and 2 more; `--json` lists all" in said


def test_preview_of_a_study_shows_the_tasks_of_every_arm_and_stage_once(
    base: Path,
    sparse: Path,
    tmp_path: Path,
    object_of: ObjectOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second, third = (
        write_rows(tmp_path / f"{name}.jsonl", SUMS[:size])
        for name, size in (("first", 2), ("second", 3), ("third", 4))
    )

    def tune(label: str, *names: str) -> dict[str, Any]:
        return {"stage": "tune", "label": label, "data": {"tasks": names}}

    arms = {
        "one": {"model": str(base), "stages": [tune("a", first), tune("b", second)]},
        "two": {"model": str(base), "stages": [tune("a", third, first)]},
        "other": {"model": str(sparse), "stages": [tune("a", first)]},
    }
    study = tmp_path / "study.yaml"
    study.write_text(json.dumps({"name": "several", "arms": arms}))
    loaded: list[str] = []
    load = HeldModel.text_tokenizer

    def noted(held: HeldModel) -> Any:
        loaded.append(held.reference)
        return load(held)

    monkeypatch.setattr(HeldModel, "text_tokenizer", noted)
    tasks = object_of(["data", "preview", str(study)])["tasks"]
    assert {name: task["size"] for name, task in tasks.items()} == {
        first: 2,
        second: 3,
        third: 4,
        f"{first} ({sparse})": 2,
    }
    assert loaded == [str(base), str(sparse)]
