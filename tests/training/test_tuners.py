"""Tuning with a tuner: what trains, what is merged and saved, going on from a checkpoint, statistics first."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from flanmoe.core.errors import ConfigError, RunError
from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import Packed
from flanmoe.models.blocks import moe_blocks
from flanmoe.statistics import ExpertStatistics
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.testing.tuning import tune_rows
from flanmoe.training.arguments import TuneConfig
from flanmoe.training.rows import FixedRows
from flanmoe.training.task_statistics import with_statistics
from flanmoe.training.tune import TuneResult, tune
from flanmoe.tuners.adapter_loading import load_adapter
from flanmoe.tuners.attached import has_tuner
from flanmoe.tuners.expert_specialised import put_experts

Rows = Callable[..., list[Packed]]
Weights = dict[str, torch.Tensor]

pytestmark = pytest.mark.slow

run = partial(tune_rows, steps=4, micro_batch_rows=2, learning_rate=1e-2, weight_decay=0.1)
LOW_RANK = {"kind": "low_rank", "rank": 2, "dropout": 0.2, "linear": {"targets": ["q_proj"]}}


def weights(model: PreTrainedModel) -> Weights:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def moved(model: PreTrainedModel, before: Weights) -> set[str]:
    return {name for name, value in weights(model).items() if not torch.equal(value, before[name])}


def specialised(model: PreTrainedModel, rows: list[Packed], folder: Path) -> dict[str, Any]:
    """A tuner whose statistics have been gathered on the rows."""
    config = TuneConfig.parse({"tuner": {"kind": "expert_specialised", "share": 0.3}})
    filled = with_statistics(config, model, FixedRows(rows), folder / "statistics.safetensors")
    assert filled.tuner is not None
    return filled.tuner.to_mapping()


@pytest.fixture(params=["low_rank", "expert_specialised"])
def tuner(request: pytest.FixtureRequest, packed_rows: Rows, tmp_path: Path) -> dict[str, Any]:
    """One of the two tuners."""
    if request.param == "low_rank":
        return LOW_RANK
    return specialised(tiny_model("mixtral"), packed_rows(8), tmp_path)


def test_what_was_trained_is_merged_and_nothing_else_moves(
    tuner: dict[str, Any], tmp_path: Path, packed_rows: Rows
) -> None:
    model = tiny_model("mixtral")
    before = weights(model)
    result = run(model, packed_rows(8), tmp_path, tuner=tuner)
    experts = {
        f"model.layers.{layer}.mlp.experts.{name}"
        for layer in range(2)
        for name in ("gate_up_proj", "down_proj")
    }
    linear = {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}
    is_low_rank = tuner["kind"] == "low_rank"
    assert moved(model, before) == (experts | linear if is_low_rank else experts)
    assert not has_tuner(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert result.merged is not None
    assert result.merged.agreeing_share == 1
    assert result.merged.linear_layers == (2 if is_low_rank else 0)
    assert result.trains.trained < 0.5 * result.trains.parameters
    assert TuneResult.parse(result.to_mapping()) == result
    assert result.final_loss < result.loss_history[0].loss


@pytest.mark.parametrize("merge", [True, False])
def test_what_is_saved_makes_of_the_model_before_the_one_after(
    merge: bool, tuner: dict[str, Any], tmp_path: Path, packed_rows: Rows
) -> None:
    model = tiny_model("mixtral")
    before = weights(model)
    result = run(model, packed_rows(8), tmp_path, tuner={**tuner, "merge": merge})
    other = tiny_model("mixtral")
    if tuner["kind"] == "low_rank":
        load_adapter(other, tmp_path / "adapter").merge()
    else:
        put_experts(other, tmp_path / "adapter")
    if merge:
        torch.testing.assert_close(weights(other), weights(model))
    else:
        assert result.merged is None
        assert not moved(model, before)
        assert moved(other, before)


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    tuner: dict[str, Any], tmp_path: Path, packed_rows: Rows
) -> None:
    values = {"tuner": tuner, "schedule": "constant", "checkpoint_every_steps": 2}
    whole = tiny_model("mixtral")
    run(whole, packed_rows(8), tmp_path / "whole", **values)
    half = tiny_model("mixtral")
    run(half, packed_rows(8), tmp_path / "half", **{**values, "steps": 2})
    resumed = tiny_model("mixtral")
    run(resumed, packed_rows(8), tmp_path / "half", resume=True, **values)
    assert not moved(resumed, weights(whole))
    assert moved(half, weights(whole))


def test_checkpoints_hold_what_trains_alone(
    tuner: dict[str, Any], tmp_path: Path, packed_rows: Rows
) -> None:
    model = tiny_model("mixtral")
    result = run(model, packed_rows(8), tmp_path, tuner=tuner, checkpoint_every_steps=4)
    folder = tmp_path / "checkpoints" / "checkpoint-4"
    assert not list(folder.glob("model*.safetensors"))
    saved = load_file(folder / "trained.safetensors")
    assert sum(value.numel() for value in saved.values()) == result.trains.trained
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"].values()
    moments = sum(entry["exp_avg"].numel() for entry in state)
    assert moments == result.trains.trained


def test_a_checkpoint_of_another_tuner_is_refused(tmp_path: Path, packed_rows: Rows) -> None:
    values: dict[str, Any] = {"checkpoint_every_steps": 4}
    run(tiny_model("mixtral"), packed_rows(8), tmp_path, tuner=LOW_RANK, **values)
    other = {"kind": "low_rank", "rank": 3, "linear": {"targets": ["q_proj"]}}
    with pytest.raises(RunError) as error:
        run(tiny_model("mixtral"), packed_rows(8), tmp_path, resume=True, tuner=other, **values)
    first = "model.layers.0.mlp.experts.flanmoe_low_rank.down.a"
    assert (
        f"must hold the 12 weights that the tuner trains, but 8 differ, the first is {first}"
        in str(error.value)
    )


def test_activation_checkpointing_changes_nothing(
    tuner: dict[str, Any], tmp_path: Path, packed_rows: Rows
) -> None:
    found: list[Weights] = []
    for again in (False, True):
        model = tiny_model("mixtral")
        values = {"gradient_checkpointing": again, "precision": "bfloat16", "steps": 2}
        run(model, packed_rows(8), tmp_path / str(again), tuner=tuner, **values)
        found.append(weights(model))
    torch.testing.assert_close(*found)


def test_expert_dropout_and_a_tuner_together(tmp_path: Path, packed_rows: Rows) -> None:
    plain, dropped = (tiny_model("mixtral") for _ in range(2))
    run(plain, packed_rows(8), tmp_path / "plain", tuner=LOW_RANK)
    run(dropped, packed_rows(8), tmp_path / "dropped", tuner=LOW_RANK, expert_dropout=0.4)
    assert moved(dropped, weights(plain))


def test_what_trains_and_what_was_merged_are_printed(
    tmp_path: Path, packed_rows: Rows, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tiny_model("mixtral"), packed_rows(8), tmp_path, tuner=LOW_RANK)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.index("What trains") < captured.err.index("Tuning: 4/4 steps")
    assert captured.err.index("Tuning: 4/4 steps") < captured.err.index(
        "Merged: 16 of 16 experts in 2"
    )
    rows = [
        [cell.strip() for cell in line.strip("│ ").split("│")] for line in captured.err.splitlines()
    ]
    # Rank 2 of 8 experts, 2 layers: gate and up 32 -> 128, down 64 -> 32; rank 8: queries 32 -> 32.
    trained = 2 * (8 * 2 * (32 + 128 + 64 + 32) + 8 * (32 + 32))
    assert ["adapters", f"{trained:,}", f"{trained:,}", "100.0%"] in rows
    assert ["experts", "98,304", "0", "0.0%"] in rows


# ---- Statistics ----


def test_statistics_are_those_of_the_first_rows_and_gathered_once(
    tmp_path: Path, packed_rows: Rows
) -> None:
    model = tiny_model("mixtral")
    stream = FixedRows(packed_rows(8))
    config = TuneConfig.parse({"tuner": {"kind": "expert_specialised", "rows": 3}})
    path = tmp_path / "statistics.safetensors"
    filled = with_statistics(config, model, stream, path)
    found = ExpertStatistics.load(path)
    assert found.groups == ("random",)
    assert found.tokens == {
        "decoder": sum(int((row.segment_ids != 0).sum()) for row in packed_rows(8)[:3])
    }
    assert [layer.name for layer in found.layers] == [block.name for block in moe_blocks(model)]
    # All rows are trained on afterwards, these too.
    assert next(stream).input_ids.tolist() == packed_rows(8)[0].input_ids.tolist()
    before = path.read_bytes()
    assert with_statistics(config, model, FixedRows(packed_rows(8)), path) == filled
    assert path.read_bytes() == before
    # Whoever names a file has gathered it already, and other tuners need none.
    assert with_statistics(filled, model, stream, tmp_path / "other") is filled
    low_rank = TuneConfig.parse({"tuner": LOW_RANK})
    assert with_statistics(low_rank, model, stream, tmp_path / "other") is low_rank
    assert not (tmp_path / "other").exists()


def test_without_statistics_the_way_out_is_named(tmp_path: Path, packed_rows: Rows) -> None:
    config = TuneConfig.parse({"tuner": {"kind": "expert_specialised"}})
    with pytest.raises(ConfigError) as error:
        tune(
            tiny_model("mixtral"),
            FixedRows(packed_rows(8)),
            config,
            run=RunDir(tmp_path),
            seeds=SeedTree(0),
            flops_per_token=1.0,
            resume=False,
        )
    assert str(error.value) == (
        "`tuner: {kind: expert_specialised}` needs `statistics`, a file of what the model does with the task, "
        "but it is not set. Gather it with `flanmoe.statistics.collect`; a recipe gathers its own."
    )


def test_a_tuner_and_freezing_exclude_each_other() -> None:
    with pytest.raises(ConfigError) as error:
        TuneConfig.parse({"freeze": ["gate"], "tuner": LOW_RANK})
    assert str(error.value) == (
        "configuration has 1 problem:\n  tuner: must not be set beside `freeze` (gate), but is low_rank; with "
        "a tuner all of the model is frozen, so leave one of them out"
    )
