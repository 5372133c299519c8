"""`flanmoe quickstart`: end to end on a tiny model, and how a budget scales it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flanmoe.cli.main import invoke
from flanmoe.study.prepare import quickstart_study

ARMS = ("dense", "sparse")


@pytest.mark.slow
def test_quickstart_answers_with_everything_that_is_documented(
    base: Path, tmp_path: Path, object_of: Callable[[list[str]], dict[str, Any]]
) -> None:
    out, change = tmp_path / "out", ["--set", f"model={base}"]
    said = object_of(["quickstart", "--minutes", "0.1", *change, "--out", str(out)])
    assert 0 <= said["step0_max_abs_diff"] < 1e-3
    for arm in ARMS:
        before, after = said[arm]["before"], said[arm]["after"]
        # One step of a small rate moves the loss, but not far.
        assert before["loss"] != after["loss"]
        assert before["loss"] == pytest.approx(after["loss"], abs=0.5)
        assert before["loss_examples"] == 40
        assert before["loss_standard_error"] > 0
        assert 0 <= before["accuracy"] <= 1
    assert said["dense"]["before"]["loss"] == pytest.approx(
        said["sparse"]["before"]["loss"], abs=1e-2
    )
    # Both arms take the same step of two rows of 1,024 tokens, mostly full.
    assert 1024 < said["tokens"] <= 2048
    assert said["dense"]["tokens"] == said["sparse"]["tokens"] == said["tokens"]
    assert said["seconds"] > 0
    assert said["peak_memory_bytes"] > 2**20
    assert [len(layer) for layer in said["expert_load"]] == [8, 8]
    assert [sum(layer) for layer in said["expert_load"]] == pytest.approx([1, 1])

    planned = object_of(["plan", "recipes/quickstart.yaml", *change])
    assert {arm: planned["arms"][arm]["parameters"] for arm in ARMS} == said["parameters"]
    assert said["parameters"]["sparse"]["total"] > said["parameters"]["dense"]["total"]

    assert Path(said["report"]) == out / "report.html"
    assert "<html" in (out / "report.html").read_text()
    assert "dense" in (out / "report.md").read_text()
    assert json.loads((out / "report.json").read_text())["arms"]


@pytest.mark.parametrize(
    ("minutes", "steps", "warmup_steps", "questions"),
    [
        (0.1, 1, 0, 40),  # never fewer questions than tasks
        (5, 11, 2, 40),
        (7.5, 16, 2, 60),
        (15, 32, 2, 120),
        (60, 128, 2, 120),  # more time is for tuning: the questions stay
    ],
)
def test_minutes_scale_steps_and_below_15_questions(
    minutes: float, steps: int, warmup_steps: int, questions: int
) -> None:
    study = quickstart_study(minutes=minutes, overrides=[])
    for arm in ARMS:
        evaluations = study.evaluations(arm)
        (tuning,) = (stage for stage in study.arms[arm].stages if stage.stage == "tune")
        assert (tuning.train.steps, tuning.train.warmup_steps) == (steps, warmup_steps)
        assert [stage.limit for stage in evaluations] == [questions, questions]


def test_what_the_user_sets_wins_over_minutes() -> None:
    study = quickstart_study(minutes=5, overrides=["defaults.tune.train.steps=3"])
    assert [stage.train.steps for stage in study.arms["dense"].stages if stage.stage == "tune"] == [
        3
    ]


def test_the_recipe_is_the_quickstart() -> None:
    # One file under two names; `flanmoe run` and `flanmoe plan` take it by the second.
    recipe = Path("recipes/quickstart.yaml").read_text()
    assert recipe == Path("src/flanmoe/study/quickstart.yaml").read_text()


def test_help_says_what_minutes_scale(capsys: pytest.CaptureFixture[str]) -> None:
    invoke(["quickstart", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert (
        "Budget: scales the tuning steps from those of 15 minutes; below 15, the evaluation questions too."
        in said
    )
