"""A stage that fails stops the arms that need it: others go on, and the report says who is missing and why."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flanmoe.cli.main import invoke
from flanmoe.core.errors import DataError, RunError
from flanmoe.core.rundir import RunDir
from flanmoe.study import launch, runner
from flanmoe.study.board import Failure
from flanmoe.study.graph import build_graph
from flanmoe.study.outcome import rebuild_report
from flanmoe.study.schedule import Outcome, StudyError
from flanmoe.study.study import Study
from flanmoe.study.study_file import study_from_mapping

SCORE = {"stage": "evaluate", "label": "score", "tasks": ["exemplars/bbh/navigate"], "limit": 2}


@pytest.fixture
def study(base: Path, sums_file: Path) -> Study:
    """Three arms of two seeds: one that is only scored, and two that are tuned with different rates."""

    def tune(rate: float) -> dict[str, Any]:
        return {
            "stage": "tune",
            "data": {"tasks": [{"name": str(sums_file)}]},
            "packing": {"length": 64, "window": 8},
            "train": {"length": 64, "steps": 1, "rows_per_step": 1, "learning_rate": rate},
        }

    arms = {
        "untuned": {"stages": [SCORE]},
        "slow": {"stages": [tune(1e-4), SCORE]},
        "fast": {"stages": [tune(1e-3), SCORE]},
    }
    values = {"name": "failing", "model": str(base), "seeds": [0, 1], "arms": arms}
    return study_from_mapping(values)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets every tuning fail that has the rate of `fast`; holds the labels of what ran to its end."""
    ran: list[str] = []
    run_stage = runner._run_stage

    def failing(stage: Any, *others: Any) -> Any:
        if stage.stage == "tune" and stage.train.learning_rate == 1e-3:
            raise DataError("The sums do not add up. Add them again.")
        result = run_stage(stage, *others)
        ran.append(stage.label)
        return result

    monkeypatch.setattr(runner, "_run_stage", failing)
    return ran


def test_the_other_arms_go_on_and_the_report_lists_what_is_missing(
    study: Study,
    broken: list[str],
    run_here: Callable[..., RunDir],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    with pytest.raises(StudyError) as caught:
        run_here(study, out)
    # One sentence for each stage, and their exit status.
    assert str(caught.value) == " ".join(
        ["Stage `tune` of fast failed: The sums do not add up. Add them again."] * 2
    )
    assert caught.value.exit_code == 2
    # The score of the model that both seeds begin with runs once.
    assert broken == ["score", "tune", "score", "tune", "score"]

    summary = rebuild_report(out)
    assert list(summary["arms"]) == list(summary["models"]) == ["untuned", "slow"]
    assert summary["unfinished"] == [
        f"Arm `fast` (seed {seed}) is not finished and not in this report: its stage `tune` failed: The "
        "sums do not add up. Add them again."
        for seed in (0, 1)
    ]
    report = json.loads((out / "report.json").read_text())
    assert [arm["label"] for arm in report["arms"]] == ["untuned", "slow"]
    assert report["warnings"][:2] == summary["unfinished"]
    assert summary["unfinished"][0] in (out / "report.md").read_text().replace("\\", "")

    # Mended, only what is missing runs.
    del broken[:]
    monkeypatch.undo()
    monkeypatch.setenv("FLANMOE_CODE_VERSION", "tests")
    run_here(study, out, resume=True)
    assert sorted(rebuild_report(out)["arms"]) == ["fast", "slow", "untuned"]
    assert rebuild_report(out)["unfinished"] == []


def test_without_the_baseline_the_others_are_compared_with_nobody(
    study: Study, broken: list[str], run_here: Callable[..., RunDir], tmp_path: Path
) -> None:
    chosen = study.model_copy(update={"baseline": "fast"})
    with pytest.raises(StudyError):
        run_here(chosen, tmp_path / "out")
    summary = rebuild_report(tmp_path / "out")
    assert list(summary["arms"]) == ["untuned", "slow"]
    assert [row for row in summary["comparisons"] if row["kind"] == "arms"] == []


def test_seeds_that_are_finished_are_reported_before_the_others_are(
    study: Study, run_here: Callable[..., RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stage = runner._run_stage

    def one_seed(stage: Any, held: Any, context: Any) -> Any:
        if stage.stage == "tune" and context.seeds.root == 1:
            raise DataError("One seed is enough.")
        return run_stage(stage, held, context)

    monkeypatch.setattr(runner, "_run_stage", one_seed)
    with pytest.raises(StudyError):
        run_here(study, tmp_path / "out")
    summary = rebuild_report(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {arm["label"]: arm["seeds"] for arm in report["arms"]} == {
        "untuned": [0, 1],
        "slow": [0],
        "fast": [0],
    }
    assert len(summary["unfinished"]) == 2
    compared = {(row["subject"], row["seed"]) for row in summary["comparisons"]}
    assert compared == set()  # Untuned has no score after a tuning to be compared with.


def test_nothing_finished_is_nothing_to_report(
    study: Study, broken: list[str], run_here: Callable[..., RunDir], tmp_path: Path
) -> None:
    arms = {"fast": study.arms["fast"]}
    alone = study.model_copy(update={"arms": arms, "seeds": (0,)})
    with pytest.raises(DataError, match=r"^The sums do not add up\. Add them again\.$"):
        run_here(alone, tmp_path / "out")
    with pytest.raises(
        RunError, match=r"A report needs an arm that has finished, but in .* none has"
    ):
        rebuild_report(tmp_path / "out")


def test_the_command_reports_what_is_finished_and_exits_with_the_failure(
    study: Study,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    graph = build_graph(study, None)
    fast = next(branch for branch in graph.branches if branch.arm == "fast")
    failure = Failure(graph.nodes[fast.stages[0]], ("fast",), DataError("The sums are gone."))
    answers = {"prepare": {"folder": str(tmp_path)}, "report": {"arms": {"slow": {"tokens": 3}}}}
    monkeypatch.setattr(launch, "ask", lambda errand: answers[errand.task])
    monkeypatch.setattr(
        launch, "run_graph", lambda *others, **named: Outcome(graph.branches[:1], (failure,))
    )
    assert invoke(["run", "study.yaml", "--json"]) == 2
    sentence = (
        "Stage `tune` of fast failed: The sums are gone. The other arms are in the report; go on with "
        f"--resume --out {tmp_path}."
    )
    printed = capfd.readouterr()
    assert printed.err.splitlines()[-1] == f"Error: {sentence}"
    assert json.loads(printed.out) == {
        "arms": {"slow": {"tokens": 3}},
        "error": sentence,
        "exit_status": 2,
    }
