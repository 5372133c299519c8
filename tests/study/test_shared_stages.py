"""Stages that two arms have in common run once, and every arm ends as if it had run them itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flanmoe.core.rundir import RunDir
from flanmoe.models.loading import load_model
from flanmoe.study import runner
from flanmoe.study.study import Study, study_from_mapping


def study_of(base: Path, arms: dict[str, list[tuple[str, int]]]) -> Study:
    """Arms of tunings, each a label and a number of steps."""

    def tune(label: str, steps: int) -> dict[str, Any]:
        return {
            "stage": "tune",
            "label": label,
            "data": {"tasks": [{"name": "exemplars/gsm8k_cot"}]},
            "packing": {"length": 512, "window": 8},
            "train": {
                "length": 512,
                "steps": steps,
                "rows_per_step": 1,
                "precision": "float32",
                "learning_rate": 1e-3,
            },
        }

    return study_from_mapping(
        {
            "name": "shared",
            "model": str(base),
            "arms": {
                name: {"stages": [tune(*stage) for stage in stages]}
                for name, stages in arms.items()
            },
        }
    )


ARMS = {
    "one": [("first", 1), ("second", 1)],
    "two": [("first", 1), ("second", 2)],
    "three": [("first", 1)],
    "other": [("first", 2)],
}


def test_a_stage_in_common_runs_once(
    base: Path,
    tmp_path: Path,
    run_here: Callable[..., RunDir],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran: list[str] = []
    run_stage = runner._run_stage

    def counted(stage: Any, *others: Any) -> Any:
        ran.append(f"{stage.label} {stage.train.steps}")
        return run_stage(stage, *others)

    monkeypatch.setattr(runner, "_run_stage", counted)
    run = run_here(study_of(base, ARMS), tmp_path / "all")
    assert ran == ["first 1", "second 1", "second 2", "first 2"]
    assert "first: taken over from arm one" in capsys.readouterr().err
    for name in ARMS:
        alone = run_here(study_of(base, {name: ARMS[name]}), tmp_path / f"only-{name}")
        found, expected = (
            folder.child("arms", name, "seed-0").read_json("result.json") for folder in (run, alone)
        )
        models = [load_model(result["stages"][-1]["model"]) for result in (found, expected)]
        for own, other in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(own, other)
        losses = [
            [stage["details"]["training"]["final_loss"] for stage in result["stages"]]
            for result in (found, expected)
        ]
        assert losses[0] == losses[1]
        # What the report reads lies in the arm's own folder.
        assert run.child("arms", name, "seed-0", "00-first").has("metrics.jsonl")


def test_models_stay_as_long_as_an_arm_needs_them(
    base: Path, tmp_path: Path, run_here: Callable[..., RunDir]
) -> None:
    run = run_here(study_of(base, ARMS), tmp_path / "run")
    kept = sorted(str(path.relative_to(run.path).parent) for path in run.path.rglob("model"))
    # The model of `first` is where arm `three` ends, though arm `one` made it.
    assert kept == [
        "arms/one/seed-0/00-first",
        "arms/one/seed-0/01-second",
        "arms/other/seed-0/00-first",
        "arms/two/seed-0/01-second",
    ]
    without = {name: stages for name, stages in ARMS.items() if name != "three"}
    run = run_here(study_of(base, without), tmp_path / "without")
    assert not (run.path / "arms/one/seed-0/00-first/model").exists()
