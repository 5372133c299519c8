"""The stage graph: what is one node, what runs once, which models stay, and what a plan counts."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flanmoe.core.rundir import RunDir
from flanmoe.models.loading import load_model
from flanmoe.study import manifest, runner
from flanmoe.study.graph import build_graph, changes
from flanmoe.study.nodes import StageGraph
from flanmoe.study.plan import plan_study
from flanmoe.study.records import SeedResults
from flanmoe.study.study import Study
from flanmoe.study.study_file import study_from_mapping

SCORE = {"stage": "evaluate", "label": "score", "tasks": ["exemplars/bbh/navigate"], "limit": 2}


def tune(label: str, steps: int, **train: Any) -> dict[str, Any]:
    """A tuning of a few rows of 512 tokens."""
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
            **train,
        },
    }


def study_of(base: Path, arms: dict[str, list[dict[str, Any]]], **others: Any) -> Study:
    """A study of these stages."""
    stages = {name: {"stages": stages} for name, stages in arms.items()}
    return study_from_mapping({"name": "shared", "model": str(base), "arms": stages, **others})


ARMS = {
    "one": [tune("first", 1), tune("second", 1)],
    "two": [tune("first", 1), tune("second", 2)],
    "three": [tune("first", 1)],
    "other": [tune("first", 2)],
}


def test_a_stage_in_common_runs_once(
    base: Path,
    tmp_path: Path,
    run_here: Callable[..., RunDir],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []
    run_stage = runner._run_stage

    def counted(stage: Any, *others: Any) -> Any:
        ran.append(f"{stage.label} {stage.train.steps}")
        return run_stage(stage, *others)

    monkeypatch.setattr(runner, "_run_stage", counted)
    run = run_here(study_of(base, ARMS), tmp_path / "all")
    assert ran == ["first 1", "second 1", "second 2", "first 2"]
    for name in ARMS:
        alone = run_here(study_of(base, {name: ARMS[name]}), tmp_path / f"only-{name}")
        found, expected = (SeedResults(folder.path, name, 0) for folder in (run, alone))
        models = [load_model(result.final_model) for result in (found, expected)]
        for own, other in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(own, other)
        losses = [
            [stage["details"]["training"]["final_loss"] for stage in result.stages]
            for result in (found, expected)
        ]
        assert losses[0] == losses[1]
        # An arm's folder leads to what its stages wrote.
        assert run.child("arms", name, "seed-0", "00-first").has("metrics.jsonl")


def test_models_stay_as_long_as_an_arm_needs_them(
    base: Path, tmp_path: Path, run_here: Callable[..., RunDir]
) -> None:
    run = run_here(study_of(base, ARMS), tmp_path / "run")

    def kept(folder: Path) -> set[Path]:
        return {path.parent.resolve() for path in folder.glob("stages/*/model")}

    def places(*names: str) -> set[Path]:
        return {(run.path / "arms" / name).resolve() for name in names}

    # The model of `first` is where arm `three` ends.
    assert kept(run.path) == places(
        "one/seed-0/00-first",
        "one/seed-0/01-second",
        "other/seed-0/00-first",
        "two/seed-0/01-second",
    )
    without = {name: stages for name, stages in ARMS.items() if name != "three"}
    run = run_here(study_of(base, without), tmp_path / "without")
    assert kept(run.path) == places(
        "one/seed-0/01-second", "other/seed-0/00-first", "two/seed-0/01-second"
    )


def test_scoring_stands_beside_the_chain_and_outside_of_seeds(base: Path) -> None:
    arms = {
        "scored": [{**SCORE, "label": "before"}, tune("first", 1), SCORE],
        "plain": [tune("first", 1)],
    }
    graph = build_graph(study_of(base, arms, seeds=[3, 4]), None)
    by_label = [(node.label, node.seed) for node in graph.nodes.values()]
    # The score of the model that all begin with does not depend on the seed; that of a tuned one does by its
    # model. Tuning does not depend on scores, so both arms share it.
    assert by_label == [("before", 3), ("first", 3), ("score", 3), ("first", 4), ("score", 3)]
    parents = {node.label: node.parent for node in graph.nodes.values()}
    assert parents["before"] is parents["first"] is None
    firsts = [node.key for node in graph.nodes.values() if node.label == "first"]
    assert [node.parent for node in graph.nodes.values() if node.label == "score"] == firsts
    assert [branch.stages[-1] for branch in graph.branches if branch.arm == "plain"] == firsts


def test_a_graph_is_read_as_it_was_written(base: Path, tmp_path: Path) -> None:
    graph = build_graph(study_of(base, ARMS, seeds=[0, 1]), None)
    graph.write(tmp_path)
    assert StageGraph.read(tmp_path) == graph
    assert json.loads((tmp_path / "graph.json").read_text())["branches"][0] == {
        "arm": "one",
        "seed": 0,
        "stages": list(graph.branches[0].stages),
    }


def _on(name: str, sums: Path) -> dict[str, Any]:
    stage = tune(name, 1)
    return {**stage, "data": {"tasks": [{"name": str(sums)}]}}


def test_a_key_covers_data_settings_code_versions_seed_and_parent(
    base: Path, sums_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = tmp_path / "sums.jsonl"
    sums.write_bytes(sums_file.read_bytes())

    def graph(first: int = 1, **others: Any) -> StageGraph:
        arms = {"arm": [tune("first", first), _on("second", sums)]}
        return build_graph(study_of(base, arms, **others), None)

    def said(new: StageGraph) -> list[tuple[str, str]]:
        return [(new.nodes[key].label, why) for key, why in changes(before, new).items()]

    before = graph()
    assert graph() == before
    assert said(graph()) == []
    assert said(graph(first=2)) == [
        ("first", "settings changed (train.steps: 1 -> 2)"),
        ("second", "it follows `first`"),
    ]
    # Another seed is another branch, of which nothing was there.
    assert not graph(seeds=[1]).nodes.keys() & before.nodes.keys()
    sums.write_text(sums.read_text() + '{"question": "1+1?", "answer": "2"}\n')
    assert said(graph()) == [("second", f"data changed (`{sums}`)")]
    sums.write_bytes(sums_file.read_bytes())
    # Only the bytes count.
    os.utime(sums, (1, 1))
    assert said(graph()) == []
    monkeypatch.setenv("FLANMOE_CODE_VERSION", "another")
    assert [why for _, why in said(graph())] == ["flanmoe's code changed"] * 2
    monkeypatch.setenv("FLANMOE_CODE_VERSION", "tests")
    monkeypatch.setattr(
        "flanmoe.study.graph.stack_versions", lambda: {**manifest.stack_versions(), "torch": "0"}
    )
    torch_was = manifest.stack_versions()["torch"]
    assert said(graph())[0][1] == f"versions changed (torch: {torch_was} -> 0)"


def test_the_bytes_of_a_model_folder_count(base: Path, saved: Callable[..., Path]) -> None:
    other = saved("llama", num_hidden_layers=1)
    before = build_graph(study_of(base, {"arm": [SCORE]}), None)
    (node,) = before.nodes.values()
    assert node.files == manifest.model_files(str(base))
    assert "model/model.safetensors" in node.files
    after = build_graph(study_of(other, {"arm": [SCORE]}), None)
    (why,) = changes(before, after).values()
    assert why.startswith(
        f"the model changed ({base} -> {other}), data changed (`model/config.json`"
    )


def test_the_code_version_is_that_of_what_stages_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLANMOE_CODE_VERSION")
    whole = manifest.code_version()
    assert whole == manifest.code_version()
    monkeypatch.setattr(manifest, "_PACKAGES", ("core",))
    assert manifest.code_version() != whole


def test_a_plan_counts_shared_stages_once(base: Path) -> None:
    planned = plan_study(study_of(base, ARMS, seeds=[0, 1]), None)
    rows = [
        (stage.cost.label, stage.after, stage.arms, stage.runs, stage.cost.tokens)
        for stage in planned.stages
    ]
    assert rows == [
        ("first", "", ("one", "two", "three"), 2, 512),
        ("second", "first", ("one",), 2, 512),
        ("second", "first", ("two",), 2, 1024),
        ("first", "", ("other",), 2, 1024),
    ]
    assert planned.total.runs == 8
    assert planned.total.tokens == 2 * (512 + 512 + 1024 + 1024)
    # Arm by arm the first stage counts three times.
    assert sum(arm.tokens for arm in planned.arms.values()) == 512 * (2 + 3 + 1 + 2)
    assert planned.total.seconds == pytest.approx(
        sum(stage.runs * stage.cost.seconds for stage in planned.stages)
    )
    model = planned.arms["one"].kept_bytes
    # Of each seed the models of all four arms stay, and beside those of the first seed and of this one there is
    # the checkpoint of the last tuning.
    assert planned.total.kept_bytes == 8 * model
    assert planned.total.disk_bytes == 8 * model + 3 * model
