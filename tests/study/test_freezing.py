"""Freezing and expert dropout from a file: the plan, a run through the command line, chained stages."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flanmoe.core.errors import ModelError
from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.expert_dropout import set_expert_dropout
from flanmoe.models.freezing import WhatTrains, freeze, what_trains
from flanmoe.moe.compute import hidden_dropout
from flanmoe.stages.context import StageContext
from flanmoe.stages.held_model import HeldModel
from flanmoe.stages.recipe import TuneStage
from flanmoe.stages.tune import run_tune
from flanmoe.study.machine import Machine
from flanmoe.study.plan import ArmPlan, plan_study, refusals
from flanmoe.study.study_file import study_from_mapping
from flanmoe.testing.tiny_models import tiny_model

_EXPERTS = 2 * 8 * 3 * 32 * 64
_GATES = 2 * 8 * 32


@pytest.fixture(scope="module")
def sparse_base(saved: Callable[..., Path]) -> Path:
    """A tiny Mixtral on disk."""
    return saved("mixtral")


def tune_stage(sums_file: Path, **train: Any) -> dict[str, Any]:
    """A tuning of three steps."""
    settings = {"length": 64, "steps": 3, "rows_per_step": 2, "learning_rate": 1e-2, **train}
    return {
        "stage": "tune",
        "data": {"tasks": [{"name": str(sums_file)}]},
        "packing": {"length": 64, "window": 8},
        "train": settings,
    }


def one_arm(model: Path, *stages: dict[str, Any]) -> dict[str, Any]:
    """A study of one arm."""
    return {"name": "frozen", "model": str(model), "arms": {"sparse": {"stages": [*stages]}}}


def plan(model: Path, *stages: dict[str, Any]) -> ArmPlan:
    """The plan of one arm."""
    study = study_from_mapping(one_arm(model, *stages))
    return plan_study(study, None).arms["sparse"]


def test_the_plan_counts_what_trains(sparse_base: Path, sums_file: Path) -> None:
    whole = plan(sparse_base, tune_stage(sums_file))
    frozen = plan(sparse_base, tune_stage(sums_file, freeze=["experts", "gate"]))
    assert whole.parameters.trainable == whole.parameters.total
    assert frozen.parameters.total == whole.parameters.total
    assert whole.parameters.trainable - frozen.parameters.trainable == _EXPERTS + _GATES
    assert whole.memory is not None
    assert frozen.memory is not None
    # A gradient and two moments less for each.
    assert whole.memory.gradients - frozen.memory.gradients == 4 * (_EXPERTS + _GATES)
    assert whole.memory.optimizer - frozen.memory.optimizer == 8 * (_EXPERTS + _GATES)
    # The one checkpoint that Ctrl-C would write.
    assert whole.disk_bytes - frozen.disk_bytes == 8 * (_EXPERTS + _GATES)


def test_the_plan_counts_the_disk_of_one_stage_at_a_time(
    sparse_base: Path, sums_file: Path
) -> None:
    seldom = plan(sparse_base, tune_stage(sums_file))
    often = plan(sparse_base, tune_stage(sums_file, checkpoint_every_steps=1, keep_checkpoints=2))
    model = 4 * seldom.parameters.total
    assert (seldom.kept_bytes, seldom.disk_bytes) == (model, model + 3 * model)
    assert (often.kept_bytes, often.disk_bytes) == (model, model + 3 * 3 * model)
    # Two arms with two seeds: four models that stay, and the checkpoint of the one that runs.
    train = {"a": {}, "b": {"learning_rate": 2e-3}}
    arms = {name: {"stages": [tune_stage(sums_file, **changes)]} for name, changes in train.items()}
    values = {"name": "disk", "model": str(sparse_base), "seeds": [0, 1], "arms": arms}
    planned = plan_study(study_from_mapping(values), None)
    assert planned.total.kept_bytes == 4 * model
    assert planned.total.disk_bytes == 4 * model + 3 * model
    room = Machine(
        cores=1,
        memory_bytes=2**50,
        disk_bytes=planned.total.disk_bytes,
        flops_per_second=1e9,
    )
    assert refusals(planned.arms, room, disk_bytes=planned.total.disk_bytes) == []
    (sentence,) = refusals(planned.arms, room, disk_bytes=planned.total.disk_bytes + 1)
    assert sentence.startswith("The arms need about ")


def test_the_plan_freezes_the_model_that_upcycling_gives(base: Path, sums_file: Path) -> None:
    upcycle = {"stage": "upcycle", "num_experts": 4}
    stages = [upcycle, tune_stage(sums_file, freeze=["non_moe"], expert_dropout=0.1)]
    moe = plan(base, *stages).parameters
    stages[1] = tune_stage(sums_file, freeze=["moe"])
    rest = plan(base, *stages).parameters
    assert moe.trainable + rest.trainable == moe.total == rest.total
    assert 0 < rest.trainable < moe.trainable


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        (
            {"freeze": ["gate"]},
            "`freeze: gate` needs a sparse model, but LlamaForCausalLM is dense",
        ),
        ({"expert_dropout": 0.1}, "`expert_dropout` needs a sparse model where it is above 0, but"),
    ],
)
def test_the_plan_refuses_what_a_dense_model_lacks(
    train: dict[str, Any], sentence: str, base: Path, sums_file: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        plan(base, tune_stage(sums_file, **train))
    assert str(caught.value).startswith(sentence)


def test_the_plan_refuses_to_freeze_everything(sparse_base: Path, sums_file: Path) -> None:
    with pytest.raises(ModelError, match="leaves 0 of the"):
        plan(sparse_base, tune_stage(sums_file, freeze=["moe", "non_moe"]))


def tuned(
    held: HeldModel, sums_file: Path, folder: Path, **train: Any
) -> tuple[HeldModel, WhatTrains]:
    """Run one tuning stage in this process."""
    stage = TuneStage.parse(tune_stage(sums_file, **train))
    context = StageContext(RunDir(folder), SeedTree(0), SeedTree(0), None)
    successor, result = run_tune(stage, held, context)
    assert result.parameters.trainable == result.training.trains.trained
    return successor, result.training.trains


def test_a_second_stage_starts_unfrozen(sparse_base: Path, sums_file: Path, tmp_path: Path) -> None:
    held = HeldModel(str(sparse_base))
    held, first = tuned(held, sums_file, tmp_path / "1", freeze=["gate"], expert_dropout=0.3)
    gates = [block.router.weight.detach().clone() for block in moe_blocks(held.model())]
    original = [block.router.weight for block in moe_blocks(tiny_model("mixtral"))]
    assert all(torch.equal(one, other) for one, other in zip(gates, original, strict=True))
    assert first.parameters - first.trained == _GATES
    assert {hidden_dropout(block.experts) for block in moe_blocks(held.model())} == {0.0}
    held, second = tuned(held, sums_file, tmp_path / "2")
    assert second.trained == second.parameters
    for block, before in zip(moe_blocks(held.model()), gates, strict=True):
        assert not torch.equal(block.router.weight, before)


def test_a_model_on_disk_remembers_no_dropout(sparse_base: Path, tmp_path: Path) -> None:
    model = HeldModel(str(sparse_base)).model()
    set_expert_dropout(model, 0.3)
    model.save_pretrained(tmp_path)
    loaded = HeldModel(str(tmp_path)).model()
    assert {hidden_dropout(block.experts) for block in moe_blocks(loaded)} == {0.0}


@pytest.mark.slow
def test_a_recipe_freezes_and_drops(sparse_base: Path, sums_file: Path, tmp_path: Path) -> None:
    # Rows enough that every expert gets tokens: one without stays as it was too.
    stage = tune_stage(
        sums_file, freeze=["gate", "attention"], expert_dropout=0.2, rows_per_step=16
    )
    evaluate = {"stage": "evaluate", "tasks": ["exemplars/bbh/snarks"], "limit": 2}
    before, after = ({**evaluate, "label": label} for label in ("before", "after"))
    path = tmp_path / "frozen.yaml"
    path.write_text(yaml.safe_dump(one_arm(sparse_base, before, stage, after)))
    out = tmp_path / "out"
    run = [sys.executable, "-m", "flanmoe", "run", str(path), "--out", str(out), "--json"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "What trains" in done.stderr
    parameters = json.loads(done.stdout)["parameters"]["sparse"]
    assert plan(sparse_base, before, stage, after).parameters.to_mapping() == parameters

    folder = out / "arms" / "sparse" / "seed-0" / "01-tune"
    details = json.loads((folder / "result.json").read_text())["details"]
    frozen_model = tiny_model("mixtral")
    freeze(frozen_model, ["gate", "attention"])
    assert WhatTrains.parse(details["training"]["trains"]) == what_trains(frozen_model)
    assert parameters["trainable"] == what_trains(frozen_model).trained
    assert min(share for layer in json.loads(done.stdout)["expert_load"] for share in layer) > 0.01

    old, new = (
        load_file(sparse_base / "model.safetensors"),
        load_file(folder / "model" / "model.safetensors"),
    )
    stayed = {name for name in old if torch.equal(old[name], new[name])}
    assert stayed == {
        name for name in old if ".self_attn." in name or name.endswith(".gate.weight")
    }
