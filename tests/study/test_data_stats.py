"""Counts, lengths and shares of a study's tasks, and what of them the terminal shows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flanmoe.core import console as console_module
from flanmoe.core.console import console
from flanmoe.data.example import Example
from flanmoe.stages.held_model import HeldModel
from flanmoe.study import data_stats
from flanmoe.study.data_groups import group_of_task, groups_of_file
from flanmoe.study.data_stats import GroupStatistics, sample, statistics_of
from flanmoe.study.data_stats_text import show_statistics
from flanmoe.testing.tiny_models import tiny_tokenizer

WriteTask = Callable[..., str]
PACKING_LENGTH = 96


@pytest.fixture
def write_task(tmp_path: Path) -> WriteTask:
    """Write a file of questions; their answers have as many letters as are given."""

    def write(name: str, *lengths: int, bad: int = 0) -> str:
        rows = [{"question": f"{name} {at}?", "answer": "x" * n} for at, n in enumerate(lengths)]
        rows += [{"question": "nothing?", "answer": ""}] * bad
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def study(tmp_path: Path, base: Path) -> Callable[..., Path]:
    """Write a study of one arm."""

    def write(tuned: list[Any], evaluated: list[Any], *, limit: int | None = None) -> Path:
        tune = {
            "stage": "tune",
            "data": {"tasks": tuned},
            "packing": {"length": PACKING_LENGTH},
            "train": {"length": PACKING_LENGTH},
        }
        stages = [tune, {"stage": "evaluate", "tasks": evaluated, "limit": limit}]
        path = tmp_path / "study.yaml"
        path.write_text(json.dumps({"name": "s", "model": str(base), "stages": stages}))
        return path

    return write


def _statistics(path: Path, limit: int | None = None) -> list[GroupStatistics]:
    return statistics_of(groups_of_file(path), limit=limit, data_dir=None)


def test_a_study_is_counted_and_measured(write_task: WriteTask, study: Callable[..., Path]) -> None:
    short, long = write_task("short", 1, 2, 3, bad=2), write_task("long", 10, 80)
    asked = write_task("asked", 4, 4)
    tuned, evaluated = _statistics(study([short, long], [asked]))

    first, second = tuned.tasks[short], tuned.tasks[long]
    assert (first.examples, first.rejected, first.measured) == (3, 2, 3)
    # The answers and the end-of-turn token, one token a character.
    answers = first.lengths["response_tokens"]
    assert answers is not None
    assert (answers.mean, answers.median, answers.p95, answers.maximum) == (3, 3, 4, 4)
    characters = first.lengths["response_characters"]
    assert characters is not None
    assert characters.maximum == 3 + len("<|im_end|>")
    assert (first.longer, second.longer) == (0, 1)

    assert (first.share, second.share) == pytest.approx((3 / 5, 2 / 5))
    assert first.rate is None
    expected = first.tokens / (first.tokens + second.tokens)
    assert first.token_share == pytest.approx(expected)
    assert second.token_share == pytest.approx(1 - expected)
    assert tuned.totals() == {
        "examples": 5,
        "rejected": 2,
        "measured": 5,
        "longer": 1,
        "asked": None,
        "tokens": round(first.tokens + second.tokens),
        "is_sample": False,
    }

    third = evaluated.tasks[asked]
    assert (third.asked, third.share, third.longer) == (2, None, None)


def test_rates_give_shares_of_draws_and_of_tokens(
    write_task: WriteTask, study: Callable[..., Path]
) -> None:
    short, long = write_task("same", 1), write_task("more", 50, 50, 50)
    tuned, _ = _statistics(
        study([{"name": short, "rate": 3}, {"name": long, "rate": 1}], [write_task("asked", 4)])
    )
    first, second = tuned.tasks[short], tuned.tasks[long]
    assert (first.rate, first.share, second.share) == (3, 0.75, 0.25)
    means = [task.tokens / task.examples for task in (first, second)]
    assert first.token_share == pytest.approx(0.75 * means[0] / (0.75 * means[0] + 0.25 * means[1]))


@pytest.mark.parametrize(
    ("limit", "asked"), [(None, [5, 1]), (2, [1, 1]), (4, [3, 1]), (1000, [5, 1])]
)
def test_a_limit_beyond_what_there_is_asks_everything(
    limit: int | None, asked: list[int], write_task: WriteTask, study: Callable[..., Path]
) -> None:
    names = [write_task("five", 1, 2, 3, 4, 5), write_task("one", 1)]
    _, evaluated = _statistics(study([write_task("tuned", 1)], names, limit=limit))
    assert [task.asked for task in evaluated.tasks.values()] == asked
    assert evaluated.totals()["asked"] == sum(asked)


def test_a_sample_is_said_to_be_one(
    write_task: WriteTask, study: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    name = write_task("tuned", *range(1, 31))
    found = _statistics(study([name], [write_task("asked", 4)]), limit=7)
    task = found[0].tasks[name]
    assert (task.examples, task.measured, task.is_sample) == (30, 7, True)
    assert found[0].to_mapping()["tasks"][name]["is_sample"]
    assert not found[1].tasks[str(Path(name).with_name("asked.jsonl"))].is_sample
    show_statistics(found)
    said = capfd.readouterr().err
    assert "lengths are of a sample of 7" in said
    assert f"about {task.tokens:,.0f}" in said


def test_a_sample_is_drawn_from_all_and_stays_the_same() -> None:
    examples = [Example(inputs=str(at), target="") for at in range(100)]
    drawn = list(sample(examples, 10, "task"))
    assert drawn == list(sample(examples, 10, "task"))
    assert drawn == sorted(drawn, key=lambda example: int(example.inputs))
    assert len({example.inputs for example in drawn}) == 10
    assert max(int(example.inputs) for example in drawn) > 20
    assert drawn != list(sample(examples, 10, "other"))
    assert list(sample(examples, 100, "task")) == examples


def test_a_task_is_measured_once_a_tokenizer(
    write_task: WriteTask, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write_task("tuned", 1, 2, 3)
    arms = {
        arm: {"stages": [{"stage": "tune", "data": {"tasks": [{"name": name, "cap": cap}]}}]}
        for arm, cap in (("one", 1), ("two", 2))
    }
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps({"name": "s", "model": str(base), "arms": arms}))
    measured: list[str] = []
    render = data_stats.render_chat

    def noted(example: Example, *arguments: Any, **options: Any) -> Any:
        measured.append(example.key)
        return render(example, *arguments, **options)

    monkeypatch.setattr(data_stats, "render_chat", noted)
    first, second = _statistics(path)
    assert len(measured) == 3
    assert first.tasks[name].lengths == second.tasks[name].lengths


def test_the_page_is_plain_where_there_is_no_terminal(
    write_task: WriteTask, study: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    name = write_task("tuned", 1, 2, 90, bad=1)
    show_statistics(_statistics(study([name], [write_task("asked", 4)], limit=9)))
    lines = capfd.readouterr().err.splitlines()
    assert "  3 examples, 1 rejected" in lines
    assert "  100.0 % of the draws (by size), 100.0 % of the tokens" in lines
    assert "  1 longer than a row of 96 tokens (33.33 %)" in lines
    assert any(
        line.split() == ["tokens", "of", "the", "response", "32.0", "3", "91", "91"]
        for line in lines
    )
    bars = [line.split(" tokens  ") for line in lines if "#" in line]
    assert bars[0] == ["   17 to 32", "######################################## 2"]
    assert bars[1] == ["  65 to 128", "#################### 1"]
    assert all(line.isascii() for line in lines)
    header = next(line for line in lines if line.startswith("task") and "draws" in line)
    assert "asked" not in header


def test_a_rate_that_tasks_share_is_said_to_be_shared(
    write_task: WriteTask, study: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    tasks = [
        {"name": write_task(name, *lengths), "rate": 2, "group": "both"}
        for name, lengths in (("one", (1,)), ("three", (1, 2, 3)))
    ]
    tasks.append({"name": write_task("alone", 1), "rate": 2})
    found = _statistics(study(tasks, [write_task("asked", 4)]))
    assert [task.share for task in found[0].tasks.values()] == pytest.approx([1 / 8, 3 / 8, 1 / 2])
    show_statistics(found)
    said = capfd.readouterr().err
    assert "  37.5 % of the draws (rate 2 of `both` together), " in said
    assert "  50.0 % of the draws (rate 2), " in said


def test_bars_are_drawn_on_a_terminal(
    write_task: WriteTask,
    study: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = _statistics(study([write_task("tuned", 1, 2)], [write_task("asked", 4)]))
    capfd.readouterr()
    monkeypatch.setattr(console, "_force_terminal", True)
    assert console_module.console.is_terminal
    show_statistics(found)
    said = capfd.readouterr().err
    assert "█" * 40 in said
    assert "#" not in said


def test_a_family_is_measured_task_by_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HeldModel, "text_tokenizer", lambda held: tiny_tokenizer())
    group = group_of_task("exemplars/bbh/*", split=None, model="tiny", packing_length=4096)
    (found,) = statistics_of([group], limit=1, data_dir=None)
    assert len(found.tasks) > 10
    # Nobody says that they are tuned on, so that they may only be scored on is no mistake.
    assert all(task.share is None for task in found.tasks.values())
