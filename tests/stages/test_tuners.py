"""Tuners in recipes: what is planned, what a stage leaves behind, orders of stages that mean nothing."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from flanmoe.core.errors import ConfigError, ModelError
from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.evaluation.results import read_training_hashes
from flanmoe.models.meta import meta_model
from flanmoe.stages.context import StageContext
from flanmoe.stages.held_model import HeldModel
from flanmoe.stages.recipe import Recipe, TuneStage
from flanmoe.stages.tune import run_tune
from flanmoe.stages.tuning_size import tuning_size
from flanmoe.testing.tiny_models import tiny_model, tiny_tokenizer
from flanmoe.training.arguments import TuneConfig
from flanmoe.tuners.adapter_loading import load_adapter
from flanmoe.tuners.tuning import attach

LOW_RANK = {"kind": "low_rank", "rank": 3, "linear": {"targets": ["q_proj"], "router": True}}
SPECIALISED = {"kind": "expert_specialised", "share": 0.3, "rows": 2}


def twin() -> PreTrainedModel:
    return meta_model(tiny_model("mixtral").config)


def size_of(**train: Any) -> Any:
    return tuning_size(twin(), TuneConfig.parse({"precision": "float32", "length": 64, **train}))


@pytest.mark.parametrize("tuner", [LOW_RANK, SPECIALISED])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_plan_counts_what_the_tuner_trains(tuner: dict[str, Any], optimizer: str) -> None:
    full = size_of(optimizer=optimizer)
    size = size_of(tuner=tuner, optimizer=optimizer)
    if tuner["kind"] == "low_rank":
        config = TuneConfig.parse({"tuner": tuner}).tuner
        assert config is not None
        trained = attach(tiny_model("mixtral"), config, SeedTree(0)).trained
        expected = sum(weight.numel() for weight in trained.values())
    else:
        # At most three of eight experts can be needed for three tenths; two layers.
        expected = 2 * 3 * (128 * 32 + 32 * 64)
    assert size.parameters == full.parameters.model_copy(update={"trainable": expected})
    assert size.trained_alone == expected
    assert size.memory.gradients == 4 * expected
    # Adafactor keeps one moment of weights that are too small to factor.
    assert size.memory.optimizer == (8 if optimizer == "adamw" else 4) * expected
    assert size.memory.weights == full.memory.weights + 4 * expected
    # Gradients of all experts' matrices do not come up at all.
    assert size.memory.activations < full.memory.activations
    assert size.checkpoint_bytes == 4 * expected + size.memory.optimizer
    assert full.checkpoint_bytes == 4 * full.parameters.total + full.memory.optimizer


def test_planning_leaves_the_model_as_it_was() -> None:
    model = tiny_model("mixtral")
    modules = [id(module) for module in model.modules()]
    tuning_size(model, TuneConfig.parse({"tuner": LOW_RANK}))
    assert [id(module) for module in model.modules()] == modules
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_plan_refuses_what_a_run_would() -> None:
    with pytest.raises(ModelError, match=r"`q_porj` names 0\. Did you mean `q_proj`"):
        size_of(tuner={**LOW_RANK, "linear": {"targets": ["q_porj"]}})
    dense, config = meta_model(tiny_model("llama").config), TuneConfig.parse({"tuner": LOW_RANK})
    with pytest.raises(ModelError, match="This needs a sparse model, but LlamaForCausalLM"):
        tuning_size(dense, config)


def held_model(folder: Path) -> HeldModel:
    tiny_model("mixtral").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return HeldModel(str(folder))


def stage_of(tuner: dict[str, Any]) -> TuneStage:
    return TuneStage.parse(
        {
            "stage": "tune",
            "data": {"tasks": [{"name": "sums"}]},
            "packing": {"length": 64, "window": 8},
            "train": {
                "length": 64,
                "steps": 2,
                "rows_per_step": 2,
                "learning_rate": 1e-2,
                "precision": "float32",
                "tuner": tuner,
            },
        }
    )


def context_of(folder: Path) -> StageContext:
    data = folder / "data"
    (data / "sums").mkdir(parents=True)
    lines = "".join(f'{{"question": "{n}+{n}?", "answer": "{2 * n}"}}\n' for n in range(40))
    (data / "sums" / "train.jsonl").write_text(lines, encoding="utf-8")
    return StageContext(RunDir(folder / "run"), SeedTree(0), SeedTree(0), data)


@pytest.mark.slow
@pytest.mark.parametrize("tuner", [LOW_RANK, SPECIALISED], ids=["low_rank", "expert_specialised"])
def test_a_stage_leaves_a_plain_model_and_the_adapter(
    tuner: dict[str, Any], tmp_path: Path
) -> None:
    held = held_model(tmp_path / "model")
    context = context_of(tmp_path)
    successor, result = run_tune(stage_of(tuner), held, context)
    assert successor.reference == str(context.model_folder)
    names = {name for name, _ in HeldModel(successor.reference).model().named_parameters()}
    assert names == {name for name, _ in tiny_model("mixtral").named_parameters()}
    assert result.training.merged is not None
    assert result.parameters.trainable == result.training.trains.trained
    assert list((tmp_path / "run" / "adapter").glob("*.safetensors"))
    has_statistics = (tmp_path / "run" / "expert_statistics.safetensors").exists()
    assert has_statistics == (tuner["kind"] == "expert_specialised")


@pytest.mark.slow
def test_without_merging_the_adapter_alone_is_left(tmp_path: Path) -> None:
    held = held_model(tmp_path / "model")
    context = context_of(tmp_path)
    successor, result = run_tune(stage_of({**LOW_RANK, "merge": False}), held, context)
    assert successor is held
    assert result.training.merged is None
    assert not context.model_folder.exists()
    adapter = tmp_path / "run" / "adapter"
    # What it was trained on stays with it.
    assert read_training_hashes(adapter)
    assert load_adapter(HeldModel(str(tmp_path / "model")).model(), adapter).changes


def recipe_of(*stages: dict[str, Any]) -> Recipe:
    return Recipe.parse({"name": "r", "model": "m", "stages": list(stages)})


def test_nothing_follows_an_adapter_that_is_not_merged() -> None:
    tune = {
        "stage": "tune",
        "data": {"tasks": [{"name": "sums"}]},
        "train": {"tuner": {**LOW_RANK, "merge": False}},
    }
    recipe_of(tune)
    evaluate = {"stage": "evaluate", "tasks": [{"name": "sums"}]}
    recipe_of(evaluate, tune)
    with pytest.raises(ConfigError) as error:
        recipe_of(tune, evaluate)
    assert str(error.value) == (
        "configuration has 1 problem:\n  stages: a stage whose tuner is not merged must be the last, but found "
        "2 stages with `tune` before the last: they would work on the model as it was; set `tuner.merge: true`"
    )


def test_pretraining_trains_everything() -> None:
    stage = {
        "stage": "pretrain",
        "documents": {"sources": ["texts"]},
        "train": {"tuner": LOW_RANK},
    }
    with pytest.raises(
        ConfigError, match=r"`train\.tuner` is for stages of the kind `tune`, but is low_rank"
    ):
        recipe_of(stage)


def test_settings_of_a_tuner_are_known_by_name() -> None:
    tune = {
        "stage": "tune",
        "data": {"tasks": [{"name": "sums"}]},
        "train": {"tuner": {"kind": "low_rank", "rnak": 3}},
    }
    with pytest.raises(ConfigError, match=r"unknown key `rnak`\. Did you mean `rank`"):
        recipe_of(tune)
