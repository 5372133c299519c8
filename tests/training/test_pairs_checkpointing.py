"""Activation checkpointing of an encoder-decoder: what is computed again decides as it did the first time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import PackedPair
from flanmoe.models.blocks import moe_blocks
from flanmoe.moe.routers.base import Router, Scored
from flanmoe.moe.routing import Routing
from flanmoe.training.arguments import TuneConfig, training_arguments
from flanmoe.training.callbacks.base import StepCallback
from flanmoe.training.report import StepReport
from flanmoe.training.rows import FixedRows
from flanmoe.training.trainer import SparseTrainer

Runner = Callable[..., list[dict[str, torch.Tensor]]]
Builder = Callable[..., PreTrainedModel]
Rows = Callable[..., list[PackedPair]]
Drawn = Callable[..., list[Any]]

JITTER = {"num_experts": 4, "init_std": 0.5, "jitter": 0.2}
NOISY: dict[str, Any] = {
    "encoder_router": {**JITTER, "kind": "expert_choice", "capacity_factor": 1.0},
    # Every token may have its second choice drawn, and experts fill up.
    "decoder_router": {
        **JITTER,
        "kind": "gshard",
        "threshold": 1.0,
        "capacity": {"train": 0.7, "minimum": 1, "group": "batch"},
    },
}
STEP: dict[str, Any] = {
    "rows_per_step": 4,
    "micro_batch_rows": 2,
    "router": {"balance_coefficient": 0.5, "importance_coefficient": 0.3, "z_coefficient": 0.1},
}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(
        float((one[name] - other[name]).abs().max() / other[name].abs().max()) for name in one
    )


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="second choices drawn"),
        pytest.param(
            {
                "dropout_rate": 0.1,
                "decoder_router": {**NOISY["decoder_router"], "second_choice": "all"},
            },
            id="dropout",
        ),
        pytest.param({"dropout_rate": 0.1}, id="both"),
    ],
)
def test_gradients_are_the_same(
    settings: dict[str, Any],
    gradients_of: Runner,
    tiny_t5: Builder,
    pairs_in_rows: Drawn,
    pair_rows: Rows,
) -> None:
    rows = pair_rows(pairs_in_rows(4))
    plain, again, checkpointed = (
        gradients_of(tiny_t5(**{**NOISY, **settings}), rows, gradient_checkpointing=is_on, **STEP)[
            0
        ]
        for is_on in (False, False, True)
    )
    assert largest_difference(again, plain) == 0
    assert largest_difference(checkpointed, plain) < 1e-6


class Reports(StepCallback):
    name = "reports"

    def __init__(self) -> None:
        self.steps: list[StepReport] = []

    def after_step(self, report: StepReport) -> None:
        self.steps.append(report)


@contextmanager
def kept_decisions(model: PreTrainedModel) -> Iterator[dict[str, list[Routing]]]:
    """What each router returned, in every pass."""
    kept: dict[str, list[Routing]] = {block.name: [] for block in moe_blocks(model)}

    def keep(name: str) -> Callable[[nn.Module, Any, Routing], None]:
        return lambda module, given, routing: kept[name].append(routing)

    hooks = [block.router.register_forward_hook(keep(block.name)) for block in moe_blocks(model)]
    yield kept
    for hook in hooks:
        hook.remove()


def trained(
    folder: Path, model: PreTrainedModel, rows: list[PackedPair], **settings: Any
) -> StepReport:
    config = TuneConfig.parse({"precision": "float32", "steps": 1, **STEP, **settings})
    reports = Reports()
    trainer = SparseTrainer(
        model,
        training_arguments(config, folder, SeedTree(0)),
        stream=FixedRows(rows),
        router=config.router,
        callbacks=[reports],
    )
    trainer.train()
    (report,) = reports.steps
    return report


def test_nothing_is_recorded_twice(
    tmp_path: Path, tiny_t5: Builder, pairs_in_rows: Drawn, pair_rows: Rows
) -> None:
    rows = pair_rows(pairs_in_rows(4))
    one, other = (
        trained(tmp_path, tiny_t5(**NOISY), rows, gradient_checkpointing=is_on)
        for is_on in (False, True)
    )
    assert one.metrics() == pytest.approx(other.metrics(), rel=1e-6)
    assert one.router is not None
    assert other.router is not None
    for mine, theirs in zip(one.router.routing, other.router.routing, strict=True):
        for name in ("asked", "dropped", "tokens", "unserved", "assignments"):
            assert torch.equal(mine.tensors()[name], theirs.tensors()[name]), name


def disturb_what_is_computed_again(router: Router, disturbed: Callable[[Tensor], Tensor]) -> None:
    """Change a router's logits during a backward pass."""
    computed = router._logits

    def logits(hidden: Tensor) -> Tensor:
        found = computed(hidden)
        is_again = torch._C._current_graph_task_id() != -1
        return disturbed(found) if is_again else found

    router._logits = logits


def pairs_of(routing: Routing) -> list[tuple[int, int]]:
    ids = zip(routing.token_ids.tolist(), routing.expert_ids.tolist(), strict=True)
    return sorted(ids)


def test_a_recompute_with_other_scores_decides_as_before(
    tmp_path: Path, tiny_t5: Builder, pairs_in_rows: Drawn, pair_rows: Rows
) -> None:
    unlimited = {**NOISY["decoder_router"], "capacity": {"train": None}}
    model = tiny_t5(**{**NOISY, "decoder_router": unlimited})
    for block in moe_blocks(model):
        disturb_what_is_computed_again(block.router, torch.neg)
    # One micro-batch: no pass is made to count experts beforehand.
    settings = {"rows_per_step": 4, "micro_batch_rows": 4, "gradient_checkpointing": True}
    with kept_decisions(model) as kept:
        # Rows of one example: the model is not asked whether it keeps them apart.
        trained(tmp_path, model, pair_rows(pairs_in_rows(4, most=1)), **settings)
    for block in moe_blocks(model):
        first, second = kept[block.name]
        assert not torch.equal(first.logits, second.logits)
        assert pairs_of(first) == pairs_of(second)
        assert torch.equal(first.choices.asked, second.choices.asked)
        # Left to itself it would have chosen otherwise.
        probabilities = second.logits.softmax(dim=1)
        free = block.router.route(
            Scored(second.logits, probabilities, second.valid, second.segments)
        )
        assert pairs_of(free) != pairs_of(first)


def test_a_near_tie_goes_where_it_went(
    gradients_of: Runner, tiny_t5: Builder, pairs_in_rows: Drawn, pair_rows: Rows
) -> None:
    """Two experts that tie exactly; what is computed again leans to the other one, ever so little."""
    rows = pair_rows(pairs_in_rows(4))
    settings = {"rows_per_step": 4, "micro_batch_rows": 4, "router": {"scope": "sequence"}}
    switch = {"kind": "switch", "num_experts": 2, "capacity": {"train": None}}

    def tied() -> PreTrainedModel:
        model = tiny_t5(encoder_router=switch, decoder_router=switch).double()
        with torch.no_grad():
            for block in moe_blocks(model):
                block.router.weight[1] = block.router.weight[0]
        return model

    (expected,) = gradients_of(tied(), rows, **settings)
    disturbed = tied()
    for block in moe_blocks(disturbed):
        disturb_what_is_computed_again(
            block.router, lambda logits: logits + torch.tensor([[0.0, 1e-9]]).to(logits)
        )
    (found,) = gradients_of(disturbed, rows, gradient_checkpointing=True, **settings)
    experts = [name for name in found if "experts" in name]
    assert len(experts) == 8
    for name in experts:
        # All went to the first expert, and its gradient is the only one.
        assert float(expected[name][1].abs().max()) == 0
        assert float(found[name][1].abs().max()) == 0
    assert largest_difference(found, expected) < 1e-6
