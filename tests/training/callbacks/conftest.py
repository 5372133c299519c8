"""A made-up report of one step."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from flanmoe.training.drops import LayerDrops
from flanmoe.training.report import RouterReport, StepReport
from flanmoe.training.rows import StepTotals


@pytest.fixture
def report() -> Callable[..., StepReport]:
    """Reports that differ from one another in what a test names."""

    def make(step: int, *, sparse: bool = True, **changes: Any) -> StepReport:
        router = RouterReport(
            balance_per_layer=(2.0, 4.0),
            raw={"balance": 3.0, "importance": 0.5, "z": 5.0},
            weighted={"balance": 0.03, "importance": 0.0, "z": 0.005},
            counts=(torch.tensor([3, 0, 1]), torch.tensor([2, 2, 0])),
            drops=(
                LayerDrops(torch.tensor([8, 4, 5, 2])),
                LayerDrops(torch.tensor([0, 0, 5, 1])),
            ),
        )
        values = StepReport(
            step=step,
            totals=StepTotals(
                rows=4,
                micro_batches=2,
                examples=6,
                real_tokens=30,
                padding_tokens=10,
                loss_tokens=12,
            ),
            cross_entropy=1.5,
            loss=1.535,
            learning_rate=1e-4,
            gradient_norm=0.5,
            router=router if sparse else None,
            counted_tokens=0,
            counting_seconds=0.0,
        )
        return replace(values, **changes)

    return make
