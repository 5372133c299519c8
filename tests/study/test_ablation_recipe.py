"""Every arm of the shipped ablation recipe trains a native Mixtral: each preset, loss, scope, convention."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from flanmoe.models.freezing import FreezePreset
from flanmoe.moe.losses import CONVENTIONS
from flanmoe.stages.recipe import TuneStage
from flanmoe.study.folder import open_study
from flanmoe.study.graph import build_graph
from flanmoe.study.nodes import StageGraph, stage_folder
from flanmoe.study.runner import run_stage
from flanmoe.study.study_file import study_from_mapping
from flanmoe.training.router_losses import RouterLossConfig

RECIPE = Path(__file__).parents[2] / "recipes" / "freezing-and-router-losses.yaml"
VALUES: dict[str, Any] = yaml.safe_load(RECIPE.read_text())


def tunings() -> dict[str, TuneStage]:
    arms = study_from_mapping(VALUES).arms
    return {
        name: next(stage for stage in arm.stages if isinstance(stage, TuneStage))
        for name, arm in arms.items()
    }


def test_the_recipe_holds_every_preset_scope_and_convention() -> None:
    stages = tunings().values()
    routers = [stage.train.router for stage in stages]
    presets = {preset for stage in stages for preset in stage.train.freeze}
    assert presets == set(get_args(FreezePreset))
    assert {router.convention for router in routers} == set(CONVENTIONS)
    assert {router.scope for router in routers} == {"global", "lagged", "sequence"}
    for loss in ("balance", "importance", "z"):
        coefficients = {getattr(router, f"{loss}_coefficient") > 0 for router in routers}
        assert coefficients == {True, False}, loss
    assert any(stage.train.expert_dropout for stage in stages)


@pytest.fixture(scope="module")
def study_folder(
    saved: Callable[..., Path], sums_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The recipe cut down to a tiny native Mixtral, small sums and two steps, as a run folder."""
    folder = tmp_path_factory.mktemp("ablation")
    values = json.loads(json.dumps(VALUES))
    tune = values["defaults"]["tune"]
    tune["data"] = {"tasks": [str(sums_file)]}
    tune["packing"] = {"length": 64, "window": 8}
    tune["train"] |= {"length": 64, "steps": 2}
    values["model"] = str(saved("mixtral"))
    # Only tuning is left of every arm.
    values["defaults"] = {"tune": tune}
    for arm in values["arms"].values():
        arm["stages"] = [stage for stage in arm["stages"] if stage["stage"] == "tune"]
    study = study_from_mapping(values)
    return open_study(folder / "run", study, build_graph(study, None), resume=False).path


@pytest.mark.slow
@pytest.mark.parametrize("arm", VALUES["arms"])
def test_an_arm_trains_a_native_mixtral(arm: str, study_folder: Path) -> None:
    graph = StageGraph.read(study_folder)
    (branch,) = [one for one in graph.branches if one.arm == arm]
    (key,) = branch.stages
    folder = stage_folder(study_folder, graph.nodes[key])
    run_stage(folder, None, None)
    result = json.loads((folder / "result.json").read_text())
    trains = result["details"]["training"]["trains"]["parts"]
    some_frozen = any(part["trained"] < part["parameters"] for part in trains)
    assert some_frozen == arm.startswith("freeze-")

    config = RouterLossConfig.parse(result["details"]["training"]["router_settings"])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for row in map(json.loads, lines):
        weighted = {loss: row[f"router/{loss}_weighted"] for loss in ("balance", "importance", "z")}
        for loss, weight in config.weights._asdict().items():
            assert weighted[loss] == pytest.approx(weight * row[f"router/{loss}_raw"], rel=1e-5)
        total = row["loss/cross_entropy"] + sum(weighted.values())
        assert row["loss"] == pytest.approx(total, rel=1e-6)
        # Two layers; even use scores k (2) where any choice counts and layers are averaged, and 1 a
        # layer where first choices count and layers are added up: 2 either way.
        assert 1.5 < row["router/balance_raw"] < 8
