"""Tuning with frozen parts and expert dropout: what moves, what is saved, what stays afterwards."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from flanmoe.core.errors import ModelError
from flanmoe.data.example import Packed
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.freezing import freeze, what_trains
from flanmoe.moe.compute import hidden_dropout
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.testing.tuning import tune_rows
from flanmoe.training.tune import TuneResult

Rows = Callable[..., list[Packed]]
Weights = dict[str, torch.Tensor]


run = partial(tune_rows, steps=2, micro_batch_rows=2, learning_rate=1e-2, schedule="constant")


def weights(model: PreTrainedModel) -> Weights:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def frozen_names(family: str, presets: list[str]) -> set[str]:
    model = tiny_model(family)
    freeze(model, presets)
    return {name for name, value in model.named_parameters() if not value.requires_grad}


@pytest.mark.parametrize(
    ("family", "presets"),
    [
        ("mixtral", ["gate"]),
        ("mixtral", ["moe"]),
        ("qwen2_moe", ["experts", "attention"]),
        ("granitemoe", ["non_moe"]),
        ("olmoe", ["non_moe", "gate"]),
        ("llama", ["attention"]),
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_frozen_weights_stay_to_the_bit_and_all_others_move(
    family: str, presets: list[str], precision: str, tmp_path: Path, packed_rows: Rows
) -> None:
    model = tiny_model(family)
    before = weights(model)
    # Decay would move a weight that has no gradient, were it in the optimizer.
    values = {"freeze": presets, "weight_decay": 0.1, "precision": precision}
    result = run(model, packed_rows(8), tmp_path, **values)
    stayed = {name for name, value in weights(model).items() if torch.equal(value, before[name])}
    assert stayed == frozen_names(family, presets)
    assert result.trains is not None
    frozen_model = tiny_model(family)
    freeze(frozen_model, presets)
    assert result.trains == what_trains(frozen_model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert TuneResult.parse(result.to_mapping()) == result


def test_a_later_tuning_inherits_nothing(tmp_path: Path, packed_rows: Rows) -> None:
    model = tiny_model("mixtral")
    run(model, packed_rows(8), tmp_path / "one", freeze=["gate"], expert_dropout=0.5)
    assert {hidden_dropout(block.experts) for block in moe_blocks(model)} == {0.0}
    before = weights(model)
    second = run(model, packed_rows(8), tmp_path / "two")
    assert all(not torch.equal(value, before[name]) for name, value in weights(model).items())
    assert second.trains is not None
    assert second.trains.trained == second.trains.parameters


def test_the_table_is_printed_where_something_is_frozen(
    tmp_path: Path, packed_rows: Rows, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tiny_model("mixtral"), packed_rows(8), tmp_path / "all")
    assert "What trains" not in capfd.readouterr().err
    run(tiny_model("mixtral"), packed_rows(8), tmp_path / "some", freeze=["experts"])
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.index("What trains") < captured.err.index("Tuning: 2/2 steps")
    (line,) = (line for line in captured.err.splitlines() if line.startswith("│ experts"))
    assert [cell.strip() for cell in line.strip("│ ").split("│")] == [
        "experts",
        "98,304",
        "0",
        "0.0%",
    ]


def test_checkpoints_hold_moments_of_what_trains_alone(tmp_path: Path, packed_rows: Rows) -> None:
    model = tiny_model("mixtral")
    values = {"freeze": ["experts", "attention"], "checkpoint_every_steps": 2}
    run(model, packed_rows(8), tmp_path, **values)
    path = tmp_path / "checkpoints" / "checkpoint-2" / "optimizer.pt"
    state = torch.load(path, weights_only=True)["state"].values()
    names = frozen_names("mixtral", values["freeze"])
    trained = sorted(v.numel() for n, v in model.named_parameters() if n not in names)
    assert sorted(entry["exp_avg"].numel() for entry in state) == trained


def test_router_losses_reach_earlier_layers_through_a_frozen_gate(
    tmp_path: Path, packed_rows: Rows
) -> None:
    found: list[Weights] = []
    for z_coefficient in (0.0, 1.0):
        model = tiny_model("mixtral")
        router = {"balance_coefficient": 0, "z_coefficient": z_coefficient}
        run(model, packed_rows(8), tmp_path / str(z_coefficient), freeze=["gate"], router=router)
        found.append(weights(model))
    without, with_loss = found
    same = {name for name in without if torch.equal(without[name], with_loss[name])}
    assert same == frozen_names("mixtral", ["gate"])


@pytest.mark.parametrize("presets", [["non_moe"], ["gate"]])
def test_gradient_checkpointing_changes_no_weight(
    presets: list[str], tmp_path: Path, packed_rows: Rows
) -> None:
    results: list[Weights] = []
    for checkpointing in (False, True):
        model = tiny_model("mixtral")
        values = {"freeze": presets, "expert_dropout": 0.4, "gradient_checkpointing": checkpointing}
        run(model, packed_rows(8), tmp_path / str(checkpointing), **values)
        results.append(weights(model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=1e-7)


def test_expert_dropout_repeats_with_the_seed(tmp_path: Path, packed_rows: Rows) -> None:
    results: list[Weights] = []
    settings = [{}, {}, {"seed": 1}, {"expert_dropout": 0.0}]
    for number, values in enumerate(settings):
        model = tiny_model("mixtral")
        run(model, packed_rows(8), tmp_path / str(number), **{"expert_dropout": 0.4, **values})
        results.append(weights(model))
    first, again, *others = results
    assert all(torch.equal(first[name], again[name]) for name in first)
    for other in others:
        assert all(not torch.equal(first[name], other[name]) for name in first)


def test_the_counting_pass_drops_what_the_training_pass_drops(
    tmp_path: Path, packed_rows: Rows
) -> None:
    model = tiny_model("mixtral")
    passes: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    # The second layer's router sees what the first layer's experts dropped.
    moe_blocks(model)[1].router.register_forward_hook(
        lambda module, inputs, output: passes[torch.is_grad_enabled()].append(output[0].detach())
    )
    rows = packed_rows(8, most_in_a_row=1)
    run(model, rows, tmp_path, expert_dropout=0.5, router={"scope": "global"})
    assert len(passes[False]) == len(passes[True]) == 2 * 2
    for counting, training in zip(passes[False], passes[True], strict=True):
        assert torch.equal(counting, training)


@pytest.mark.parametrize(
    "values", [{"freeze": ["gate"]}, {"expert_dropout": 0.1}, {"keep_expert_activation": True}]
)
def test_a_dense_model_is_refused_before_the_first_step(
    values: dict[str, Any], tmp_path: Path, packed_rows: Rows
) -> None:
    model = tiny_model("llama")
    with pytest.raises(ModelError, match="needs a sparse model"):
        run(model, packed_rows(8), tmp_path, **values)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert all(parameter.requires_grad for parameter in model.parameters())
