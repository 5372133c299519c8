"""A study that is changed half-way: only what changed runs, with its reason, and what it was is kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flanmoe.core.errors import RunError
from flanmoe.core.rundir import RunDir
from flanmoe.study import runner
from flanmoe.study.leg import locked
from flanmoe.study.nodes import StageGraph, stage_folder
from flanmoe.study.records import SeedResults
from flanmoe.study.study import Study
from flanmoe.study.study_file import study_from_mapping

Ran = list[str]


@pytest.fixture
def make(base: Path, tmp_path: Path, sums_file: Path) -> Callable[..., Study]:
    """Makes a study of a dense and a sparse arm on a file of its own."""
    own = tmp_path / "own.jsonl"
    own.write_bytes(sums_file.read_bytes())
    score = {"stage": "evaluate", "tasks": ["exemplars/bbh/navigate"], "limit": 2}

    def made(*, steps: int = 1, limit: int = 2, num_experts: int = 4, **others: Any) -> Study:
        tune = {
            "stage": "tune",
            "data": {"tasks": [{"name": str(own)}]},
            "packing": {"length": 64, "window": 8},
            "train": {"length": 64, "steps": steps, "rows_per_step": 1, "learning_rate": 1e-3},
        }
        after = {**score, "label": "after", "limit": limit}
        arms = {
            "dense": {"stages": [{**score, "label": "before"}, tune, after]},
            "sparse": {"stages": [{"stage": "upcycle", "num_experts": num_experts}, tune, after]},
        }
        return study_from_mapping({"name": "changing", "model": str(base), "arms": arms, **others})

    return made


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Notes every stage that runs, with what its folder's number of experts tells of the arm."""
    found: Ran = []
    run_stage = runner._run_stage

    def noted(stage: Any, *others: Any) -> Any:
        found.append(stage.label)
        return run_stage(stage, *others)

    monkeypatch.setattr(runner, "_run_stage", noted)
    return found


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was said of the change."""
    said = capsys.readouterr().err.splitlines()
    return [line for line in said if " runs: " in line or " stand." in line or "history" in line]


def test_only_what_changed_and_what_follows_it_runs_again(
    make: Callable[..., Study],
    ran: Ran,
    run_here: Callable[..., RunDir],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    run_here(make(), out)
    assert ran == ["before", "tune", "after", "upcycle", "tune", "after"]
    del ran[:]
    lines(capsys)

    run_here(make(num_experts=2), out, resume=True)
    assert ran == ["upcycle", "tune", "after"]
    assert lines(capsys) == [
        f"The study has changed since {out} was written; what it was is kept in history/001.",
        "  `upcycle` of sparse (seed 0) runs: settings changed (num_experts: 4 -> 2).",
        "  `tune` of sparse (seed 0) runs: it follows `upcycle`.",
        "  `after` of sparse (seed 0) runs: it follows `tune`.",
        "  3 finished stages stand.",
    ]
    kept = out / "history" / "001"
    assert "num_experts: 4" in (kept / "recipe.yaml").read_text()
    assert "num_experts: 2" in (out / "recipe.yaml").read_text()
    said = json.loads((kept / "changes.json").read_text())["stages"]
    assert said["`upcycle` of sparse (seed 0)"] == "settings changed (num_experts: 4 -> 2)"
    # The arm's folder leads to the new stages, and ends as if it had been like this from the start.
    fresh = run_here(make(num_experts=2), tmp_path / "fresh")
    for arm in ("dense", "sparse"):
        one, other = (SeedResults(folder, arm, 0) for folder in (out, fresh.path))
        assert one.nodes == other.nodes
        weights = [load_file(f"{seed.final_model}/model.safetensors") for seed in (one, other)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
        links = [path.resolve().name for path in sorted((out / "arms" / arm / "seed-0").glob("0*"))]
        assert links == one.nodes

    # Changed back: the score stands; the model that it was taken of, which no arm ended with, is not needed.
    del ran[:]
    run_here(make(), out, resume=True)
    assert ran == []
    assert "num_experts: 4" in (out / "recipe.yaml").read_text()


def test_data_that_changed_are_seen(
    make: Callable[..., Study],
    ran: Ran,
    run_here: Callable[..., RunDir],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, own = tmp_path / "out", tmp_path / "own.jsonl"
    run_here(make(), out)
    own.write_text(own.read_text() + '{"question": "5+5?", "answer": "10"}\n')
    del ran[:]
    lines(capsys)
    run_here(make(), out, resume=True)
    # The sparse model before its tuning was removed when that had taken it, so it is made again.
    assert ran == ["tune", "after", "upcycle", "tune", "after"]
    assert lines(capsys)[1:] == [
        f"  `tune` of dense (seed 0) runs: data changed (`{own}`).",
        "  `after` of dense (seed 0) runs: it follows `tune`.",
        f"  `tune` of sparse (seed 0) runs: data changed (`{own}`).",
        "  `after` of sparse (seed 0) runs: it follows `tune`.",
        "  2 finished stages stand.",
    ]


def test_a_new_arm_and_a_new_seed_leave_the_others_alone(
    make: Callable[..., Study], ran: Ran, run_here: Callable[..., RunDir], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    study = make()
    run_here(study.model_copy(update={"arms": {"dense": study.arms["dense"]}}), out)
    del ran[:]
    run_here(study, out, resume=True)
    assert ran == ["upcycle", "tune", "after"]
    del ran[:]
    dense = {"dense": study.arms["dense"]}
    run_here(study.model_copy(update={"arms": dense, "seeds": (0, 1)}), out, resume=True)
    assert ran == ["tune", "after"]
    # An arm that is no more has no folder; what its stages left stays.
    assert not (out / "arms" / "sparse").joinpath("seed-0").exists()
    assert len(list(out.glob("stages/*-upcycle/result.json"))) == 1


def test_a_change_is_refused_while_another_process_runs_the_study(
    make: Callable[..., Study], run_here: Callable[..., RunDir], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = run_here(make(), out)
    graph = StageGraph.read(run.path)
    tune = next(node for node in graph.nodes.values() if node.label == "tune")
    before = (out / "recipe.yaml").read_text()
    with locked(stage_folder(run.path, tune)):
        with pytest.raises(RunError) as caught:
            run_here(make(steps=2), out, resume=True)
        assert str(caught.value) == (
            f"The study in {out} has changed, but another process runs its stage `tune` as it was. Wait for it "
            "or stop it, or choose another folder with `--out`."
        )
        assert (out / "recipe.yaml").read_text() == before
        assert not (out / "history").exists()
        # The study as it is goes on beside the other process.
        run_here(make(), out, resume=True)


def test_a_resumed_study_that_is_the_same_has_no_history(
    make: Callable[..., Study], ran: Ran, run_here: Callable[..., RunDir], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_here(make(), out)
    del ran[:]
    run_here(make(), out, resume=True)
    assert ran == []
    assert not (out / "history").exists()
