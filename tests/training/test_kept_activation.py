"""Tuning with kept activations of experts: the same weights, and nothing stays afterwards."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from flanmoe.data.example import Packed
from flanmoe.models.blocks import moe_blocks
from flanmoe.moe.compute import keep_activation
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.testing.tuning import tune_rows

Rows = Callable[..., list[Packed]]

run = partial(tune_rows, steps=2, micro_batch_rows=2, learning_rate=1e-2, schedule="constant")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"gradient_checkpointing": True, "expert_dropout": 0.4},
        {"tuner": {"kind": "low_rank", "rank": 2}},
    ],
    ids=["plain", "recomputed", "low_rank"],
)
def test_weights_are_the_same_and_nothing_stays(
    values: dict[str, Any], tmp_path: Path, packed_rows: Rows
) -> None:
    results: list[dict[str, torch.Tensor]] = []
    for keep in (False, True):
        model, during = tiny_model("mixtral"), set[bool]()
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        for block in moe_blocks(model):
            block.experts.register_forward_pre_hook(
                lambda module, inputs, during=during: during.add(keep_activation(module))
            )
        run(model, packed_rows(8), tmp_path / str(keep), keep_expert_activation=keep, **values)
        assert during == {keep}
        assert {keep_activation(block.experts) for block in moe_blocks(model)} == {False}
        results.append({name: value.detach() for name, value in model.named_parameters()})
        moved = {
            name for name, value in results[-1].items() if not torch.equal(value, before[name])
        }
        assert "model.layers.0.mlp.experts.gate_up_proj" in moved
    without, kept = results
    for name, value in without.items():
        torch.testing.assert_close(kept[name], value, rtol=0, atol=1e-7)
