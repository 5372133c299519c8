"""A made-up report of one step."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from flanmoe.moe.routing_measures import routing_measures
from flanmoe.moe.routing_sums import RoutingSums
from flanmoe.training.report import RouterReport, StepReport
from flanmoe.training.rows import StepTotals

TASKS = ("boolean", "gsm8k", "unused")


def _layer(assignments: list[list[int]], **numbers: list[int]) -> RoutingSums:
    values = {name: torch.tensor(value) for name, value in numbers.items()}
    tokens = values["tokens"].double()
    return RoutingSums(
        **values,
        assignments=torch.tensor(assignments),
        gate_mass=torch.tensor(assignments).double() / 2,
        entropy=0.5 * tokens,
        confidence=0.75 * tokens,
        squared_logits=4 * tokens,
    )


# Three tasks, the last without a token. In the first layer 4 of 8 choices do not fit; in the second
# experts choose.
ROUTING = (
    _layer(
        [[2, 0, 0], [1, 0, 1], [0, 0, 0]],
        tokens=[3, 2, 0],
        asked=[5, 3, 0],
        dropped=[3, 1, 0],
        unserved=[2, 0, 0],
    ),
    _layer(
        [[2, 0, 0], [0, 2, 0], [0, 0, 0]],
        tokens=[3, 2, 0],
        asked=[0, 0, 0],
        dropped=[0, 0, 0],
        unserved=[1, 0, 0],
    ),
)


@pytest.fixture
def report() -> Callable[..., StepReport]:
    """Reports that differ from one another in what a test names."""

    def make(step: int, *, sparse: bool = True, **changes: Any) -> StepReport:
        router = RouterReport(
            balance_per_layer=(2.0, 4.0),
            raw={"balance": 3.0, "importance": 0.5, "z": 5.0},
            weighted={"balance": 0.03, "importance": 0.0, "z": 0.005},
            routing=ROUTING,
            measures=tuple(routing_measures(layer.together())[0] for layer in ROUTING),
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
