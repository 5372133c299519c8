"""The stage `pretrain`, and what comes after it: from texts to a sparse model that answers."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from flanmoe.core.errors import ConfigError, ModelError
from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.data.denoised_stream import DenoisedStream
from flanmoe.data.denoisers import sentinel_ids
from flanmoe.data.documents import load_documents
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.flan_moe_t5 import FlanMoeT5ForConditionalGeneration
from flanmoe.models.flan_moe_t5.shape import shape_config
from flanmoe.models.flops import count_encoder_decoder_flops
from flanmoe.models.loading import load_model, load_tokenizer
from flanmoe.models.row_flops import count_row_flops
from flanmoe.stages.context import StageContext
from flanmoe.stages.evaluate import run_evaluate
from flanmoe.stages.held_model import HeldModel
from flanmoe.stages.pretrain import run_pretrain
from flanmoe.stages.recipe import PretrainStage, Recipe
from flanmoe.stages.tune import run_tune
from flanmoe.stages.upcycle import run_upcycle
from flanmoe.testing.tiny_models import tiny_model, tiny_tokenizer

SHAPE = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 2, "dropout_rate": 0.0}
TRAIN = {
    "rows_per_step": 4,
    "micro_batch_rows": 2,
    "precision": "float32",
    "learning_rate": 1e-2,
    "schedule": "constant",
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of sums in words."""
    draw = random.Random(0)
    names = ("one", "two", "three", "four", "five", "six")
    path = tmp_path_factory.mktemp("texts") / "sums.jsonl"
    with path.open("w") as file:
        for _ in range(40):
            sums = (f"{draw.choice(names)} and {draw.choice(names)} make more." for _ in range(12))
            file.write(json.dumps({"text": " ".join(sums)}) + "\n")
    return path


def stages(texts: Path, steps: int = 30) -> list[dict[str, Any]]:
    asked = texts.with_name("asked.jsonl")
    rows = [{"question": f"{number} and one?", "answer": "more"} for number in range(4)]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = {"sources": [str(texts)], "held_out_share": 0.2}
    pretrain = {"stage": "pretrain", "documents": documents, "denoising": {"length": 32}}
    return [
        {
            **pretrain,
            "shape": SHAPE,
            "tokenizer": {"vocabulary_size": 305, "num_sentinels": 20},
            "train": {**TRAIN, "steps": steps},
        },
        {
            "stage": "upcycle_t5",
            "encoder_router": {"kind": "expert_choice", "num_experts": 4},
            "decoder_router": {"kind": "top_k", "num_experts": 4},
        },
        {**pretrain, "label": "further", "train": {**TRAIN, "steps": 2}},
        {
            "stage": "tune",
            "data": {"tasks": [str(asked)]},
            "packing": {"length": 48, "target_length": 16, "window": 8},
            "train": {**TRAIN, "steps": 2, "length": 48, "target_length": 16},
        },
        {"stage": "evaluate", "tasks": [str(asked)]},
    ]


def contexts(recipe: Recipe, folder: Path) -> list[StageContext]:
    return [
        StageContext(RunDir(folder / stage.label), SeedTree(0), SeedTree(0), data_dir=None)
        for stage in recipe.stages
    ]


def test_from_texts_to_a_sparse_model_that_answers(texts: Path, tmp_path: Path) -> None:
    recipe = Recipe.parse({"name": "chain", "stages": stages(texts)})
    run = contexts(recipe, tmp_path)
    held, first = run_pretrain(recipe.stages[0], HeldModel(None), run[0])
    losses = [point.loss for point in first.training.loss_history]
    # Words follow a pattern, which is soon learnt; what it says on held-out texts is no worse.
    assert losses[-1] < 0.7 * losses[0]
    assert first.held_out_loss == pytest.approx(losses[-1], rel=0.25)
    assert first.epochs == pytest.approx(30 * 4 / first.rows_per_epoch)
    assert first.vocabulary_size == 305 == held.model().config.vocab_size
    sparse, _ = run_upcycle(recipe.stages[1], held, run[1])
    further, second = run_pretrain(recipe.stages[2], sparse, run[2])
    assert second.training.drops is not None
    assert len(second.training.drops.unserved_share) == len(moe_blocks(further.model())) == 2
    tuned, third = run_tune(recipe.stages[3], further, run[3])
    assert third.training.ledger.loss_tokens == third.packing.loss_tokens > 0
    result = run_evaluate(recipe.stages[4], tuned, run[4])
    assert result.scores.num_seen == 4
    # What is on disk is what was in memory, tokenizer included.
    loaded = load_model(str(run[3].model_folder))
    for own, other in zip(loaded.parameters(), tuned.model().parameters(), strict=True):
        assert torch.equal(own, other)
    tokenizer = load_tokenizer(str(run[3].model_folder))
    assert tokenizer("one and two")["input_ids"][-1] == tokenizer.eos_token_id


def test_the_same_seed_gives_the_same_model(texts: Path, tmp_path: Path) -> None:
    recipe = Recipe.parse({"name": "chain", "stages": stages(texts, steps=2)[:1]})
    models = []
    for name in ("a", "b"):
        torch.manual_seed(len(models))
        context = contexts(recipe, tmp_path / name)[0]
        models.append(run_pretrain(recipe.stages[0], HeldModel(None), context)[0].model())
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(first, second)


def test_the_loss_on_held_out_texts_is_that_of_their_rows(texts: Path, tmp_path: Path) -> None:
    """Against the mean over rows, one by one, of the model's own loss."""
    recipe = Recipe.parse({"name": "chain", "stages": stages(texts, steps=1)[:1]})
    context = contexts(recipe, tmp_path)[0]
    held, result = run_pretrain(recipe.stages[0], HeldModel(None), context)

    stage = recipe.stages[0]
    stream = DenoisedStream(
        load_documents(stage.documents, part="held_out"),
        held.text_tokenizer(),
        stage.denoising,
        SeedTree(0).child("pretrain").child("held_out"),
        sentinels=sentinel_ids(held.tokenizer()),
        decoder_start_token_id=0,
    )
    losses = []
    for _ in range(min(64, stream.rows_per_epoch)):
        row = next(stream)
        columns = (row.input_ids, row.decoder_input_ids, row.labels)
        inputs, decoder, labels = (torch.as_tensor(column)[None] for column in columns)
        logits = held.model()(input_ids=inputs, decoder_input_ids=decoder).logits
        losses.append(torch.nn.functional.cross_entropy(logits[0], labels[0]).item())
    assert result.held_out_loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer": None}, "a new model needs `shape` and `tokenizer`, but `tokenizer` is not"),
        ({"shape": None}, "`shape` is not set"),
        ({"shape": {"d_modle": 3}}, "Did you mean `d_model`?"),
        ({"shape": {"d_model": "wide"}}, "values of a FlanMoeT5"),
        ({"shape": "st_moe_bas"}, "Did you mean `st_moe_base`?"),
        ({"train": {"length": 99}}, "`train.length` follows from `denoising` (32), but is 99"),
        ({"train": {"sharding": "fsdp"}}, "`train.sharding` must be `none` in a recipe"),
    ],
)
def test_settings_that_do_not_fit_are_named(texts: Path, change: dict[str, Any], said: str) -> None:
    values = {**stages(texts)[0], **change}
    with pytest.raises(ConfigError) as error:
        PretrainStage.parse({name: value for name, value in values.items() if value is not None})
    assert said in str(error.value)


def test_lengths_follow_and_survive_being_written(texts: Path) -> None:
    stage = PretrainStage.parse(stages(texts)[0])
    lengths = stage.denoising.built().lengths(32)
    assert (stage.train.length, stage.train.target_length) == (32, lengths.targets)
    assert PretrainStage.parse(stage.to_mapping()) == stage


@pytest.mark.parametrize("name", ["tune first", "two beginnings"])
def test_a_recipe_begins_with_one_model(texts: Path, name: str) -> None:
    every = stages(texts)
    values = {"name": "chain", "stages": every[3:4] if name == "tune first" else every[:1]}
    if name == "two beginnings":
        values["model"] = "somewhere"
    with pytest.raises(ConfigError, match="`model` must"):
        Recipe.parse(values)


def test_a_decoder_cannot_put_spans_back(texts: Path, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    values = {**stages(texts)[2]}
    context = StageContext(RunDir(tmp_path / "run"), SeedTree(0), SeedTree(0), data_dir=None)
    with pytest.raises(ModelError, match="trains encoder-decoders"):
        run_pretrain(PretrainStage.parse(values), HeldModel(str(tmp_path / "llama")), context)


def test_without_a_model_nothing_is_held() -> None:
    with pytest.raises(ModelError, match="there is none yet"):
        HeldModel(None).model()


def test_flops_of_a_row_are_those_of_its_two_sides() -> None:

    model = FlanMoeT5ForConditionalGeneration(shape_config(SHAPE, vocabulary_size=40))
    both = count_encoder_decoder_flops(model, input_length=12, target_length=4)
    row = count_row_flops(model, length=12, target_length=4)
    assert row.total * 16 == pytest.approx(both.per_example, rel=1e-6)
    assert row.context_length == 16
