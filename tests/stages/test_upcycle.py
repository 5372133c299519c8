"""The stage `upcycle` between others: what the dense model has seen, the sparse one has seen."""

import json
from pathlib import Path

import pytest

from flanmoe.core.errors import ConfigError
from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.evaluation.results import read_training_hashes, write_training_hashes
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.loading import load_model
from flanmoe.models.plan import count_parameters
from flanmoe.models.upcycle import step0_max_abs_diff
from flanmoe.stages.context import StageContext
from flanmoe.stages.evaluate import run_evaluate
from flanmoe.stages.held_model import HeldModel
from flanmoe.stages.recipe import Recipe, UpcycleStage, UpcycleT5Stage
from flanmoe.stages.tune import run_tune
from flanmoe.stages.upcycle import probe_tokens, run_upcycle
from flanmoe.testing.tiny_models import tiny_model, tiny_text_tokenizer, tiny_tokenizer


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Tune a tiny dense model on two sums, make it sparse, score it on these and on a third."""
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    rows = [{"question": f"{number} + 1?", "answer": str(number + 1)} for number in range(3)]
    for name, kept in (("trained", rows[:2]), ("asked", rows)):
        lines = "".join(json.dumps(row) + "\n" for row in kept)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    stages = [
        {
            "stage": "tune",
            "data": {"tasks": [str(tmp_path / "trained.jsonl")]},
            "packing": {"length": 64, "window": 8},
            "train": {"length": 64, "steps": 1, "rows_per_step": 1},
        },
        {"stage": "upcycle", "num_experts": 4},
        {"stage": "evaluate", "tasks": [str(tmp_path / "asked.jsonl")]},
    ]
    return Recipe.parse({"name": "chain", "model": str(tmp_path / "dense"), "stages": stages})


def test_tuning_then_upcycling_keeps_what_was_seen(recipe: Recipe, tmp_path: Path) -> None:
    tune, upcycle, evaluate = recipe.stages
    contexts = [
        StageContext(RunDir(tmp_path / stage.label), SeedTree(0), SeedTree(0), data_dir=None)
        for stage in recipe.stages
    ]
    tuned, _ = run_tune(tune, HeldModel(recipe.model), contexts[0])
    sparse, _ = run_upcycle(upcycle, tuned, contexts[1])
    assert len(tuned.training_hashes()) == 2
    assert read_training_hashes(contexts[1].model_folder) == tuned.training_hashes()
    scores = run_evaluate(evaluate, sparse, contexts[2]).scores
    assert (scores.num_examples, scores.num_seen) == (3, 2)
    assert scores.pooled.loss.num_values == 1


@pytest.fixture
def t5(tmp_path: Path) -> HeldModel:
    """A tiny T5 that has been trained on one example."""
    folder = tmp_path / "t5"
    tiny_model("t5").save_pretrained(folder)
    tiny_text_tokenizer().save_pretrained(folder)
    write_training_hashes(folder, ["0" * 32])
    return HeldModel(str(folder))


TOP_K = {"kind": "top_k", "num_experts": 4}


@pytest.mark.parametrize("kind", ["top_k", "expert_choice"])
def test_a_t5_goes_the_same_way(
    kind: str, t5: HeldModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = UpcycleT5Stage.parse(
        {
            "stage": "upcycle_t5",
            "encoder_router": {**TOP_K, "kind": kind, "init_std": 1.0},
            "decoder_router": TOP_K,
        }
    )
    context = StageContext(RunDir(tmp_path / "run"), SeedTree(0), SeedTree(0), data_dir=None)
    sparse, result = run_upcycle(stage, t5, context)
    assert sparse.reference == str(context.model_folder)
    assert read_training_hashes(context.model_folder) == t5.training_hashes() == {"0" * 32}
    loaded = load_model(sparse.reference)
    assert len(moe_blocks(loaded)) == 2
    probe = probe_tokens(t5.tokenizer())
    assert step0_max_abs_diff(t5.model(), loaded, probe) == result.step0_max_abs_diff
    assert (result.dense, result.sparse) == (count_parameters(t5.model()), count_parameters(loaded))
    printed = " ".join(capsys.readouterr().err.split())
    assert (
        f"largest logit difference from the dense model: {result.step0_max_abs_diff:.2e}" in printed
    )
    assert result.exact == (kind == "top_k") == (result.step0_max_abs_diff < 1e-3)
    assert ("changes the model" in printed) != result.exact


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"stage": "upcycle_t5", "encoder_router": {**TOP_K, "topk": 2}},
            "stages.0.upcycle_t5.encoder_router.topk: found no option `topk` of the router `top_k.v1`. Did you "
            "mean `top_k`?",
        ),
        (
            {"stage": "upcycle_t5", "num_experts": 8, "encoder_router": TOP_K},
            "stages.0.upcycle_t5.num_experts: unknown key `num_experts`. Known: `mode`",
        ),
        (
            {"stage": "upcycle_t5"},
            "stages.0.upcycle_t5: a sparse T5 needs `encoder_router`, `decoder_router` or both",
        ),
        (
            {"stage": "upcycle", "encoder_router": TOP_K},
            "stages.0.upcycle.encoder_router: unknown key `encoder_router`.",
        ),
    ],
)
def test_mistakes_are_named_by_their_path(stage: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe.parse({"name": "wrong", "model": "some-t5", "stages": [stage]})
    assert message in str(caught.value)


def test_both_kinds_of_upcycling_are_told_apart() -> None:
    stages = [
        {"stage": "upcycle", "label": "decoder"},
        {"stage": "upcycle_t5", "decoder_router": TOP_K},
    ]
    recipe = Recipe.parse({"name": "two", "model": "some-model", "stages": stages})
    assert [type(stage) for stage in recipe.stages] == [UpcycleStage, UpcycleT5Stage]
    assert Recipe.parse(recipe.to_mapping()) == recipe
