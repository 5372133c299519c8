"""Tuning of an encoder-decoder that is cut off and goes on, with each optimizer."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from flanmoe.core.rundir import RunDir
from flanmoe.data.example import PackedPair
from flanmoe.testing.tuning import tune_rows
from flanmoe.training.tune import TuneResult

pytestmark = pytest.mark.slow

NOISY = {
    "dropout_rate": 0.2,
    "encoder_router": {
        "kind": "expert_choice",
        "num_experts": 4,
        "capacity_factor": 1.0,
        "jitter": 0.1,
    },
    "decoder_router": {
        "kind": "gshard",
        "num_experts": 4,
        "jitter": 0.1,
        "capacity": {"train": 0.7, "minimum": 1, "group": "segment"},
    },
}
SETTINGS: dict[str, Any] = {
    "steps": 5,
    "checkpoint_every_steps": 2,
    "keep_checkpoints": 3,
    "micro_batch_rows": 2,
    "target_length": 14,
    "learning_rate": 1e-2,
    "schedule": "inverse_sqrt",
    "warmup_steps": 2,
}


def without_measurements(result: TuneResult) -> dict[str, Any]:
    """A result without what no two runs share: seconds and memory."""
    values = result.to_mapping()
    del values["counting_pass_seconds"]
    del values["ledger"]["seconds"]
    del values["ledger"]["peak_memory_bytes"]
    return values


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("optimizer", "scope"), [("adafactor", "lagged"), ("adamw", "global")])
def test_going_on_equals_never_stopping(
    optimizer: str,
    scope: str,
    precision: str,
    tmp_path: Path,
    tiny_t5: Callable[..., PreTrainedModel],
    pairs_in_rows: Callable[..., list[Any]],
    pair_rows: Callable[..., list[PackedPair]],
) -> None:
    rows = pair_rows(pairs_in_rows(12))
    settings = {**SETTINGS, "optimizer": optimizer, "router": {"scope": scope}}
    settings["precision"] = precision
    whole, going_on = tmp_path / "whole", tmp_path / "going_on"
    # Wide enough for weights that Adafactor factors, experts among them.
    shape = {**NOISY, "d_model": 128, "d_ff": 136}
    model = tiny_t5(**shape)
    result = tune_rows(model, rows, whole, **settings)
    assert result.drops is not None
    assert min(result.drops.dropped_share[2:]) > 0
    shutil.copytree(whole, going_on)
    for step in (4, 5):
        shutil.rmtree(going_on / "checkpoints" / f"checkpoint-{step}")
    other = tiny_t5(seed=5, **shape)
    again = tune_rows(other, rows, going_on, resume=True, **settings)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert without_measurements(again) == without_measurements(result)
    for file in ("metrics.jsonl", "routing.jsonl"):
        assert RunDir(going_on).rows(file) == RunDir(whole).rows(file)
