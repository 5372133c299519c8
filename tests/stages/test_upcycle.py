"""The stage `upcycle` between others: what the dense model has seen, the sparse one has seen."""

import json
from pathlib import Path

import pytest

from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.evaluation.results import read_training_hashes
from flanmoe.stages.context import StageContext
from flanmoe.stages.evaluate import run_evaluate
from flanmoe.stages.held_model import HeldModel
from flanmoe.stages.recipe import Recipe
from flanmoe.stages.tune import run_tune
from flanmoe.stages.upcycle import run_upcycle
from flanmoe.testing.tiny_models import tiny_model, tiny_tokenizer


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
